"""Run a program of ours in a process that has torch and Lightning imported already.

`run_warm` does what ``python -m MODULE`` does, without the seconds of imports. A process that has
imported the libraries waits; for each program it forks, and the fork becomes the program. Tests of
imports, of start-up times and of variables that Python reads at its start use `run_to_end`.
`start_warm` starts a program in the same way and does not wait for its end.
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
from socket import socketpair

PR_SET_PDEATHSIG = 1  # linux/prctl.h

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


class WarmProcess:
    """The waiting process of this test process. It ends with it, however it ends."""

    def __init__(self, environment):
        ours, its = socketpair()
        command = [sys.executable, "-m", "tests.warm_start", str(its.fileno()), str(os.getpid())]
        self.process = subprocess.Popen(
            command,
            env=environment,
            pass_fds=[its.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        its.close()
        self.connection = Connection(ours.detach())

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
        self.process.kill()
        self.process.wait()


_warm = None


def run_warm(module, arguments, cwd, environment, timeout):
    """Run ``python -m module arguments`` to its end.

    Args:
        arguments: of the command line, as text.
        cwd: the folder to run in.
        environment: all variables of the program.
        timeout: seconds after which the test fails.
    """
    warm = warm_process(environment)
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
    warm = warm_process(environment)
    return warm.start(module, arguments, cwd, environment, os.devnull, os.devnull, wait=False)


def warm_process(environment):
    """Return the waiting process, which is started when it is first needed."""
    global _warm
    if _warm is None:
        _warm = WarmProcess(environment)
    return _warm


def end_warm_process():
    """End the waiting process, if there is one."""
    global _warm
    if _warm is not None:
        _warm.end()
        _warm = None


def serve(connection):
    """Answer requests until the other end closes; in each forked process, return its program."""
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
        _, status = os.waitpid(pid, 0)
        connection.send(os.waitstatus_to_exitcode(status))


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
    connection = Connection(int(sys.argv[1]))
    program = serve(connection)
    if program is not None:
        connection.close()
        become(*program)


if __name__ == "__main__":
    main()
