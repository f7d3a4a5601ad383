"""One process per device of this machine. Their parent starts, watches and ends them."""

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
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment

from moco.errors import InputError, Interrupted, PeerLost, RunError
from moco.runs.interrupts import StopRequest, held_back
from moco.runs.run_folder import last_good
from moco.training.distributed.collectives import new_rendezvous

log = logging.getLogger(__name__)

GRACE = 20.0
"""Seconds that the other processes get to end by themselves after one has failed."""
POLL_SECONDS = 0.2


@dataclass
class Child:
    """One process of a training."""

    rank: int
    process: BaseProcess
    connection: Connection
    """The child sends the error with which it ended. The parent sends a signal's number."""
    error: BaseException | None = None
    is_cause: bool = True
    """False: it ended because another process did, or because the parent killed it."""


def starts_its_own(environment: ClusterEnvironment, num_devices: int) -> bool:
    """Return whether this program has to start a process per device: no launcher has done so."""
    return isinstance(environment, LightningEnvironment) and num_devices > 1


def run_on_devices(
    work: Callable[..., None],
    arguments: Sequence[Any],
    num_devices: int,
    stop: StopRequest,
    folder: Path,
) -> None:
    """Call ``work(*arguments, stop)`` in one new process per device; return when all have ended.

    Inside, `moco.training.distributed.collectives.process_group` connects them.

    Args:
        work: has to be picklable. Its ``stop`` is the process's own, which also hears of ours.
        arguments: have to be picklable.
        num_devices: the number of processes.
        stop: passed on to every process.
        folder: the run folder, whose newest checkpoint is named when a process is killed.

    Raises:
        InputError, RunError, Interrupted: what the process raised that failed first. If it was
            killed, the message names its rank.
    """
    rendezvous = new_rendezvous()
    children: list[Child] = []
    try:
        for rank in range(num_devices):
            environment = {
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_devices),
                "MOCO_RENDEZVOUS": str(rendezvous),
            }
            children.append(start(partial(work, *arguments), environment, stop))
        supervise(children, stop)
    finally:
        for child in children:
            child.process.kill()  # this does nothing to a process that has ended
            child.process.join()
        rendezvous.unlink(missing_ok=True)
        rendezvous.parent.rmdir()
    error = first_failure(children, folder)
    if error is not None:
        raise error


def start(job: Callable[..., None], environment: dict[str, str], stop: StopRequest) -> Child:
    """Start the process of one rank.

    Args:
        job: what it calls, with its own `StopRequest`.
        environment: its further environment variables.
        stop: of this process.
    """
    context = multiprocessing.get_context("spawn")  # CUDA does not work after a fork
    parents_end, childs_end = context.Pipe()
    rank = environment["LOCAL_RANK"]
    arguments = (job, environment, childs_end, stop.signals)
    process = context.Process(target=_run_child, args=arguments, name=f"rank {rank}")
    with held_back(stop.signals):  # until the child's own StopRequest begins
        process.start()
    childs_end.close()  # only the child holds it now, so that it closes when the child ends
    return Child(int(rank), process, parents_end)


def supervise(children: Sequence[Child], stop: StopRequest) -> None:
    """Wait until every process has ended, or for `GRACE` seconds after the first failure."""
    has_told = False
    deadline = float("inf")
    alive = list(children)
    while alive and time.monotonic() < deadline:
        if stop and not has_told:
            has_told = True
            for child in alive:
                # As if the process itself had received the signal.
                with contextlib.suppress(OSError):  # it is ending already
                    child.connection.send(stop.signal_number)
        events: list[Any] = []
        for child in alive:
            events += [child.process.sentinel, child.connection]
        wait(events, timeout=POLL_SECONDS)
        for child in list(alive):
            read_error(child)
            if child.process.exitcode is None:
                continue
            alive.remove(child)
            read_error(child)  # what it sent between the last reading and its end
            # An interrupted process has a code too: all stop after the same step and the same save.
            if child.process.exitcode != 0:
                deadline = min(deadline, time.monotonic() + GRACE)
    for child in alive:
        child.is_cause = False


def read_error(child: Child) -> None:
    """Keep the error that the process has sent, if there is one."""
    with contextlib.suppress(EOFError, OSError):
        while child.error is None and child.connection.poll():
            child.error = child.connection.recv()
            child.is_cause = not isinstance(child.error, PeerLost)


def first_failure(children: Sequence[Child], folder: Path) -> BaseException | None:
    """Return why the training ended, or None if all processes succeeded.

    A killed process comes first, then an error, then a lost connection, which only follows from the
    others.
    """
    for child in children:
        if child.is_cause and child.error is None and child.process.exitcode:
            code = child.process.exitcode
            how = f"ended with exit code {code}"
            if code < 0:
                how = f"was killed by {signal.Signals(-code).name}"
            return RunError(
                f"rank {child.rank} of {len(children)} (process {child.process.pid}) {how}: by the "
                f"kernel if memory ran out, or from outside; {last_good(folder)}"
            )
    errors = []
    causes = []
    for child in children:
        if child.error is None:
            continue
        errors.append(child.error)
        if not isinstance(child.error, PeerLost):
            causes.append(child.error)
    for kind in (InputError, RunError, Interrupted, BaseException):
        for error in causes or errors:
            if isinstance(error, kind):
                return error
    return None


def _run_child(
    job: Callable[..., None],
    environment: dict[str, str],
    connection: Connection,
    signals: Sequence[int],
) -> None:
    os.environ.update(environment)
    code = 1
    try:
        with StopRequest(signals) as stop:
            threading.Thread(target=_listen, args=(connection, stop), daemon=True).start()
            job(stop)
        code = 0
    except (InputError, RunError, Interrupted) as error:
        connection.send(error)
    except BaseException as error:
        traceback.print_exc()
        rank = environment["LOCAL_RANK"]
        connection.send(RunError(f"rank {rank}: {type(error).__name__}: {error}"))
    sys.stdout.flush()
    sys.stderr.flush()
    # A usual exit would wait for what may hang: a connection to a lost process, a loader's threads.
    os._exit(code)


def _listen(connection: Connection, stop: StopRequest) -> None:
    """Hand the parent's signals to `stop`; end this process when the parent is gone."""
    try:
        while True:
            stop.request(connection.recv())
    except (EOFError, OSError):
        os._exit(1)
