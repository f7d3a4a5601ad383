"""What can go wrong, by who has to act on it. The programs turn each into one line on stderr and an exit code."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """The user's input is wrong: a key, a path, a picture, a checkpoint. Exit code 2."""


class RunError(RuntimeError):
    """A run that was set up correctly has failed. Exit code 1."""


class Interrupted(Exception):
    """A signal ended the run after its checkpoint was saved. Exit code 128 + the signal's number."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def unknown_name(what: str, name: str, choices: Iterable[str]) -> str:
    """A sentence for a name that is not among the choices: the nearest one, then all of them."""
    choices = sorted(choices)
    nearest = difflib.get_close_matches(name, choices, n=1) or [choice for choice in choices if name and name in choice]
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    return f"unknown {what} '{name}'{hint} (choices: {', '.join(choices)})"
