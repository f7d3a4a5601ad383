"""Run a program of ours in a process that has torch and Lightning imported already.

`run_warm` does what ``python -m MODULE`` does, without the seconds of imports. A process that has
imported the libraries waits; for each program it forks, and the fork becomes the program. Tests of
imports, of start-up times and of variables that Python reads at its start use `run_to_end`.
`start_warm` starts a program in the same way and does not wait for its end.

There is one waiting process, also where xdist starts several test processes. pytest's own process
listens for them with `Listener`, which starts the waiting process when a test first asks for it.
Each test process has a fork of it, which starts its programs.
"""

import atexit
import ctypes
import importlib
import logging
import os
import pkgutil
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from select import select
from socket import AF_UNIX, socket

PR_SET_PDEATHSIG = 1  # linux/prctl.h
ADDRESS = "MOCO_TESTS_WARM_PROCESS"  # the variable that holds the path of the socket

LIBRARIES = (
    "faiss",
    "hydra",
    "pytorch_lightning",
    "rich",
    "sklearn.linear_model",
    "tensorboard",
    "torch",
    "torchmetrics",
    "torchvision",
)


class Listener:
    """Starts the waiting process when it is first needed. That process ends with this one."""

    def __init__(self, environment):
        self.process = None
        self.environment = environment
        self.folder = tempfile.TemporaryDirectory()
        self.socket = socket(AF_UNIX)
        address = f"{self.folder.name}/socket"
        self.socket.bind(address)
        self.socket.listen()
        os.environ[ADDRESS] = address
        # Linux ends the waiting process with the thread that started it, so this thread stays.
        threading.Thread(target=self._start_when_asked, daemon=True).start()

    def _start_when_asked(self):
        select([self.socket], [], [])
        listening = self.socket.fileno()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm_start", str(listening), str(os.getpid())],
            env=self.environment,
            pass_fds=[listening],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.process.wait()

    def end(self):
        """End the waiting process and its forks; they end their programs."""
        os.environ.pop(ADDRESS, None)
        if self.process is not None:
            self.process.kill()
        self.folder.cleanup()


class WarmProcess:
    """This test process's fork of the waiting process. It ends with it, however it ends."""

    def __init__(self):
        client = socket(AF_UNIX)
        client.connect(os.environ[ADDRESS])
        self.connection = Connection(client.detach())

    def run(self, module, arguments, cwd, environment, timeout):
        """Return what `subprocess.run` returns for ``python -m module arguments``."""
        command = [sys.executable, "-m", module, *arguments]
        with tempfile.NamedTemporaryFile() as output, tempfile.NamedTemporaryFile() as errors:
            files = output.name, errors.name
            pid = self.start(module, arguments, cwd, environment, *files, wait=True)
            if not self.connection.poll(timeout):
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
                raise AssertionError(f"{' '.join(command)} still runs after {timeout} s")
            code = self.connection.recv()
            # What the program left behind ends, too.
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            texts = [file.read().decode(errors="replace") for file in (output, errors)]
        return subprocess.CompletedProcess(command, code, *texts)

    def start(self, module, arguments, cwd, environment, output, errors, wait):
        """Return the id of the program's process; with `wait`, its exit code is sent later."""
        self.connection.send((wait, (module, arguments, str(cwd), environment, output, errors)))
        return self.connection.recv()

    def end(self):
        self.connection.close()


_warm = None


def run_warm(module, arguments, cwd, environment, timeout):
    """Run ``python -m module arguments`` to its end.

    Args:
        arguments: of the command line, as text.
        cwd: the folder to run in.
        environment: all variables of the program.
        timeout: seconds after which the test fails.
    """
    warm = warm_process()
    done = None
    try:
        done = warm.run(module, arguments, cwd, environment, timeout)
    finally:
        if done is None:  # its next answer would be about this program
            end_warm_process()
    return done


def start_warm(module, arguments, cwd, environment):
    """Start ``python -m module arguments``, and return the id of its process.

    It ends with this test process at the latest. What it writes is thrown away. Its id stays its
    own, because the waiting process does not ask for its exit code.
    """
    warm = warm_process()
    return warm.start(module, arguments, cwd, environment, os.devnull, os.devnull, wait=False)


def warm_process():
    """Return this test process's fork, which is made when it is first needed."""
    global _warm
    if _warm is None:
        _warm = WarmProcess()
    return _warm


def end_warm_process():
    """End this test process's fork, if there is one."""
    global _warm
    if _warm is not None:
        _warm.end()
        _warm = None


def accept(listener):
    """Fork for each test process that connects; in a fork, return its connection."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks for the exit codes of the forks
    while True:
        accepted, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            die_with_parent()
            return Connection(accepted.detach())
        accepted.close()


def serve(connection):
    """Start programs until the other end closes; in the process of a program, return the program."""
    while True:
        try:
            wait, program = connection.recv()
        except EOFError:
            return None
        pid = os.fork()
        if pid == 0:
            return program
        connection.send(pid)
        if not wait:
            continue
        code = None
        while code is None:
            if connection.poll(0.01):  # nothing else is asked meanwhile: the test process is gone
                return None
            ended, status = os.waitpid(pid, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if ended else None
        connection.send(code)


def become(module, arguments, cwd, environment, output, errors):
    """Turn this process into ``python -m module arguments``."""
    die_with_parent()
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for path, descriptor in ((output, 1), (errors, 2)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    sys.path[0] = cwd
    sys.argv = [module, *arguments]
    code: int | str | None = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 1
    end(code)


def end(code):
    """End this process as Python does, but without taking all imported modules apart.

    That would take two seconds.
    """
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()  # multiprocessing ends its processes there
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def die_with_parent():
    """Ask Linux to kill this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))


def import_libraries():
    """Import what the programs import, but not the programs: runpy runs these as new modules."""
    # Lightning logs to stderr by itself if there is no handler yet; the programs have one by then.
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    for name in LIBRARIES:
        importlib.import_module(name)
    import moco

    for package in pkgutil.iter_modules(moco.__path__, "moco."):
        if package.ispkg:
            folder = importlib.import_module(package.name).__path__
            for module in pkgutil.walk_packages(folder, f"{package.name}."):
                importlib.import_module(module.name)
    logging.getLogger().removeHandler(handler)


def main():
    """Wait for programs to run. In the process of a program: run it, and end as it ends."""
    die_with_parent()
    if os.getppid() != int(sys.argv[2]):
        return
    import_libraries()
    connection = accept(socket(fileno=int(sys.argv[1])))
    program = serve(connection)
    if program is not None:
        connection.close()
        become(*program)


if __name__ == "__main__":
    main()
