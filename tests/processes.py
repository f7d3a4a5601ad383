"""Start programs in tests, and end each of them with its test, however the test ends.

A test that needs a running program takes the fixture `start_program`:

    def test_x(start_program, tmp_path):
        program = start_program(sys.executable, "-m", "moco.train", cwd=tmp_path)
        program.wait_for_output("epoch    2/")
        program.send_signal(signal.SIGTERM)
        assert program.wait() == 143, program.errors()

A fixture of a module takes the context manager `started`, with the same arguments. `run_to_end`
starts a program and waits for its end. `on_two` calls a function in two connected processes, which
are started once per session.

As a program, ``python -m tests.processes SOCKET RANK`` is one of these two.
"""

import contextlib
import multiprocessing.connection
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from socket import AF_UNIX, socket

import pytest

PATIENCE = 300.0
"""Seconds that a test waits for an event; only a broken program reaches this limit."""
PATIENCE_FOR_WORK = 1800.0
"""The same for a whole training in two processes."""
PR_SET_PDEATHSIG = 1  # linux/prctl.h

# What the new process does before it becomes the program: it asks Linux to kill it when the tests
# end. It does not use subprocess's preexec_fn, which is not safe while other threads run.
START = f"""
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, {int(signal.SIGKILL)})
if os.getppid() != int(sys.argv[1]):
    sys.exit("the tests have ended")
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
os.execvp(sys.argv[2], sys.argv[2:])
"""


class Program:
    """A program in a process group of its own. Its output goes to files, which never fill up."""

    def __init__(self, command, cwd, environment):
        self.command = [str(part) for part in command]
        self._files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115  (see `end`)
        start = [sys.executable, "-I", "-S", "-c", START, str(os.getpid())]
        self._process = subprocess.Popen(
            [*start, *self.command],
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._files[0],
            stderr=self._files[1],
            start_new_session=True,
        )
        self.pid = self._process.pid

    def output(self):
        """Return what the program has written to stdout so far."""
        return self._read(self._files[0])

    def errors(self):
        """Return what the program has written to stderr so far."""
        return self._read(self._files[1])

    @staticmethod
    def _read(file):
        descriptor = file.fileno()
        size = os.fstat(descriptor).st_size
        return os.pread(descriptor, size, 0).decode(errors="replace")

    def poll(self):
        """Return the exit code, or None while the program runs."""
        return self._process.poll()

    def wait(self, timeout=PATIENCE):
        """Return the exit code when the program has ended."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self} still runs after {timeout} s") from None

    def wait_for(self, condition, what):
        """Return what `condition` returns when this is true; fail if the program ends before."""
        return wait_until(condition, what, program=self)

    def wait_for_output(self, text):
        """Wait until the program has written `text` to stdout."""
        self.wait_for(lambda: text in self.output(), f"'{text}' in the output")

    def send_signal(self, number):
        """Send a signal to the program alone."""
        self._process.send_signal(number)

    def signal_group(self, number):
        """Send a signal to the program and all its processes, as Ctrl-C in a terminal does."""
        os.killpg(self.pid, number)

    def children(self, command=""):
        """Return the ids of the program's child processes whose command line contains `command`."""
        return children_of(self.pid, command)

    def end(self):
        """Kill the whole group and wait until the program is gone."""
        if self._files[0].closed:
            return  # this was called before
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        for file in self._files:
            file.close()

    def __str__(self):
        return (
            f"{' '.join(self.command)}\n--- its output:\n{self.output()}\n"
            f"--- its errors:\n{self.errors()}\n---"
        )


def wait_until(condition, what, timeout=PATIENCE, program=None):
    """Return what `condition` returns as soon as this is true.

    Args:
        what: names the event in the message.
        program: fail at once when this program has ended without the event.
    """
    end = time.monotonic() + timeout
    while True:
        has_ended = program is not None and program.poll() is not None
        found = condition()
        if found:
            return found
        assert not has_ended, f"waited for {what}, but the program has ended: {program}"
        assert time.monotonic() < end, f"waited {timeout} s for {what}: {program or ''}"
        time.sleep(0.02)


