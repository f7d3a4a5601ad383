"""When a run says that it waits for its data, and what it advises."""

import logging
import time
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from rich.console import Console

from moco.callbacks.data_wait import DataWait
from moco.callbacks.monitors import LossMonitor
from moco.cli.progress import ProgressBar
from moco.data.loading.streams import Streams
from moco.data.loading.waiting import cores_of, remedies, workers_that_suffice
from moco.data.sources.packed import PIXELS, PackedImages
from moco.data.sources.registry import FileImages
from moco.segmentation.segmentation_data import SegmentationData
from tests.data.loading.test_datamodule import data_for, numbered  # noqa: F401  (a fixture)

FILES = FileImages(["a.jpg"])
MORE_CORES = ["more than the 4 cores that this process may use, or an augmentation with less to do"]
COPY = (
    "a smaller, packed copy (python -m moco.pack with this run's data settings, data.resize=256 and output=DIR; then "
    "data=packed data.root=DIR)"
)


def packed(*files):
    return PackedImages("/fast/copy", list(files), {}, None, 10**6)


def streams(num_shards, num_streams, world_size=1):
    return Streams(["x.tar"] * num_shards, num_streams, 500, 10**6, 0, 0, world_size)


def advice(images=FILES, share=0.5, **changes):
    options = {
        "num_workers": 2,
        "num_cores": 4,
        "image_size": 224,
        "engine": "batch",
        "has_gpu": True,
    } | changes
    return remedies(images, share, **options)


def test_idle_cores_are_advised_first_and_as_many_as_the_share_asks_for():
    assert advice(num_cores=64) == [
        "data.num_workers=4 (2 now; this process may use 64 cores)",
        COPY,
    ]
    assert advice(num_cores=64, share=0.9)[0].startswith("data.num_workers=20 ")
    assert advice(num_cores=8, share=0.9)[0].startswith("data.num_workers=8 ")
    assert advice(num_cores=2) == [COPY]


def test_without_loader_processes_they_are_the_advice():
    assert advice(num_workers=0, share=0.3)[0].startswith("data.num_workers=1 (0 now")
    assert advice(num_workers=0, share=0.7)[0].startswith("data.num_workers=3 (0 now")
    assert advice(num_workers=0, num_cores=1)[0].startswith("data.num_workers=1 (0 now")
    assert advice(num_workers=0, num_cores=1, has_gpu=False, engine="worker") == [
        COPY
    ]  # the core is busy with training


def test_the_other_engine_is_advised_where_it_takes_work_off_what_is_waited_for():
    engine = "data.engine=batch (the GPU then does the colours and the blur)"
    assert advice(num_workers=4, engine="worker") == [engine, COPY]
    assert advice(num_workers=4, engine="worker", has_gpu=False) == [COPY]
    assert advice(num_workers=4, engine="batch", has_gpu=False)[0].startswith(
        "data.engine=worker (the loader processes"
    )
    assert len(advice(engine="worker")) == 2


def test_a_copy_is_advised_only_where_one_can_be_made_and_helps():
    assert advice(packed(PIXELS), num_workers=4) == MORE_CORES
    (again,) = advice(packed("train-00000.tar"), num_workers=4)
    assert "python -m moco.pack data=packed data.root=/fast/copy format=array output=DIR" in again
    assert advice(None, num_workers=4, streams=streams(100, 12)) == MORE_CORES


@pytest.mark.parametrize(
    ("num_workers", "num_cores", "shards", "expected"),
    [
        (2, 16, streams(100, 12), "data.num_workers=4 "),
        (4, 11, streams(100, 12), "data.num_workers=6 "),
        (12, 64, streams(100, 12), "data.streams=24 data.num_workers=24 "),
        (12, 64, streams(40, 12, world_size=2), "data.streams=20 data.num_workers=20 "),
        (3, 64, streams(3, 3), "more and smaller shards: 3 loader processes are the most"),
    ],
)
def test_loader_processes_of_shards_divide_the_streams(num_workers, num_cores, shards, expected):
    (said,) = advice(None, num_workers=num_workers, num_cores=num_cores, streams=shards)
    assert said.startswith(expected)


