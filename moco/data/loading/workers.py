"""The loader's processes: how they start, what they leave to the training process, how they end."""

import atexit
import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import pytorch_lightning as pl

CPU = torch.device("cpu")


def device_of(data: "pl.LightningDataModule") -> torch.device:
    """Return the device that a module's batches are for: its Trainer's, or the CPU without a Trainer."""
    return data.trainer.strategy.root_device if data.trainer else CPU


def loader_options(num_workers: int, device: torch.device) -> dict[str, Any]:
    """Return DataLoader's arguments for so many worker processes.

    Args:
        device: what the batches are for. Pinned memory is of use to CUDA alone, and asking for it elsewhere would make a
            machine's idle GPU set up.
    """
    options: dict[str, Any] = {"num_workers": num_workers, "pin_memory": device.type == "cuda"}
    if num_workers == 0:
        return options | {"persistent_workers": False}
    # A fork of a process with threads (torch's, faiss's) can deadlock; the fork server has none.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["moco.data.loading.loaders"])
    # Ctrl-C and SIGTERM reach the whole process group, a scheduler's signals every process of the job; the training process
    # alone decides what happens then. The server and its workers inherit the mask; they leave when that process closes its
    # end or is gone.
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        multiprocessing.resource_tracker.ensure_running()  # it lifts the mask of the first two
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return options | {
        "multiprocessing_context": "forkserver", "persistent_workers": True, "worker_init_fn": leave_with_parent
    }  # fmt: skip


def is_gone(pid: int) -> bool:
    """Whether a process has ended, even if nobody has asked for its exit status yet."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True
    return status.rpartition(")")[2].split()[0] in "ZX"


def end_workers() -> None:
    """Kill loader processes that are still there: they take no SIGTERM, and multiprocessing would wait for them for ever."""
    for child in multiprocessing.active_children():
        if isinstance(child, multiprocessing.context.ForkServerProcess):
            child.kill()


atexit.register(end_workers)


def leave_with_parent(worker: int) -> None:
    """Have this worker end when the training process is gone, whatever ended that.

    PyTorch's own watch asks for the fork server instead, which in turn waits for its workers.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
    # When the training process ends while it fetches a batch, a thread of multiprocessing here would print a traceback.
    show = sys.excepthook
    sys.excepthook = lambda kind, *error: (
        None if issubclass(kind, ConnectionError) else show(kind, *error)
    )
