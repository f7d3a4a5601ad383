"""Runs that are killed without warning end in the same bits after they are resumed."""

import importlib.util
import json
import os
import signal
import sys
import time

import pytest

from tests.conftest import REPOSITORY
from tests.processes import run_to_end

SCRIPT = REPOSITORY / "scripts" / "crash_test.py"


def script():
    spec = importlib.util.spec_from_file_location("crash_test", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def crash_test(kills, tmp_path):
    done = run_to_end(
        sys.executable, str(SCRIPT), "--kills", str(kills), "--folder", str(tmp_path), timeout=1800
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_writes_a_checkpoint_ends_in_the_same_bits(tmp_path):
    assert crash_test(1, tmp_path)["kills_while_writing"] == 1


@pytest.mark.slow
def test_a_run_of_two_processes_that_is_killed_in_part_or_whole_ends_in_the_same_bits(
    start_program, tmp_path
):
    def start(name):
        return start_program(
            sys.executable,
            "-m",
            "moco.train",
            "+experiment=quickstart",
            "trainer.devices=2",
            "data.batch_size=16",
            "method.queue_size=200",
            "trainer.max_epochs=4",
            "evaluation.baselines=false",
            "evaluation.every_n_epochs=1",
            "checkpoint.every_n_minutes=0.01",
            "trainer.log_every_n_steps=1",
            f"hydra.run.dir={tmp_path / name}",
            cwd=REPOSITORY,
        )

    assert start("whole").wait() == 0
    resumed = 0
    for epoch, victim in ((1, 0), (2, 1), (3, None)):
        program = start("killed")
        program.wait_for_output(f"epoch    {epoch}/4  loss")
        time.sleep(0.5)  # some steps into the next epoch
        if victim is None:
            program.signal_group(signal.SIGKILL)
        else:
            os.kill(program.children("spawn_main")[victim], signal.SIGKILL)
        assert program.wait() == (-signal.SIGKILL if victim is None else 1)
        resumed += program.output().count("going on from")
    program = start("killed")
    assert program.wait() == 0
    resumed += program.output().count("going on from")
    assert resumed == 3
    script().check_ends(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_a_run_that_is_killed_at_five_moments_ends_in_the_same_bits(tmp_path):
    assert crash_test(5, tmp_path)["kills"] == 5
