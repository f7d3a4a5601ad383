"""Which of a loader's processes died, and what it was reading."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info

from moco.data.files.decoding import EncodedImage
from moco.data.files.images import UnreadableImage
from moco.data.loading.workers import is_gone
from moco.errors import printable

LONGEST_NAME = 512  # bytes


class LastRead:
    """The name of what each loader process is at, in memory that they share with the training process.

    Of a name longer than `LONGEST_NAME` the end is kept.
    """

    def __init__(self, num_workers: int) -> None:
        self.pids = torch.zeros(num_workers, dtype=torch.int64).share_memory_()
        self.names = torch.zeros(num_workers, LONGEST_NAME, dtype=torch.uint8).share_memory_()

    def note(self, name: str) -> None:
        """This process is at `name` now; does nothing in the training process."""
        worker = get_worker_info()
        if worker is None:
            return
        content = os.fsencode(name)[-LONGEST_NAME:]
        self.names[worker.id].numpy()[:] = memoryview(content.ljust(LONGEST_NAME, b"\0"))
        self.pids[worker.id] = os.getpid()

    def __call__(self) -> list[tuple[int, str]]:
        """The process id of each worker that has begun, and the name of what it is or was at."""
        names = [os.fsdecode(row.numpy().tobytes().rstrip(b"\0")) for row in self.names]
        return [(pid, name) for pid, name in zip(self.pids.tolist(), names, strict=True) if pid]


@dataclass(frozen=True)
class WatchedImage:
    """An image that says when it is decoded, so that a decoder that kills its process can be told which one it was."""

    image: EncodedImage | None
    """None if not even its header can be read."""
    name: str
    note: Callable[[str], None]
    """Of a `LastRead`."""

    @property
    def size(self) -> tuple[int, int]:
        return self.image.size if self.image else (1, 1)

    def pixels(self, reduction: int = 1) -> np.ndarray:
        """See `EncodedImage`."""
        if self.image is None:
            raise UnreadableImage
        self.note(self.name)
        return self.image.pixels(reduction)


class WatchedLoader(DataLoader[Any]):
    """A loader that names what a process of its was reading when it was lost, and draws no global random number.

    Args:
        dataset: where there are loader processes, with a `LastRead` as ``last_read``, in which it notes what it reads.
        options: of `moco.data.loading.workers.loader_options`, and DataLoader's others.
    """

    dataset: Any

    def __init__(self, dataset: Any, **options: Any) -> None:
        # DataLoader would draw its workers' seeds from the global generator, which a resume has to restore.
        super().__init__(dataset, generator=torch.Generator(), **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Starts the processes at once, not with the first batch."""
        if not self.num_workers:
            return super().__iter__()
        with lost_worker_named(self.dataset.last_read):
            return self._named(super().__iter__())

    def _named(self, batches: Iterator[Any]) -> Iterator[Any]:
        with lost_worker_named(self.dataset.last_read):
            yield from batches


@contextmanager
def lost_worker_named(last_read: Callable[[], list[tuple[int, str]]]) -> Iterator[None]:
    """Inside, the failure that a lost loader process causes becomes a RuntimeError that names what it was reading.

    Args:
        last_read: the loader processes' ids, and what each was at last.
    """
    try:
        yield
    except (EOFError, OSError, RuntimeError) as error:  # a lost process shows as any of them
        if said := _lost(last_read()):
            raise RuntimeError(said) from error
        raise


def _lost(workers: list[tuple[int, str]]) -> str:
    """Which process is gone; empty if none is."""
    for _ in range(
        20 if workers else 0
    ):  # its end of a pipe may be closed a little before it is gone
        for pid, name in workers:
            if is_gone(pid):
                return f"DataLoader worker (pid {pid}) exited unexpectedly; it was reading {printable(name)}"
        time.sleep(0.05)
    return ""
