"""A run that is killed without warning: the program that does it on a larger scale, with few kills."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "crash_test.py"


def script():
    spec = importlib.util.spec_from_file_location("crash_test", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def crash_test(kills, timeout, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            str(SCRIPT),
            "--kills",
            str(kills),
            "--folder",
            str(tmp_path),
        ],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_run_that_is_killed_while_it_writes_a_checkpoint_ends_in_the_same_bits(tmp_path):
    assert crash_test(1, 300, tmp_path)["kills_while_writing"] == 1


@pytest.mark.slow
def test_a_run_of_two_processes_that_is_killed_in_part_or_whole_ends_in_the_same_bits(tmp_path):
    from tests.training.test_distributed import children_of

    def start(name):
        with (tmp_path / f"{name}.log").open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "moco.train", "+experiment=quickstart", "trainer.devices=2", "data.batch_size=16",
                 "method.queue_size=200", "trainer.max_epochs=4", "evaluation.baselines=false", "evaluation.every_n_epochs=1",
                 "checkpoint.every_n_minutes=0.01", "trainer.log_every_n_steps=1", f"hydra.run.dir={tmp_path / name}"],
                cwd=REPOSITORY, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
            )  # fmt: skip

    assert start("whole").wait(timeout=300) == 0
    for epoch, victim in ((1, 0), (2, 1), (3, None)):
        program = start("killed")
        deadline = time.monotonic() + 200
        while f"epoch    {epoch}/4  loss" not in (log := (tmp_path / "killed.log").read_text()):
            assert time.monotonic() < deadline, log
            assert program.poll() is None, log
            time.sleep(0.1)
        time.sleep(0.5)  # some steps into the next epoch
        if victim is None:
            os.killpg(program.pid, signal.SIGKILL)
        else:
            os.kill(children_of(program.pid)[victim], signal.SIGKILL)
        assert program.wait(timeout=60) == (-signal.SIGKILL if victim is None else 1)
    assert start("killed").wait(timeout=300) == 0
    assert (tmp_path / "killed.log").read_text().count("going on from") == 3
    script().check_ends(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_a_run_that_is_killed_at_five_moments_ends_in_the_same_bits(tmp_path):
    assert crash_test(5, 600, tmp_path)["kills"] == 5
