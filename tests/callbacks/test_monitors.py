import math
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

from moco.callbacks import monitors as monitor
from moco.callbacks.monitors import KNNMonitor, TrainingMonitor
from moco.callbacks.view_pairs import view_pair_plot
from moco.cli.build_pretraining import build_data
from moco.evaluation.diagnostics import (
    embedding_std,
    in_batch_negative_similarity,
    negative_similarity,
    positive_similarity,
)
from moco.evaluation.features import EmbeddingStopped, embed, evaluating


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=1)


def test_similarities_equal_the_mean_over_all_pairs():
    query, key, negatives = unit(10, 16), unit(10, 16), unit(50, 16)
    assert float(positive_similarity(query, key)) == pytest.approx(
        float((query @ key.T).diagonal().mean()), abs=1e-6
    )
    assert float(negative_similarity(query, negatives)) == pytest.approx(
        float((query @ negatives.T).mean()), abs=1e-6
    )


def test_a_querys_own_key_is_none_of_its_negatives_in_the_batch():
    query, keys = unit(10, 16), unit(30, 16)  # of three devices; these are the second's
    others = [float(query[i] @ keys[j]) for i in range(10) for j in range(30) if j != 10 + i]
    ours = in_batch_negative_similarity(query, keys[10:20], keys)
    assert float(ours) == pytest.approx(sum(others) / len(others), abs=1e-6)


def test_embedding_std_is_zero_when_collapsed_and_one_over_root_c_when_spread():
    assert float(embedding_std(unit(1, 64).expand(100, 64))) == pytest.approx(0.0, abs=1e-7)
    assert float(embedding_std(unit(20000, 64))) == pytest.approx(1 / math.sqrt(64), rel=1e-2)


def test_evaluating_restores_every_layers_mode():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())
    net[1].eval()
    with evaluating(net):
        assert not net.training
        assert not net[0].training
    assert (net.training, net[0].training, net[1].training) == (True, True, False)


class Batch:
    def __init__(self, start, unreadable):
        self.images = torch.arange(start, start + 2.0).view(2, 1, 1, 1)
        self.labels = torch.tensor([start, start + 1])
        self.unreadable = torch.tensor(unreadable)


def test_embed_keeps_order_and_leaves_unreadable_rows_out():
    loader = [Batch(0, [False, True]), Batch(2, [False, False])]
    features, labels, unreadable = embed(lambda images: images.flatten(1) * 2, loader, "cpu")
    assert features.ravel().tolist() == [0.0, 4.0, 6.0]
    assert (labels.tolist(), unreadable.tolist(), features.dtype) == ([0, 2, 3], [1], np.float32)


def test_embed_stops_when_told_to():
    with pytest.raises(EmbeddingStopped):
        embed(lambda images: images, [Batch(0, [False, False])], "cpu", should_stop=lambda: True)


def test_embed_computes_in_the_precision_that_it_is_told():
    batch = Batch(0, [False, False])
    batch.images = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    exact, mixed = (
        embed(lambda x: x @ weight, [batch], "cpu", precision=name)[0]
        for name in ("32-true", "bf16-mixed")
    )
    assert np.array_equal(exact, (batch.images @ weight).numpy())
    assert np.array_equal(mixed, (batch.images.bfloat16() @ weight.bfloat16()).float().numpy())
    assert not np.array_equal(exact, mixed)
    assert mixed.dtype == np.float32


def monitors(config, figures):
    return [
        TrainingMonitor(figures, 1),
        KNNMonitor(figures, num_neighbors=20, temperature=0.1, feature="backbone", baselines=True),
    ]


def test_knn_and_its_protocol_are_reported_with_baselines(runner):
    figures = {}
    config = runner.config("trainer.max_steps=-1", "trainer.max_epochs=1")
    runner.fit(config, monitors(config, figures))
    assert 0.8 < figures["knn/top1"] <= figures["knn/top5"] <= 1.0
    assert figures["knn_raw_pixels/top1"] > 0.95
    assert 0.5 < figures["knn_untrained/top1"] < 1.0
    assert (figures["knn/num_neighbors"], figures["knn/temperature"], figures["knn/feature"]) == (
        20,
        0.1,
        "backbone",
    )
    assert (figures["knn/bank_size"], figures["knn/num_queries"], figures["knn/epoch"]) == (
        1437,
        360,
        1,
    )
    assert figures["knn/precision"] == "32-true"
    assert figures["images_per_second"] > 0
    assert 0 <= figures["data_wait"] <= 1


