"""The lock of a folder in which one process at a time may work: a run, a packed copy, an embedding.

The lock belongs to the kernel, which frees it when the process ends, however that happens. The lock
file itself stays behind and means nothing without a process that holds it.
"""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from moco.errors import InputError

SECONDS_BETWEEN_TRIES = 0.2


@contextmanager
def locked(lock_file: Path, name: str, advice: str = "") -> Iterator[None]:
    """Hold the lock of a folder inside the ``with`` block.

    On a file system without locks the block runs without one.

    Args:
        lock_file: a file in the folder; it is made if it is missing.
        name: what to call the folder in a message.
        advice: what the user can do if another process holds the lock.

    Raises:
        InputError: another process holds the lock.
        OSError: the file cannot be made.
    """
    with lock_file.open("a") as file:
        if not try_to_lock(file):
            # It may have been `is_locked` of another process, which holds the lock for a moment.
            time.sleep(SECONDS_BETWEEN_TRIES)
            if not try_to_lock(file):
                raise InputError(f"{name}: another process is at work there{advice}")
        yield


def try_to_lock(file: TextIO) -> bool:
    """Lock an open file; return False if another process holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def is_locked(lock_file: Path) -> bool | None:
    """Return whether a process holds the lock; None on a file system without locks.

    Only locks of this host are certain to be seen.
    """
    try:
        with lock_file.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return False
