"""When a run warns that it waits for its data."""

import logging
import time

import pytorch_lightning as pl
from rich.console import Console

from moco.callbacks.data_wait import DataWait
from moco.callbacks.progress import ProgressBar
from moco.callbacks.training_monitor import LossMonitor
from moco.data.loading.workers import cores_of
from moco.data.sources.source import FileImages


def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    assert [cores_of(number) for number in (1, 3, 32)] == [16, 5, 1]


def test_the_first_step_does_not_count_and_the_warning_comes_once(caplog):
    wait = DataWait()
    wait.add(30.0, 31.0)
    for _ in range(20):
        wait.add(0.1, 1.0)
        wait.check(0.0)
    assert not caplog.text
    for _ in range(10):
        wait.add(0.6, 1.0)
    wait.check(31.0)
    assert not caplog.text
    wait.check(30.0)
    wait.check(30.0)
    assert caplog.messages == [
        "training waited 27 % of the time for images; see docs/performance.md#waiting-for-data"
    ]


def test_the_progress_bar_shows_the_share():
    bar = ProgressBar({"images_per_second": 1234.5, "data_wait": 0.256}, Console())
    assert bar._status() == "1,234 images/s, data wait 26%"


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
    # Two steps, because the first one does not count.
    assert monitor.data_wait.seconds > 0.6
    assert monitor.data_wait.waited < monitor.data_wait.seconds - 0.6


def test_making_a_batch_in_the_devices_memory_is_not_waiting(runner):
    figures = {}
    runner.fit(runner.config("trainer.max_steps=2"), [LossMonitor(figures, 1)])
    assert figures["data_wait"] == 0


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
