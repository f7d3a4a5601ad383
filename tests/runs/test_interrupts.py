"""Ctrl-C and termination of the real programs: a checkpoint, the signal's exit code, and the same bits in the end."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.test_train import SMALL, train


def start(folder, *arguments, cwd):
    return subprocess.Popen(
        [sys.executable, "-m", "moco.train", *SMALL, f"hydra.run.dir={folder}", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def interrupt_after(process, line, seconds, number):
    """Send a signal to the whole process group, as a terminal's Ctrl-C does, some time after a line of output."""
    for text in process.stdout:
        if text.startswith(line):
            break
    time.sleep(seconds)
    os.killpg(process.pid, number)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


TO_RESUME = ["trainer.max_epochs=4", "trainer.accumulate_grad_batches=2"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, engine):
    """The last checkpoint of a run that nobody interrupted."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    whole = train("whole", "data.num_workers=0", f"data.engine={engine}", *TO_RESUME, cwd=cwd)
    assert whole.returncode == 0, whole.stderr
    return torch.load(cwd / "whole" / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize(("engine", "num_workers"), [("batch", 0), ("worker", 2)], scope="module")
def test_an_interrupted_and_resumed_run_ends_in_the_same_bits(
    engine, num_workers, undisturbed, tmp_path
):
    arguments = [f"data.num_workers={num_workers}", f"data.engine={engine}", *TO_RESUME]
    code, stderr = interrupt_after(
        start("parts", *arguments, cwd=tmp_path), "epoch    2/4", 0.4, signal.SIGINT
    )
    assert code == 130, stderr
    assert stderr.startswith("interrupted: in epoch ")
    assert "saved " in stderr
    step = torch.load(tmp_path / "parts" / "checkpoints" / "last.ckpt", weights_only=True)[
        "global_step"
    ]
    assert 44 <= step < 4 * 22
    resumed = train("parts", *arguments, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    ends = [
        undisturbed,
        torch.load(tmp_path / "parts" / "checkpoints" / "last.ckpt", weights_only=True),
    ]
    assert ends[0]["global_step"] == ends[1]["global_step"] == 88
    for name, value in ends[0]["state_dict"].items():
        assert torch.equal(value, ends[1]["state_dict"][name]), name
    for parameter, state in ends[0]["optimizer_states"][0]["state"].items():
        assert torch.equal(
            state["momentum_buffer"],
            ends[1]["optimizer_states"][0]["state"][parameter]["momentum_buffer"],
        )
    assert torch.equal(ends[0]["random_states"][0]["torch"], ends[1]["random_states"][0]["torch"])
    for key in ("knn/top1", "train/loss"):
        assert ends[0]["figures"][key] == ends[1]["figures"][key]


def test_termination_of_the_whole_group_saves_too_and_keeps_the_signals_code(tmp_path):
    arguments = ["data.engine=worker", "data.num_workers=2", "trainer.accumulate_grad_batches=4"]
    code, stderr = interrupt_after(
        start("run", *arguments, cwd=tmp_path), "epoch    1/60", 0.2, signal.SIGTERM
    )
    assert code == 128 + signal.SIGTERM, stderr
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
