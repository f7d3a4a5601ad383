"""The loader's processes: how they start, which signals they ignore, and how they end."""

import atexit
import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
from types import TracebackType
from typing import Any

import torch

CPU = torch.device("cpu")


def device_of(data: Any) -> torch.device:
    """Return the device of a data module's batches: its Trainer's, or the CPU without a Trainer."""
    return data.trainer.strategy.root_device if data.trainer else CPU


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
    options: dict[str, Any] = {
        "num_workers": num_workers,
        "pin_memory": device.type == "cuda",
        "persistent_workers": num_workers > 0,
    }
    if num_workers == 0:
        return options
    start_fork_server()
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


def show_unless_disconnected(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Print an uncaught error, except that a connection was closed."""
    if not issubclass(kind, ConnectionError):
        sys.__excepthook__(kind, error, traceback)
