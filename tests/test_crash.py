"""A run that is killed without warning: the program that does it on a larger scale, with few kills."""

import json
import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY


def crash_test(kills, timeout, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            str(REPOSITORY / "scripts" / "crash_test.py"),
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
def test_a_run_that_is_killed_at_five_moments_ends_in_the_same_bits(tmp_path):
    assert crash_test(5, 600, tmp_path)["kills"] == 5
