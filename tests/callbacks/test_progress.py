"""The numbers of the progress bar, and the lines that it prints."""

import io
import math
import time
from types import SimpleNamespace

import pytest

from moco.callbacks.progress import ProgressBar
from moco.callbacks.training_monitor import LossMonitor
from moco.screen import new_console


@pytest.fixture
def bar(monkeypatch):
    """A bar, its training of 4 steps an epoch, and what it prints."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(LossMonitor, "speed", lambda self: {"images_per_second": 407.4})
    losses = LossMonitor({}, 10)
    monkeypatch.setattr(losses, "read_losses", lambda: setattr(losses, "recent_loss", 1.7249))
    figures = {}
    made = ProgressBar(figures, new_console(file=io.StringIO()), losses, ("knn/top1", "kNN"))
    made.trainer = SimpleNamespace(
        num_training_batches=8, accumulate_grad_batches=2, current_epoch=0, global_step=0
    )
    made.now = now
    return made


def start(bar, num_steps):
    bar.on_train_start(bar.trainer, SimpleNamespace(num_steps=num_steps))


def step(bar, batch_idx, seconds):
    """Two batches, which are a step, and the time that they take."""
    bar.now[0] += seconds
    bar.trainer.global_step += 1
    bar.on_train_batch_end(bar.trainer, None, None, None, batch_idx)


def texts(bar):
    return [text for _, text in bar._fields()]


def test_steps_of_the_epoch_loss_speed_and_time_left(bar):
    start(bar, 12)
    assert (bar.epoch, bar.num_epochs, bar.done, bar.total) == (1, 3, 0, 4)
    step(bar, 1, 30.0)  # the first step also starts everything
    assert bar.done == 1
    assert math.isnan(bar.seconds_left)
    step(bar, 3, 2.0)
    step(bar, 5, 2.0)
    assert (bar.done, bar.seconds_left) == (3, 18.0)
    bar.figures["knn/top1"] = 0.4049
    bar._read_loss()
    assert texts(bar) == ["loss 1.72", "407 img/s", "ETA 0:18", "kNN 40.5 %"]


def test_a_resumed_run_goes_on_where_it_was_and_times_its_own_steps(bar):
    bar.trainer.current_epoch, bar.trainer.global_step = 1, 6
    start(bar, 12)
    assert (bar.epoch, bar.done, bar.total) == (2, 2, 4)
    bar.on_train_epoch_start(bar.trainer, None)
    assert bar.done == 2
    step(bar, 5, 9.0)
    step(bar, 7, 3.0)
    assert (bar.done, bar.seconds_left) == (4, 12.0)
    bar.trainer.current_epoch = 2
    bar.on_train_epoch_start(bar.trainer, None)
    assert (bar.epoch, bar.done, bar.total) == (3, 0, 4)


def test_max_steps_ends_the_last_epoch_early(bar):
    bar.trainer.current_epoch, bar.trainer.global_step = 2, 8
    start(bar, 10)
    assert (bar.epoch, bar.num_epochs, bar.done, bar.total) == (3, 3, 0, 2)


def test_in_a_pipe_lines_come_ever_more_rarely(bar):
    bar.trainer.num_training_batches = 8000
    start(bar, 12_000)
    for number in range(200):
        step(bar, 2 * number + 1, 1.0)
    lines = bar.console.file.getvalue().splitlines()
    assert lines[0] == "epoch    1/3  step 11/4000  loss 1.72  407 img/s  ETA 3 h 19 m"
    assert len(lines) == 5  # after about 10, 30, 70, 130 and 190 seconds


def test_the_line_of_an_epoch_says_when_waiting_for_data_costs(bar, monkeypatch):
    start(bar, 12)
    bar.figures |= {"train/loss": 1.72341, "images_per_second": 1234.5, "knn/top1": 0.40491}
    bar.figures |= {"knn/epoch": 1, "data_wait": 0.19}
    bar.on_train_epoch_end(bar.trainer, None)
    bar.figures |= {"data_wait": 0.256, "knn/epoch": 0}
    monkeypatch.setattr(bar.losses, "waiting_share", lambda: 0.21)
    bar.on_train_epoch_end(bar.trainer, None)
    assert bar.console.file.getvalue().splitlines() == [
        "epoch    1/3  loss 1.7234  1,234 img/s  kNN 40.49 %",
        "epoch    1/3  loss 1.7234  1,234 img/s  data wait 26 %",
    ]


def test_the_loss_is_read_only_now_and_then(bar, monkeypatch):
    readings = []
    monkeypatch.setattr(bar, "_read_loss", lambda: readings.append(bar.now[0]))
    monkeypatch.setattr("moco.callbacks.progress.screen", SimpleNamespace(moves=True, add=print))
    bar.console.quiet = True
    bar.trainer.num_training_batches = 8000
    start(bar, 12_000)
    for number in range(100):
        step(bar, 2 * number + 1, 0.1)
    assert len(readings) <= 6
