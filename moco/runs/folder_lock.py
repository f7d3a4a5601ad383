"""Folders that one process at a time writes to."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moco.errors import InputError


@contextmanager
def locked(folder: Path, called: str, busy: str) -> Iterator[None]:
    """Make the folder if it isn't there; inside, no other process gets it from here. Its end, however it comes, frees it.

    Args:
        called: what to call the folder in a message.
        busy: what another process does there.

    Raises:
        InputError: another process has it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise InputError(f"{called}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{called}: another process is {busy} there") from error
        yield
    finally:
        os.close(descriptor)
