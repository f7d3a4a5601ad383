"""Name the image that a loader process was reading when it died.

Every loader process writes the name of the image that it reads into shared memory. When a process
is lost, the training process looks there.
"""

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info

from moco.data.loading.workers import start_worker
from moco.errors import printable

LONGEST_NAME = 512  # bytes


class ReadNotes:
    """The name of the image that each loader process reads, in shared memory.

    Only the last `LONGEST_NAME` bytes of a name are kept.
    """

    def __init__(self, num_workers: int) -> None:
        self.pids = torch.zeros(num_workers, dtype=torch.int64).share_memory_()
        self.names = torch.zeros(num_workers, LONGEST_NAME, dtype=torch.uint8).share_memory_()

    def write(self, worker: int, name: str) -> None:
        """Write what this process, loader process number `worker`, reads."""
        content = os.fsencode(name)[-LONGEST_NAME:].ljust(LONGEST_NAME, b"\0")
        self.names[worker].numpy()[:] = memoryview(content)
        self.pids[worker] = os.getpid()

    def read(self) -> list[tuple[int, str]]:
        """Return the process id and the last name of each loader process that has read one."""
        notes = []
        for pid, row in zip(self.pids.tolist(), self.names, strict=True):
            if pid:
                name = row.numpy().tobytes().rstrip(b"\0")
                notes.append((pid, os.fsdecode(name)))
        return notes


notes_of_this_process: ReadNotes | None = None
"""Set in a loader process of a `WatchedLoader`, and there only."""


def keep_notes(notes: ReadNotes, worker: int) -> None:
    """Prepare this loader process, and have it keep notes."""
    global notes_of_this_process
    start_worker(worker)
    notes_of_this_process = notes


def note_read(name: str) -> None:
    """Note that this loader process now reads the image `name`; elsewhere do nothing."""
    worker = get_worker_info()
    if worker is not None and notes_of_this_process is not None:
        notes_of_this_process.write(worker.id, name)


class WatchedLoader(DataLoader[Any]):
    """A DataLoader whose error names what a lost process was reading.

    Its dataset calls `note_read` before it reads an image.

    Args:
        options: arguments of DataLoader, with those of `moco.data.loading.workers.loader_options`.
    """

    def __init__(self, dataset: Any, *, num_workers: int = 0, **options: Any) -> None:
        notes = ReadNotes(num_workers)
        if num_workers:
            options["worker_init_fn"] = partial(keep_notes, notes)
        # Without a generator, DataLoader would draw from the global one. A resumed run would then
        # have to restore that one's state.
        generator = torch.Generator()
        super().__init__(dataset, num_workers=num_workers, generator=generator, **options)
        self.notes = notes

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Start the processes at once, and not with the first batch."""
        if not self.persistent_workers:
            # The processes of an earlier pass have ended, and none of them was lost.
            self.notes.pids.zero_()
        with lost_worker_named(self.notes):
            batches = super().__iter__()
        return self._watched(batches)

    def _watched(self, batches: Iterator[Any]) -> Iterator[Any]:
        with lost_worker_named(self.notes):
            yield from batches


@contextmanager
def lost_worker_named(notes: ReadNotes) -> Iterator[None]:
    """Turn the error of a lost loader process into a RuntimeError that names its image."""
    try:
        yield
    except (EOFError, OSError, RuntimeError) as error:  # a lost process shows as any of them
        workers = notes.read()
        # The pipe of a process can close shortly before the process is gone, so wait up to a
        # second.
        for _ in range(20 if workers else 0):
            running = {child.pid for child in multiprocessing.active_children()}
            for pid, name in workers:
                if pid not in running:
                    raise RuntimeError(
                        f"DataLoader worker (pid {pid}) exited unexpectedly; "
                        f"it was reading {printable(name)}"
                    ) from error
            time.sleep(0.05)
        raise
