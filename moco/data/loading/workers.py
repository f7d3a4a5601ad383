"""The loader's processes: how they start and end, which signals they ignore, and what they read.

Every loader process writes the name of the image that it reads into shared memory. When a process
is lost, the training process looks there, and the error names the image.
"""

import atexit
import io
import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import pickle
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from moco.errors import InputError, printable

CPU = torch.device("cpu")
LONGEST_NAME = 512  # bytes


def device_of(data: Any) -> torch.device:
    """Return the device of a data module's batches: its Trainer's, or the CPU without a Trainer."""
    if not data.trainer:
        return CPU
    return data.trainer.strategy.root_device


def cores_of(num_processes: int) -> int:
    """Return how many cores each of this machine's training processes may use."""
    return max(1, len(os.sched_getaffinity(0)) // num_processes)


def unchanged(batch: Any) -> Any:
    """Return a batch as it is: the collate function of datasets that hand out whole batches."""
    return batch


def loader_options(num_workers: int, device: torch.device) -> dict[str, Any]:
    """Return DataLoader's arguments for this many worker processes.

    Args:
        device: the device that uses the batches. Only CUDA gains from pinned memory. Elsewhere
            pinning would initialise a GPU that the run does not use.
    """
    options: dict[str, Any] = {"num_workers": num_workers, "pin_memory": device.type == "cuda"}
    if num_workers > 0:
        start_fork_server()
        # Starting processes takes seconds, so they stay for the next epoch.
        options["persistent_workers"] = True
        options["multiprocessing_context"] = "forkserver"
        options["worker_init_fn"] = start_worker
    return options


def start_fork_server() -> None:
    """Start the process that forks the workers, if it does not run yet.

    Forking the training process could deadlock, because it has threads (of torch and faiss).

    Ctrl-C and SIGTERM reach the whole process group, and a scheduler's signals reach every process
    of a job. Only the training process decides what happens then. The server and its workers
    inherit a mask that blocks these signals.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moco.data.loading.loaders"])
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        # Starting the resource tracker unblocks SIGINT and SIGTERM, so block them again.
        multiprocessing.resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_workers() -> None:
    """Kill the loader processes that still run when this process ends.

    They block SIGTERM, and multiprocessing would wait for them for ever.
    """
    for child in multiprocessing.active_children():
        if isinstance(child, multiprocessing.context.ForkServerProcess):
            child.kill()


atexit.register(end_workers)


def start_worker(worker: int) -> None:
    """Prepare this loader process: it ends when the training process has ended in any way.

    PyTorch checks the parent process instead. That is the fork server, which waits for its workers.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=leave_after, args=(parent,), daemon=True).start()
    # If the training process ends while a batch is on its way, a thread of multiprocessing would
    # print a traceback here.
    sys.excepthook = show_unless_disconnected


def leave_after(parent: Any) -> None:
    """Wait until the parent process has ended, then end this one."""
    parent.join()
    os._exit(1)


def show_unless_disconnected(kind: type[BaseException], *details: Any) -> None:
    """Print an uncaught error, except that a connection was closed."""
    if not issubclass(kind, ConnectionError):
        sys.__excepthook__(kind, *details)


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
                notes.append((pid, os.fsdecode(row.numpy().tobytes().rstrip(b"\0"))))
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
            check_processes_find(dataset, num_workers)
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
        with lost_worker_named(self.notes), refused_objects_named(self.num_workers):
            batches = super().__iter__()
        return self._watched(batches)

    def _watched(self, batches: Iterator[Any]) -> Iterator[Any]:
        with lost_worker_named(self.notes), input_errors_of_workers():
            yield from batches


@contextmanager
def lost_worker_named(notes: ReadNotes) -> Iterator[None]:
    """Turn the error of a lost loader process into a RuntimeError that names its image."""
    try:
        yield
    except (EOFError, OSError, RuntimeError) as error:  # a lost process shows as any of them
        workers = notes.read()
        num_looks = 0
        if workers:
            # The pipe of a process can close shortly before the process is gone, so wait up to a
            # second.
            num_looks = 20
        for _ in range(num_looks):
            running = {child.pid for child in multiprocessing.active_children()}
            for pid, name in workers:
                if pid not in running:
                    lost = f"DataLoader worker (pid {pid}) exited unexpectedly"
                    raise RuntimeError(f"{lost}; it was reading {printable(name)}") from error
            time.sleep(0.05)
        raise


@contextmanager
def input_errors_of_workers() -> Iterator[None]:
    """Raise the `InputError` of a loader process with its own message.

    PyTorch puts the traceback of the process before it. That stays as the cause of the error.
    """
    try:
        yield
    except InputError as error:
        name = f"{InputError.__module__}.{InputError.__qualname__}: "
        if name not in str(error):
            raise
        message = str(error).rpartition(name)[2]
        raise InputError(message.rstrip()) from error


@contextmanager
def refused_objects_named(num_workers: int) -> Iterator[None]:
    """Raise InputError if an object of the user's cannot be sent to loader processes."""
    try:
        with warnings.catch_warnings():
            # PyTorch warns before it raises the error.
            warnings.filterwarnings("ignore", "Got pickle error")
            yield
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        if "pickle" not in str(error):
            raise
        raise InputError(
            f"data.num_workers={num_workers}: the dataset or the augmentation cannot be sent to "
            f"loader processes ({printable(str(error))}); data.num_workers=0 loads in this process"
        ) from error


def check_processes_find(dataset: Any, num_workers: int) -> None:
    """Raise InputError if a dataset uses classes of a notebook, which loader processes cannot find.

    A loader process imports what it needs, and a notebook cannot be imported.
    """
    if os.path.isfile(getattr(sys.modules["__main__"], "__file__", "")):
        return
    try:
        NotebookSearch(num_workers).dump(dataset)
    except InputError:
        raise
    except Exception:  # what cannot be sent at all is named when the processes start
        return


class NotebookSearch(pickle.Pickler):
    """Raise InputError for a class or function that was defined in a notebook; write nothing."""

    def __init__(self, num_workers: int) -> None:
        super().__init__(io.BytesIO())
        self.num_workers = num_workers

    def persistent_id(self, value: Any) -> str | None:
        """Look at an object that pickle is about to write; large ones are not written."""
        is_definition = isinstance(value, (type, FunctionType))
        if is_definition and value.__module__ == "__main__":
            raise InputError(
                f"data.num_workers={self.num_workers}: {value.__name__} is defined in a notebook, "
                "where loader processes cannot find it; move it to a module, or load in this "
                "process: data.num_workers=0"
            )
        is_large = isinstance(value, (Tensor, np.ndarray, bytes))
        if is_large:
            return "left out"
        return None
