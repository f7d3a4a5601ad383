"""One process per device of this machine: started, watched and ended by their parent, which computes nothing itself."""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment

from moco.errors import InputError, Interrupted, PeerLost, RunError
from moco.runs.interrupts import StopRequest, held_back
from moco.training.distributed.collectives import new_rendezvous

log = logging.getLogger(__name__)

GRACE = 20.0
"""Seconds that the other processes get to end by themselves after one has failed."""


@dataclass
class Child:
    """One process of a training."""

    rank: int
    process: BaseProcess
    connection: Connection
    """It says through this why it ended, if it can; we say through it that it is to stop."""
    error: BaseException | None = None
    is_cause: bool = field(default=True)
    """False: it ended because another one did, or because we ended it."""


def starts_its_own(environment: ClusterEnvironment, num_devices: int) -> bool:
    """Whether the config's devices need more processes than there are: no launcher started them, and we are none of them."""
    return isinstance(environment, LightningEnvironment) and num_devices > 1


def run_on_devices(
    work: Callable[..., None],
    arguments: Sequence[Any],
    num_devices: int,
    stop: StopRequest,
    last_good: Callable[[], str],
) -> None:
    """Call ``work(*arguments, stop)`` in one new process per device; returns when all are done.

    Inside, `moco.training.distributed.collectives.process_group` connects them.

    Args:
        work, arguments: have to be picklable. The ``stop`` that is added is the process's own; it also hears of ours.
        stop: passed on to every process.
        last_good: names the newest checkpoint, for the message when a process is killed.

    Raises:
        InputError, RunError, Interrupted: what the process that failed first has raised; it names the rank if that process
            was killed.
    """
    rendezvous = new_rendezvous()
    children: list[Child] = []
    try:
        for rank in range(num_devices):
            children.append(start(work, arguments, rank, num_devices, str(rendezvous), stop))
        supervise(children, stop)
    finally:
        for child in children:
            child.process.kill()  # nothing, to one that has ended
            child.process.join()
        rendezvous.unlink(missing_ok=True)
        rendezvous.parent.rmdir()
    if error := first_failure(children, last_good):
        raise error


def start(
    work: Callable[..., None],
    arguments: Sequence[Any],
    rank: int,
    num_devices: int,
    rendezvous: str,
    stop: StopRequest,
) -> Child:
    """Start the process of one rank."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    ours, its = context.Pipe()
    process = context.Process(
        target=_run_child,
        args=(work, tuple(arguments), rank, num_devices, rendezvous, its, stop.signals),
        name=f"rank {rank}",
    )
    with held_back(stop.signals):  # until its own StopRequest takes them
        process.start()
    its.close()  # so that the child's end is its alone, and closes with it
    return Child(rank, process, ours)


def supervise(children: Sequence[Child], stop: StopRequest) -> None:
    """Wait until every process has ended; after a failure, for `GRACE` seconds at most."""
    told, deadline = False, float("inf")
    alive = list(children)
    while alive and time.monotonic() < deadline:
        if stop and not told:
            told = True
            for child in alive:
                tell(child, stop.signal_number)
        wait(
            [child.process.sentinel for child in alive] + [child.connection for child in alive],
            timeout=0.2,
        )
        for child in list(alive):
            read_error(child)
            if child.process.exitcode is None:
                continue
            alive.remove(child)
            read_error(child)  # what it said before it ended
            if (
                child.process.exitcode != 0
            ):  # also of an interrupt: all have the same one, and leave after the same save
                deadline = min(deadline, time.monotonic() + GRACE)
    for child in alive:
        child.is_cause = False


def tell(child: Child, signal_number: int | None) -> None:
    """Ask a process to stop as if it had got the signal."""
    with contextlib.suppress(OSError):  # it is ending already
        child.connection.send(signal_number)


def read_error(child: Child) -> None:
    """Take note of what the process has failed with, if it has said so."""
    try:
        while child.error is None and child.connection.poll():
            child.error = child.connection.recv()
            child.is_cause = not isinstance(child.error, PeerLost)
    except (EOFError, OSError):
        pass


def first_failure(children: Sequence[Child], last_good: Callable[[], str]) -> BaseException | None:
    """Why the training ended, or None when all is well: a killed process, else an error, else a lost connection."""
    for child in children:
        code = child.process.exitcode
        if child.is_cause and child.error is None and code:
            how = (
                f"was killed by {signal.Signals(-code).name}"
                if code < 0
                else f"ended with exit code {code}"
            )
            return RunError(
                f"rank {child.rank} of {len(children)} (process {child.process.pid}) {how}: by the kernel if memory ran "
                f"out, or from outside; {last_good()}"
            )
    errors = [child.error for child in children if child.error is not None]
    kinds: list[type | tuple[type, ...]] = [InputError, RunError, Interrupted, BaseException]
    causes = [error for error in errors if not isinstance(error, PeerLost)]
    for kind in kinds:
        for error in causes or errors:
            if isinstance(error, kind):
                return error
    return None


def _run_child(
    work: Callable[..., None],
    arguments: tuple[Any, ...],
    rank: int,
    num_devices: int,
    rendezvous: str,
    connection: Connection,
    signals: Sequence[int],
) -> None:
    os.environ |= {
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_devices),
        "MOCO_RENDEZVOUS": rendezvous,
    }
    code = 1
    try:
        with StopRequest(signals) as stop:
            threading.Thread(target=_listen, args=(connection, stop), daemon=True).start()
            work(*arguments, stop)
        code = 0
    except (InputError, RunError, Interrupted) as error:
        connection.send(error)
    except BaseException as error:
        traceback.print_exc()
        connection.send(RunError(f"rank {rank}: {type(error).__name__}: {error}"))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(
        code
    )  # without waiting for what may hang: a connection to a process that is gone, a loader's threads


def _listen(connection: Connection, stop: StopRequest) -> None:
    """Pass the parent's word on to `stop`; end this process if the parent is gone."""
    try:
        while True:
            stop.request(connection.recv())
    except (EOFError, OSError):
        os._exit(1)