@pytest.mark.parametrize("num_workers", [0, 1, 4])
@pytest.mark.parametrize("ratio", [1.5, 3.0, 7.9])
def test_so_many_processes_keep_up_by_a_count_of_the_time(num_workers, ratio):
    """A batch takes `ratio` of a step to load; without processes it is loaded between the steps."""
    period = max(1.0, ratio / num_workers) if num_workers else 1 + ratio
    number = workers_that_suffice(num_workers, 1 - 1 / period)
    if period > 1:
        assert ratio / number <= 1 < ratio / (number - 1)


def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    assert [cores_of(number) for number in (1, 3, 32)] == [16, 5, 1]


def trainer_of(data):
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(datamodule=data, num_devices=1, strategy=strategy)


def test_the_first_step_does_not_count_and_one_warning_is_enough(caplog):
    asked = []
    trainer = trainer_of(
        SimpleNamespace(remedies_for_waiting=lambda share, *_: asked.append(share) or ["A", "B"])
    )
    wait = DataWait()
    wait.add(30.0, 31.0)
    for _ in range(20):
        wait.add(0.1, 1.0)
        wait.check(trainer, 0.0)
    assert not caplog.text
    for _ in range(10):
        wait.add(0.6, 1.0)
    wait.check(trainer, 31.0)
    assert not caplog.text
    for _ in range(2):
        wait.check(trainer, 30.0)
    assert [record.getMessage() for record in caplog.records] == [
        "27 % of the time goes into waiting for data; what would help: A, or B"
    ]
    assert asked == [pytest.approx(8 / 30)]


def test_crops_with_masks_have_loader_processes_alone():
    data = SimpleNamespace(source=SimpleNamespace(train=None), num_workers=2, image_size=224)
    (said,) = SegmentationData.remedies_for_waiting(data, 0.5, 8, True)
    assert said == "data.num_workers=4 (2 now; this process may use 8 cores)"


def test_images_in_the_devices_memory_are_not_waited_for(numbered, caplog):  # noqa: F811
    data = data_for(numbered, engine="batch")
    assert data.remedies_for_waiting(0.9, 4, True) == []
    wait = DataWait()
    for _ in range(2):
        wait.add(1.0, 1.0)
    wait.check(trainer_of(data), 0.0)
    assert not caplog.text


def test_the_progress_bar_shows_the_share():
    bar = ProgressBar({"images_per_second": 1234.5, "data_wait": 0.256}, Console())
    assert bar._status() == "1,234 images/s, data wait 26%"


class SlowCheckpoint(pl.callbacks.Checkpoint):  # Lightning calls checkpoints last
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        time.sleep(0.3)


def test_the_time_of_callbacks_is_not_waiting(runner, image_tree):
    figures = {}
    config = runner.config(
        "data=images", f"data.root={image_tree}", "data.batch_size=8", "data.num_workers=0"
    )
    monitor = LossMonitor(figures, 1)
    runner.fit(config, [SlowCheckpoint(), monitor])
    assert monitor.data_wait.seconds > 0.6  # of two steps, the first left out
    assert monitor.data_wait.waited < monitor.data_wait.seconds - 0.6


def test_making_a_batch_in_the_devices_memory_is_not_waiting(runner):
    figures = {}
    runner.fit(runner.config("trainer.max_steps=2"), [LossMonitor(figures, 1)])
    assert figures["data_wait"] == 0


def test_a_run_that_waits_says_so_once_with_what_to_change(runner, image_tree, caplog, monkeypatch):
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr("moco.callbacks.monitors.SECONDS", 0.5)
    opened = FileImages.opened
    monkeypatch.setattr(
        FileImages, "opened", lambda self, index: time.sleep(0.05) or opened(self, index)
    )
    config = runner.config(
        "data=images",
        f"data.root={image_tree}",
        "data.batch_size=8",
        "data.num_workers=0",
        "trainer.max_steps=6",
    )
    figures = {}
    runner.fit(config, [LossMonitor(figures, 1)])
    said = [
        record.getMessage()
        for record in caplog.records
        if "waiting for data" in record.getMessage()
    ]
    assert len(said) == 1
    assert "data.num_workers=" in said[0]
    assert "(0 now; this process may use 16 cores), or a smaller, packed copy" in said[0]
    assert figures["data_wait"] > 0.2