def test_fewer_than_five_neighbours_leave_top5_out_of_figures_and_tensorboard(runner):
    logged = []

    class Monitor(KNNMonitor):
        def measure(self, trainer, pl_module, epoch):
            logger = SimpleNamespace(log_metrics=lambda figures, step: logged.append(figures))
            stand_in = SimpleNamespace(
                logger=logger, global_step=trainer.global_step, datamodule=trainer.datamodule
            )
            self._show = lambda *arguments: None
            super().measure(stand_in, pl_module, epoch)

    for num_neighbors in (4, 5):
        figures = {"knn/top5": 0.5}  # of an earlier part of the run
        measured = Monitor(
            figures, num_neighbors=num_neighbors, temperature=0.1, feature="backbone"
        )
        runner.fit(runner.config("trainer.max_steps=1", "trainer.max_epochs=1"), [measured])
        assert ("knn/top5" in figures) == ("knn/top5" in logged[-1]) == (num_neighbors == 5)
        assert figures["knn/top1"] == logged[-1]["knn/top1"]


def test_a_gpu_that_is_full_leaves_the_search_to_the_cpu(runner, monkeypatch):
    def search(*arguments):
        devices.append(arguments[-1])
        if len(devices) % 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 128 MiB.")
        return measured(*arguments)

    measured, devices, figures = monitor.knn_accuracy, [], {}
    monkeypatch.setattr(monitor, "knn_accuracy", search)
    config = runner.config("trainer.max_steps=-1", "trainer.max_epochs=1")
    runner.fit(config, monitors(config, figures))
    assert devices[-2:] == [torch.device("cpu"), "cpu"]  # first the training's, a CPU here
    assert figures["knn/top1"] > 0.8


def test_mean_loss_of_the_epoch_counts_every_batch_once(runner):
    from tests.methods.test_moco import Losses

    figures, losses = {}, Losses()
    config = runner.config("trainer.max_steps=6", "trainer.accumulate_grad_batches=2")
    runner.fit(config, [TrainingMonitor(figures, 2), losses])
    assert figures["train/loss"] == pytest.approx(2 * np.mean(losses.values), rel=1e-6)


def test_both_terms_are_shown_where_there_is_a_dense_one(runner):
    class Watch(TrainingMonitor):
        def step_figures(self, trainer, pl_module, outputs):
            shown.append(
                super().step_figures(trainer, pl_module, outputs) | {"loss": float(outputs["loss"])}
            )
            return shown[-1]

    shown = []
    runner.fit(
        runner.config("method.dense_weight=0.25", "method.queue_start=random"), [Watch({}, 1)]
    )
    for figures in shown:
        mixed = 0.75 * figures["train/loss_global"] + 0.25 * figures["train/loss_dense"]
        assert figures["loss"] == pytest.approx(mixed, rel=1e-6)
        assert figures["train/loss_dense"] != figures["train/loss_global"]
    shown.clear()
    runner.fit(runner.config(), [Watch({}, 1)])
    assert "train/loss_dense" not in shown[-1]


def test_without_a_queue_chance_is_one_of_the_batch_and_no_fill_is_shown(runner):
    class Watch(TrainingMonitor):
        def step_figures(self, trainer, pl_module, outputs):
            shown.append(super().step_figures(trainer, pl_module, outputs))
            return shown[-1]

    shown = []
    runner.fit(runner.config("method.negatives=batch", "method.queue_size=null"), [Watch({}, 1)])
    assert len(shown) == 3
    for figures in shown:
        assert figures["train/loss_of_chance"] == pytest.approx(math.log(32), rel=1e-6)
        assert -1 <= figures["label_free/negative_similarity"] <= 1
        assert "label_free/queue_fill" not in figures


def test_without_labels_it_says_once_that_there_is_no_knn(runner, image_tree, caplog):
    caplog.set_level("INFO")
    figures = {}
    config = runner.config(
        "data=images", f"data.root={image_tree}", "data.batch_size=8", "data.num_workers=0"
    )
    runner.fit(config, monitors(config, figures))
    assert caplog.text.count("no kNN: the data set has no labelled") == 1
    assert not [key for key in figures if key.startswith("knn")]
    assert figures["train/loss"] >= 0


def test_one_loss_that_is_not_finite_is_left_out_of_the_epochs_mean(runner):
    from tests.methods.test_moco import Losses

    class Spoil(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                outputs["loss"] = outputs["loss"] * float("nan")

    figures, losses = {}, Losses()
    runner.fit(runner.config("trainer.max_steps=4"), [losses, Spoil(), TrainingMonitor(figures, 1)])
    assert figures["train/loss"] == pytest.approx(
        np.mean([losses.values[number] for number in (0, 2, 3)]), rel=1e-6
    )


def test_an_epoch_without_a_finite_loss_has_no_mean():
    monitor = TrainingMonitor({}, 1)
    monitor._start_clock()
    monitor.on_train_epoch_end(
        pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"), None
    )
    assert math.isnan(monitor.figures["train/loss"])


def test_image_shows_queries_above_their_keys(runner):
    data = build_data(runner.config())
    image = view_pair_plot(data, 16)
    assert image.shape == (3, 2 * 18 + 2, 16 * 18 + 2)
    assert 0 <= image.min() < image.max() <= 1
    first = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    mean, std = data.augment.mean[0], data.augment.std[0]
    shown = image[:, 2:18, 2:18]
    torch.testing.assert_close(shown, (first.views[0][0] * std + mean).clamp(0, 1))
