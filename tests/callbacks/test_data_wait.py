"""When a run warns that it waits for its data."""

import logging
import time

import pytest
import pytorch_lightning as pl

from moco.callbacks.progress import ProgressBar
from moco.callbacks.training_monitor import LossMonitor
from moco.data.loading.workers import cores_of
from moco.data.sources.source import FileImages
from moco.screen import new_console
from moco.training.stopwatches import STEPS, WAITING, epoch_time


def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    assert [cores_of(number) for number in (1, 3, 32)] == [16, 5, 1]


def test_the_first_batch_does_not_count_and_the_warning_comes_once(caplog, monkeypatch):
    monkeypatch.setattr("moco.callbacks.training_monitor.SECONDS", 101.0)
    monitor = LossMonitor({}, 1)
    monitor.first_wait = 30.0
    epoch_time.start()
    epoch_time.total[WAITING] = 30.0
    epoch_time.total[STEPS] = 100.0
    monitor._warn_of_waiting()
    assert not caplog.text
    epoch_time.total[WAITING] += 50.0
    monitor._warn_of_waiting()
    monitor._warn_of_waiting()
    assert caplog.messages == [
        "training waited 33 % of the time for images; see docs/performance.md#waiting-for-data"
    ]


def test_the_share_is_shown_only_where_waiting_costs(monkeypatch):
    monitor = LossMonitor({}, 1)
    bar = ProgressBar({}, new_console(), monitor)
    epoch_time.start()
    epoch_time.total[WAITING] = 40.0
    epoch_time.total[STEPS] = 60.0
    bar.waiting_share = monitor.waiting_share()
    assert bar._fields() == [(5, "data wait 40 %")]
    epoch_time.total[STEPS] = 360.0
    bar.waiting_share = monitor.waiting_share()
    assert bar._fields() == []


class SlowCheckpoint(pl.callbacks.Checkpoint):
    """Lightning calls checkpoints after all other callbacks."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        time.sleep(0.3)


def test_the_time_of_callbacks_is_not_waiting(runner, image_tree):
    config = runner.config(
        "data=images", f"data.root={image_tree}", "data.batch_size=8", "data.num_workers=0"
    )
    monitor = LossMonitor({}, 1)
    runner.fit(config, [SlowCheckpoint(), monitor])
    # Three steps.
    assert epoch_time.so_far(STEPS) > 0.9
    assert epoch_time.so_far(WAITING) < 0.5


def test_making_a_batch_in_the_devices_memory_is_not_waiting(runner):
    figures = {}
    runner.fit(runner.config("trainer.max_steps=2"), [LossMonitor(figures, 1)])
    assert figures["data_wait"] == 0


@pytest.mark.slow
def test_a_run_that_waits_says_so_once(runner, image_tree, caplog, monkeypatch):
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr("moco.callbacks.training_monitor.SECONDS", 0.5)
    opened = FileImages.opened

    def open_slowly(images, index):
        time.sleep(0.05)
        return opened(images, index)

    monkeypatch.setattr(FileImages, "opened", open_slowly)
    config = runner.config(
        "data=images",
        f"data.root={image_tree}",
        "data.batch_size=8",
        "data.num_workers=0",
        "trainer.max_steps=6",
    )
    figures = {}
    runner.fit(config, [LossMonitor(figures, 1)])
    warnings = [message for message in caplog.messages if "of the time for images" in message]
    assert len(warnings) == 1
    assert figures["data_wait"] > 0.2
