"""What can go wrong, by who has to act on it. The programs turn each into one line on stderr and an exit code."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """The user's input is wrong: a key, a path, an image, a checkpoint. Exit code 2."""


class RunError(RuntimeError):
    """A run that was set up correctly has failed. Exit code 1."""


class PeerLost(RunError):
    """Another process of a training ended; what happened there is the cause, not this."""


class Interrupted(Exception):
    """A signal ended the run after its checkpoint was saved. Exit code 128 + the signal's number."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(signal_number, message)  # all arguments, so that it can be pickled
        self.signal_number = signal_number

    def __str__(self) -> str:
        return str(self.args[1])


def printable(text: str) -> str:
    r"""Any text, such as a file's name, on one line and in characters that a terminal shows and does not obey.

    A newline becomes ``\n``; a byte of a name that is no UTF-8, 255 for instance, ``\udcff``, as Python's strings hold it.
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def unknown_name(what: str, name: str, choices: Iterable[str]) -> str:
    """A sentence for a name that is not among the choices: the nearest one, then all of them."""
    choices = sorted(choices)
    nearest = difflib.get_close_matches(name, choices, n=1) or [
        choice for choice in choices if name and name in choice
    ]
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    return f"unknown {what} '{name}'{hint} (choices: {', '.join(choices)})"
