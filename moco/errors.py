"""The errors of the project, by who has to act on them.

Each program turns them into one line on stderr and an exit code.
"""

import difflib
import itertools
import os
import signal
from collections.abc import Iterable

MOST_NEAR = 10_000
"""Entries of a folder among which the nearest name is looked for."""


class InputError(ValueError):
    """The user's input is wrong: a key, a path, an image, a checkpoint. Exit code 2."""


class RunError(RuntimeError):
    """A run that was set up correctly has failed. Exit code 1."""


class PeerLost(RunError):
    """Another process of the training has ended. The cause is what happened there."""


class Interrupted(Exception):
    """A signal ended the run after its checkpoint was saved. Exit code 128 + the signal."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(signal_number, message)  # all arguments, so that it can be pickled
        self.signal_number = signal_number

    def __str__(self) -> str:
        return str(self.args[1])


def exit_code(error: BaseException) -> int:
    """Return the code with which a program ends that this error has ended."""
    if isinstance(error, Interrupted):
        return 128 + error.signal_number
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return 2 if isinstance(error, InputError) else 1


def printable(text: str) -> str:
    r"""Return text, such as a file name, on one line and without control characters.

    A newline becomes ``\n``. A byte of a name that is not UTF-8 becomes an escape such as
    ``\udcff``, which is how Python's strings hold the byte 255.
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def encodable(text: str) -> str:
    r"""Return text that every library and file takes, as `printable`, but with its line breaks.

    A byte of a name that is not UTF-8 becomes an escape such as ``\udcff``.
    """
    return text.encode("utf-8", "backslashreplace").decode()


def said(error: BaseException) -> str:
    """Return the message of an error on one line, or its kind if it has none."""
    words = str(error).split()
    return printable(" ".join(words)) or type(error).__name__


def unknown_name(what: str, name: str, choices: Iterable[str]) -> str:
    """Return a sentence about a name that is not among the choices, with the nearest choice."""
    choices = sorted(choices)
    nearest = difflib.get_close_matches(name, choices, n=1)
    if not nearest and name:
        nearest = [choice for choice in choices if name in choice]
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    return f"unknown {what} '{name}'{hint} (choices: {', '.join(choices)})"


def near_path(path: str | os.PathLike[str]) -> str:
    """Return ``; did you mean 'PATH'?`` for a path that does not exist, or nothing.

    The nearest name is looked for in the deepest folder of the path that exists, in any case.
    """
    missing, rest = os.fspath(path).rstrip(os.sep), ""
    if not missing or os.path.exists(missing):
        return ""
    folder, name = os.path.split(missing)
    while folder and not os.path.isdir(folder):
        rest = os.path.join(name, rest) if rest else name
        folder, name = os.path.split(folder)
    try:
        with os.scandir(folder or os.curdir) as entries:
            names = [entry.name for entry in itertools.islice(entries, MOST_NEAR)]
    except OSError:
        return ""
    # Without endings: two names are not alike because both are checkpoints.
    stem, ending = os.path.splitext(name.lower())
    names.sort(key=lambda name: (os.path.splitext(name.lower())[1] == ending, name))
    found = {os.path.splitext(name.lower())[0]: name for name in names}
    nearest = difflib.get_close_matches(stem, found, n=1)
    if not nearest:
        return ""
    near = os.path.join(folder, found[nearest[0]])
    whole = os.path.join(near, rest)
    return f"; did you mean '{whole if rest and os.path.exists(whole) else near}'?"
