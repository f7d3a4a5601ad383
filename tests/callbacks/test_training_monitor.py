"""What the monitors of a training report of its loss, its speed and its embeddings."""

import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from moco.callbacks.training_monitor import TrainingMonitor, contrast_figures
from moco.methods.losses import Groups
from tests.methods.test_moco import Losses


class Watch(TrainingMonitor):
    """Keeps the figures of every step."""

    def __init__(self):
        super().__init__({}, 1)
        self.shown = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        figures = self.step_figures(trainer, pl_module, outputs)
        self.shown.append({"loss": float(outputs["loss"]), **figures})


def test_mean_loss_of_the_epoch_counts_every_batch_once(runner):
    figures, losses = {}, Losses()
    config = runner.config("trainer.max_steps=6", "trainer.accumulate_grad_batches=2")
    runner.fit(config, [TrainingMonitor(figures, 2), losses])
    assert figures["train/loss"] == pytest.approx(2 * np.mean(losses.values), rel=1e-6)
    assert figures["images_per_second"] > 0
    assert 0 <= figures["data_wait"] <= 1


def test_both_terms_are_shown_if_there_is_a_dense_one(runner):
    watch = Watch()
    runner.fit(runner.config("method.dense_weight=0.25", "method.queue_start=random"), [watch])
    assert len(watch.shown) == 3
    for figures in watch.shown:
        mixed = 0.75 * figures["train/loss_global"] + 0.25 * figures["train/loss_dense"]
        assert figures["loss"] == pytest.approx(mixed, rel=1e-6)
        assert figures["train/loss_dense"] != figures["train/loss_global"]


def test_with_a_queue_its_fill_is_shown_and_no_dense_term(runner):
    watch = Watch()
    runner.fit(runner.config(), [watch])
    assert [figures["label_free/queue_fill"] for figures in watch.shown] == [
        pytest.approx(min(32 * step, 48) / 48) for step in (1, 2, 3)
    ]
    assert "train/loss_dense" not in watch.shown[-1]
    # The queue is empty in the first step, and its negatives are the first batch in the second.
    has_accuracy = ["contrast/top5" in figures for figures in watch.shown]
    assert has_accuracy == [False, True, True]


def test_without_a_queue_chance_is_one_of_the_batch_and_no_fill_is_shown(runner):
    watch = Watch()
    runner.fit(runner.config("method.negatives=batch", "method.queue_size=null"), [watch])
    assert len(watch.shown) == 3
    for figures in watch.shown:
        assert figures["train/loss_of_chance"] == pytest.approx(math.log(32), rel=1e-6)
        assert -1 <= figures["label_free/negative_similarity"] <= 1
        assert 0 <= figures["contrast/top1"] <= figures["contrast/top5"] < 1
        assert "label_free/queue_fill" not in figures


@pytest.mark.parametrize("is_in_batch", [True, False])
def test_a_key_is_found_if_no_other_image_is_as_similar(is_in_batch):
    """Four orthogonal embeddings; the last two images belong to one group."""
    rows = torch.eye(4)
    outputs = {"query": rows, "key": rows, "negatives": rows if is_in_batch else rows.roll(1, 0)}
    num_negatives = 3 if is_in_batch else 4
    # In a queue each key is there a second time.
    expected = 1 if is_in_batch else 0
    assert contrast_figures(outputs, num_negatives, is_in_batch) == {"contrast/top1": expected}
    groups = torch.tensor([-1, -1, 0, 0])
    other = groups if is_in_batch else groups.roll(1)
    outputs["of_groups"] = Groups(groups, other)
    with_groups = contrast_figures(outputs, num_negatives, is_in_batch)
    assert with_groups == {"contrast/top1": 1 if is_in_batch else 0.5}
    assert contrast_figures(outputs, 0, is_in_batch) == {}


def test_one_loss_that_is_not_finite_is_left_out_of_the_epochs_mean(runner):
    class Spoil(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                outputs["loss"] = outputs["loss"] * float("nan")

    figures, losses = {}, Losses()
    runner.fit(runner.config("trainer.max_steps=4"), [losses, Spoil(), TrainingMonitor(figures, 1)])
    others = [losses.values[number] for number in (0, 2, 3)]
    assert figures["train/loss"] == pytest.approx(np.mean(others), rel=1e-6)


def test_an_epoch_without_a_finite_loss_has_no_mean():
    monitor = TrainingMonitor({}, 1)
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    monitor._start_clock()
    monitor.on_train_epoch_end(trainer, None)
    assert math.isnan(monitor.figures["train/loss"])
