"""Ctrl-C and termination of the real program: a checkpoint, an exit code, the same bits."""

import shlex
import signal
import sys

import pytest
import torch

from moco.train import run
from tests.processes import started

EPOCH = 5  # optimizer steps, of 240 of the 1,437 digits
SETTINGS = [
    "method.queue_size=500",
    "data.batch_size=240",
    "trainer.max_epochs=60",
    "trainer.max_steps=-1",
    "evaluation.every_n_epochs=60",
    "evaluation.baselines=false",
    "checkpoint.every_n_epochs=100",
    "trainer.precision=32-true",
    "optimizer.schedule=constant",
]


def start_training(folder, *arguments, cwd):
    """Start the program; the ``with`` block ends it."""
    command = [sys.executable, "-m", "moco.train", "+experiment=quickstart", *SETTINGS]
    return started(*command, f"hydra.run.dir={folder}", *arguments, cwd=cwd)


def last(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def interrupt_group(folder, arguments, number, tmp_path):
    """Send a signal to the program and all its processes in the middle of an epoch, as Ctrl-C does.

    Returns:
        The exit code, the errors' text and the last line of the output.
    """
    with start_training(folder, *arguments, cwd=tmp_path) as program:
        program.wait_for_output("epoch    2/")
        program.signal_group(number)
        code = program.wait()
        return code, program.errors(), program.output().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "num_workers", "number"),
    [
        ("worker", 2, signal.SIGINT),
        pytest.param("batch", 0, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("worker", 2, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_and_resumed_run_ends_in_the_same_bits(
    engine, num_workers, number, runner, tmp_path
):
    arguments = [
        f"data.num_workers={num_workers}",
        f"data.engine={engine}",
        "trainer.accumulate_grad_batches=2",
    ]
    code, errors, last_line = interrupt_group("parts", arguments, number, tmp_path)
    assert code == 128 + number, errors
    assert errors.startswith("interrupted: in epoch ")
    assert "saved " in errors
    # The whole command, so that no setting is forgotten.
    assert last_line.startswith("next: python -m moco.train +experiment=quickstart ")
    assert set(map(shlex.quote, [*SETTINGS, *arguments, "hydra.run.dir=parts"])) < set(
        last_line.split()
    )
    epochs = last(tmp_path / "parts")["global_step"] // EPOCH + 2  # the program had two fewer
    length = f"trainer.max_epochs={epochs}"
    config = runner.config(*SETTINGS, *arguments, length)
    run(config, tmp_path / "parts")
    run(config, tmp_path / "whole")
    ends = [last(tmp_path / "whole"), last(tmp_path / "parts")]
    assert ends[0]["global_step"] == ends[1]["global_step"] == EPOCH * epochs
    for name, value in ends[0]["state_dict"].items():
        assert torch.equal(value, ends[1]["state_dict"][name]), name
    states = [end["optimizer_states"][0]["state"] for end in ends]
    for parameter, state in states[0].items():
        other = states[1][parameter]
        assert torch.equal(state["momentum_buffer"], other["momentum_buffer"])
    random_states = [end["random_states"][0]["torch"] for end in ends]
    assert torch.equal(*random_states)
    for key in ("knn/top1", "train/loss"):
        assert ends[0]["figures"][key] == ends[1]["figures"][key]
