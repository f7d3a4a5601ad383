"""The tests' own helper: nothing that a test starts outlives it."""

import os
import signal
import sys

import pytest

from tests.conftest import REPOSITORY
from tests.processes import on_two, run_to_end, started, wait_until

SLEEP = "import time; print('ready', flush=True); time.sleep(1000)"
# A program that starts another one, says its process id, and waits.
FAMILY = (
    "import subprocess, time; child = subprocess.Popen(['sleep', '1000'])\n"
    "print('child', child.pid, flush=True); time.sleep(1000)"
)
# Tests that start a program, say its process id, and wait.
TESTS = (
    "import sys, time; from tests.processes import started\n"
    f"with started(sys.executable, '-c', {SLEEP!r}) as program:\n"
    "    print('child', program.pid, flush=True); time.sleep(1000)"
)


def exists(pid):
    """Whether a process runs; one that has ended and that nobody has waited for counts as ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def child_in(program):
    program.wait_for(lambda: "child" in program.output() and "\n" in program.output(), "a child")
    return int(program.output().split()[1])


def test_a_failed_test_leaves_neither_its_program_nor_what_that_started():
    pids = []

    def fail():
        with started(sys.executable, "-c", FAMILY) as program:
            pids.extend([program.pid, child_in(program)])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    for pid in pids:
        wait_until(lambda pid=pid: not exists(pid), "the end of both")


def test_a_program_whose_leader_has_ended_leaves_nothing_behind(start_program):
    program = start_program(sys.executable, "-c", FAMILY)
    child = child_in(program)
    program.send_signal(signal.SIGKILL)
    assert program.wait() == -signal.SIGKILL
    program.end()
    wait_until(lambda: not exists(child), "the end of what it started")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a child")
def test_a_killed_suite_leaves_no_program_behind(start_program):
    suite = start_program(sys.executable, "-c", TESTS, cwd=REPOSITORY)
    child = child_in(suite)
    suite.send_signal(signal.SIGKILL)
    suite.wait()
    wait_until(lambda: not exists(child), "the end of what the suite started")


def test_a_program_that_ends_too_early_fails_the_wait_at_once_and_is_quoted(start_program):
    program = start_program(sys.executable, "-c", "import sys; sys.exit('a mistake')")
    with pytest.raises(AssertionError, match=r"has ended(.|\n)*a mistake"):
        program.wait_for_output("ready")


def test_a_program_that_ran_to_its_end():
    done = run_to_end(sys.executable, "-c", "import os; print(os.environ['A']); exit(3)", A="b")
    assert (done.returncode, done.stdout, done.stderr) == (3, "b\n", "")


def say_process(rank, folder):
    (folder / f"{os.getpid()} {rank}").touch()


def fail_on_one(rank):
    assert rank == 0, "a failure"


@pytest.mark.slow
def test_two_processes_are_used_again_until_one_has_failed(tmp_path):
    on_two(say_process, tmp_path)
    on_two(say_process, tmp_path)
    assert sorted(name.split()[1] for name in os.listdir(tmp_path)) == ["0", "1"]
    with pytest.raises(AssertionError, match=r"rank 1:(.|\n)*a failure"):
        on_two(fail_on_one)
    on_two(say_process, tmp_path)
    assert sorted(name.split()[1] for name in os.listdir(tmp_path)) == ["0", "0", "1", "1"]
