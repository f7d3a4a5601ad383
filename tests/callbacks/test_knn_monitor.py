"""The kNN accuracy while a run trains: its figures, its protocol, and where it has none."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moco.callbacks import knn_monitor
from moco.callbacks.feature_plots import FeaturePlots
from moco.callbacks.knn_monitor import KNNMonitor
from moco.callbacks.training_monitor import TrainingMonitor
from moco.evaluation.reports.embedded import Embedded
from moco.training.logger import RunLogger

# Images of 8 px: most of the time goes into embedding all 1,797 digits.
ONE_STEP = ["trainer.max_steps=1", "trainer.max_epochs=1", "data.image_size=8"]


def monitor_of(figures, **settings):
    settings = {"num_neighbors": 20, "temperature": 0.1, "feature": "backbone", **settings}
    return KNNMonitor(figures, **settings)


def test_knn_and_its_protocol_are_reported_with_baselines(runner):
    figures = {}
    runner.fit(runner.config(*ONE_STEP), [monitor_of(figures, baselines=True)])
    assert 0.8 < figures["knn/top1"] <= figures["knn/top5"] <= 1.0
    assert figures["knn_raw_pixels/top1"] > 0.95
    assert 0.5 < figures["knn_untrained/top1"] < 1.0
    protocol = {
        "knn/num_neighbors": 20,
        "knn/temperature": 0.1,
        "knn/feature": "backbone",
        "knn/precision": "32-true",
        "knn/bank_size": 1437,
        "knn/num_queries": 360,
        "knn/epoch": 1,
    }
    assert {name: figures[name] for name in protocol} == protocol


def test_fewer_than_five_neighbours_leave_top5_out_of_figures_and_tensorboard(runner):
    logged = []

    class Monitor(KNNMonitor):
        def measure(self, trainer, pl_module, epoch):
            logger = SimpleNamespace(log_metrics=lambda figures, step: logged.append(figures))
            stand_in = SimpleNamespace(
                loggers=[logger], global_step=trainer.global_step, datamodule=trainer.datamodule
            )
            super().measure(stand_in, pl_module, epoch)

        def _show(self, trainer, epoch, bank, queries):
            pass

    for num_neighbors in (4, 5):
        # An earlier part of the run has left a top-5.
        figures = {"knn/top5": 0.5}
        monitor = Monitor(figures, num_neighbors=num_neighbors, temperature=0.1, feature="backbone")
        runner.fit(runner.config(*ONE_STEP), [monitor])
        has_top5 = num_neighbors == 5
        assert ("knn/top5" in figures) == ("knn/top5" in logged[-1]) == has_top5
        assert figures["knn/top1"] == logged[-1]["knn/top1"]


def test_a_gpu_that_is_full_leaves_the_search_to_the_cpu(runner, monkeypatch):
    devices, figures = [], {}
    search_on = knn_monitor.knn_accuracy

    def search(*arguments):
        devices.append(arguments[-1])
        if len(devices) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 128 MiB.")
        return search_on(*arguments)

    monkeypatch.setattr(knn_monitor, "knn_accuracy", search)
    runner.fit(runner.config(*ONE_STEP), [monitor_of(figures)])
    # First on the training's device, which is a CPU here.
    assert devices == [torch.device("cpu"), "cpu"]
    assert figures["knn/top1"] > 0.8


def test_without_labels_it_says_once_that_there_is_no_knn(runner, image_tree, caplog):
    caplog.set_level("INFO")
    figures = {}
    config = runner.config(
        "data=images", f"data.root={image_tree}", "data.batch_size=8", "data.num_workers=0"
    )
    runner.fit(config, [TrainingMonitor(figures, 1), monitor_of(figures, baselines=True)])
    assert caplog.text.count("no kNN: the dataset has no labelled") == 1
    assert not [key for key in figures if key.startswith("knn")]
    assert figures["train/loss"] >= 0


@pytest.mark.parametrize("every_n_epochs", [None, 1])
def test_plots_go_to_tensorboard_at_the_end(tmp_path, every_n_epochs):
    logger = RunLogger(tmp_path)
    trainer = SimpleNamespace(
        logger=logger, loggers=[logger], global_step=3, max_epochs=5, max_steps=-1
    )
    labels = np.arange(12) % 3
    images = [Image.new("L", (8, 8), 100)] * 12
    dataset = SimpleNamespace(images=images)
    features = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    side = Embedded(features, labels, dataset, np.arange(12))
    monitor = monitor_of({}, plots=FeaturePlots(every_n_epochs, 0))
    monitor._show(trainer, 5, side, side)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    plots = ["knn/neighbors", "knn/confusion"] if every_n_epochs else []
    assert sorted(events.Tags()["images"]) == sorted(plots)
    assert events.Tags()["scalars"] == ["label_free/feature_rank_me"]