def children_of(pid, command=""):
    """Return the ids of a process's children whose command line contains `command`."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    found = []
    for child in children:
        with contextlib.suppress(FileNotFoundError):
            if command in Path(f"/proc/{child}/cmdline").read_text():
                found.append(int(child))
    return found


def program_environment(additional):
    """Return the variables of a program: this process's, one thread, this repository's code."""
    from tests.conftest import REPOSITORY

    ours = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **ours, **additional}


@contextmanager
def started(*command, cwd=None, **environment):
    """Start a program with one thread and this repository's code; kill it at the block's end.

    Args:
        command: the program and its arguments, such as ``sys.executable, "-m", "moco.train"``.
        environment: additional variables.
    """
    program = Program(command, cwd, program_environment(environment))
    try:
        yield program
    finally:
        program.end()


@pytest.fixture
def start_program():
    """Start programs as `started` does; they are killed when the test has ended."""
    with ExitStack() as stack:

        def start(*command, **options):
            return stack.enter_context(started(*command, **options))

        yield start


def run_to_end(*command, cwd=None, timeout=PATIENCE, **environment):
    """Start a program and wait for its end; return what `subprocess.run` returns."""
    with started(*command, cwd=cwd, **environment) as program:
        code = program.wait(timeout)
        return subprocess.CompletedProcess(
            program.command, code, program.output(), program.errors()
        )


class TwoProcesses:
    """Two processes that wait for work. They end with this process, however it ends."""

    def __init__(self):
        from tests.conftest import REPOSITORY
        from tests.warm_start import start_warm

        environment = program_environment({})
        self.pids = []
        self.connections = []
        with tempfile.TemporaryDirectory() as folder, socket(AF_UNIX) as listener:
            address = f"{folder}/socket"
            listener.bind(address)
            listener.listen()
            listener.settimeout(PATIENCE)
            for rank in range(2):
                arguments = [address, str(rank)]
                self.pids.append(start_warm("tests.processes", arguments, REPOSITORY, environment))
                accepted, _ = listener.accept()
                accepted.setblocking(True)
                self.connections.append(Connection(accepted.detach()))

    def run(self, work, arguments):
        """Call ``work(*arguments)`` in both; return the traceback of the first failure, or None."""
        from moco.training.distributed.collectives import new_rendezvous

        rendezvous = new_rendezvous()
        try:
            return self._run(work, arguments, str(rendezvous))
        finally:
            shutil.rmtree(rendezvous.parent)

    def _run(self, work, arguments, rendezvous):
        for connection in self.connections:
            connection.send((rendezvous, work, arguments))
        waiting = list(self.connections)
        while waiting:
            ready = multiprocessing.connection.wait(waiting, timeout=PATIENCE_FOR_WORK)
            if not ready:
                return f"{work} has not ended after {PATIENCE_FOR_WORK} s"
            for connection in ready:
                waiting.remove(connection)
                failure = _received(connection)
                if failure is not None:
                    return failure
        return None

    def are_alive(self):
        """Whether both wait for work. The connection of one that has ended is ready to be read."""
        return not multiprocessing.connection.wait(self.connections, timeout=0)

    def end(self):
        for pid, connection in zip(self.pids, self.connections, strict=True):
            # The connection of one that has ended can be read, and its id may be another's by now.
            if not connection.poll():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            connection.close()


_two_processes = None


def call_on_two(work, *arguments):
    """Call ``work(*arguments)`` in two processes with the environment of a training's two ranks.

    Arguments have to be picklable. What `work` changes in modules it has to change back: the
    processes are used again.
    """
    global _two_processes
    if _two_processes is not None and not _two_processes.are_alive():
        # What an earlier test left running may have ended one of them.
        _two_processes.end()
        _two_processes = None
    if _two_processes is None:
        _two_processes = TwoProcesses()
    failure = "the test was interrupted"
    try:
        failure = _two_processes.run(work, arguments)
    finally:
        if failure is not None:  # the other process may wait for the one that failed
            _two_processes.end()
            _two_processes = None
    assert failure is None, failure


def on_two(work, *arguments):
    """Call ``work(rank, *arguments)`` in two processes that are connected through gloo."""
    call_on_two(_connected, work, arguments)


def _connected(work, arguments):
    from moco.training.distributed import collectives

    environment = collectives.environment_of(2, 1)
    minutes = PATIENCE / 60
    with (
        collectives.lost_peers_named(),
        collectives.process_group(environment, "gloo", timeout_minutes=minutes),
    ):
        work(collectives.rank(), *arguments)


def _received(connection):
    try:
        return connection.recv()
    except EOFError:
        return "one of the two processes has ended"


def _serve(rank, connection):
    """Do the work that comes through the connection until its other end is closed."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which end this process
    torch.set_num_threads(1)
    while True:
        try:
            rendezvous, work, arguments = connection.recv()
        except EOFError:
            return
        os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MOCO_RENDEZVOUS": rendezvous}
        failure = None
        try:
            torch.manual_seed(0)
            work(*arguments)
        except BaseException:
            failure = f"rank {rank}:\n{traceback.format_exc()}"
        connection.send(failure)


if __name__ == "__main__":
    from tests import processes  # the name under which the work knows this module

    with socket(AF_UNIX) as client:
        client.connect(sys.argv[1])
        processes._serve(int(sys.argv[2]), Connection(client.detach()))
