"""The kNN accuracy while a run trains: its figures, its protocol, and where it has none."""

from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import moco
from moco.callbacks import knn_monitor
from moco.callbacks.collapse_watch import CollapseWatch
from moco.callbacks.feature_plots import FeaturePlots
from moco.callbacks.knn_monitor import KNNMonitor
from moco.callbacks.label_free_monitor import LabelFreeMonitor
from moco.callbacks.training_monitor import TrainingMonitor
from moco.data.sources.source import Labelled
from moco.errors import InputError
from moco.evaluation.reports.embedded import Embedded
from moco.training.board_layout import tag_of
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
    dataset = Labelled([np.asarray(image.convert("RGB")) for image in images], labels)
    features = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    side = Embedded(features, labels, dataset, np.arange(12))
    monitor = monitor_of({}, plots=FeaturePlots(every_n_epochs, 0))
    monitor._show(trainer, 5, side, side)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    plots = ["1_main/7_knn/neighbors", "1_main/8_knn/confusion"] if every_n_epochs else []
    assert sorted(events.Tags()["images"]) == plots
    assert events.Tags()["scalars"] == [tag_of("label_free/feature_rank_me")]


class ForeignData(pl.LightningDataModule):
    """Pairs of noisy views, and labelled images made in `setup`; it knows nothing of ours."""

    def setup(self, stage):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(48) % 3
        noise = torch.randn(48, 3, 8, 8, generator=generator)
        self.images = noise + self.labels[:, None, None, None]

    def loader(self, rows):
        return DataLoader(TensorDataset(self.images[rows], self.labels[rows]), batch_size=7)

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.images, self.images), batch_size=8)

    def bank_dataloader(self):
        return self.loader(slice(0, 32))

    def query_dataloader(self):
        return self.loader(slice(32, 48))


def foreign_trainer(folder, *callbacks, **options):
    return pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        log_every_n_steps=1,
        **options,
    )


def small_method():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.feature_dim = 8
    return moco.MoCo(net, embedding_dim=4, queue_size=32)


@pytest.mark.parametrize("as_arguments", [True, False])
def test_on_a_foreign_data_module_it_gives_the_number_of_knn_accuracy(as_arguments, tmp_path):
    data, method, sides = ForeignData(), small_method(), {}
    if as_arguments:
        data.setup("fit")
        sides = {"bank": data.bank_dataloader(), "queries": data.query_dataloader()}
        data = DataLoader(TensorDataset(data.images, data.images), batch_size=8)
    monitor = moco.KNNMonitor(num_neighbors=5, **sides)
    best = pl.callbacks.ModelCheckpoint(tmp_path, monitor="knn/top1", mode="max")
    others = [CollapseWatch(), LabelFreeMonitor(2)]
    trainer = foreign_trainer(tmp_path, monitor, best, *others, logger=False)
    trainer.fit(method, data)
    same = ForeignData()
    same.setup("fit")
    labels = same.labels.numpy()
    with torch.no_grad():
        features = method.query_encoder.eval().encode(same.images).numpy()
    expected = moco.knn_accuracy(features[:32], labels[:32], features[32:], labels[32:], 5, 0.1)
    assert monitor.figures["knn/top1"] == expected.top1
    assert monitor.figures["knn/top5"] == expected.top5
    assert monitor.figures["knn/bank_size"] == 32
    assert best.best_model_score >= trainer.callback_metrics["knn/top1"]
    assert trainer.callback_metrics["knn/top1"] == pytest.approx(expected.top1)


def test_what_is_wrong_with_foreign_data_is_one_line(tmp_path):
    class WithoutSides(pl.LightningDataModule):
        train_dataloader = ForeignData.train_dataloader
        setup = ForeignData.setup

    trainer = foreign_trainer(tmp_path, moco.KNNMonitor(), logger=False, enable_checkpointing=False)
    with pytest.raises(InputError, match="WithoutSides lacks bank_dataloader"):
        trainer.fit(small_method(), WithoutSides())
    with pytest.raises(InputError, match="both bank and queries, or neither"):
        moco.KNNMonitor(bank=[])
    for batches, message in (
        ([{"image": 1}], r"yield a dict; expected batches \(images, labels\)"),
        ([(torch.zeros(2, 3, 4, 4), [1])], r"expected images \(N, 3, H, W\) and labels \(N,\)"),
    ):
        with pytest.raises(InputError, match=message):
            list(knn_monitor.plain_batches(batches))
