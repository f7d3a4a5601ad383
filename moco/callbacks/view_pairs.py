"""Augmented pairs of views in TensorBoard, as the model sees them."""

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from moco.callbacks.running_trainer import board_of, data_of
from moco.data.loading.datamodule import PretrainingData
from moco.evaluation.reports.cards import NUM_PAIRS, view_pairs_card
from moco.evaluation.reports.plots import pixels
from moco.training.board_layout import tag_of
from moco.training.stopwatches import LOGGING, epoch_time

NAME = "views/query_above_key"


class ViewPairPlot(pl.Callback):
    """Plot augmented pairs before the first step and every n epochs: queries above their keys.

    Args:
        every_n_epochs: epochs between two plots.
    """

    def __init__(self, every_n_epochs: int) -> None:
        self.every_n_epochs = every_n_epochs

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.global_step == 0 and board_of(trainer) is not None:
            data = data_of(trainer)
            self._plot(trainer, *data.pairs(data.first_images(NUM_PAIRS)))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        epoch = trainer.current_epoch
        is_due = batch_idx == 0 and epoch > 0 and epoch % self.every_n_epochs == 0
        if is_due and board_of(trainer) is not None:
            query, key = batch.views
            self._plot(trainer, query[:NUM_PAIRS], key[:NUM_PAIRS])

    @epoch_time.measured(LOGGING)
    def _plot(self, trainer: pl.Trainer, query: Tensor, key: Tensor) -> None:
        data = data_of(trainer)
        plot = view_pairs_card(as_shown(data, query), as_shown(data, key))
        tag = tag_of(NAME)
        board_of(trainer).add_image(tag, pixels(plot), trainer.global_step, dataformats="HWC")


def as_shown(data: PretrainingData, views: Tensor) -> np.ndarray:
    """Return normalised views (pairs, bands, side, side) as images (pairs, side, side, 3) uint8."""
    mean = torch.tensor(data.augment.mean).view(1, -1, 1, 1)
    std = torch.tensor(data.augment.std).view(1, -1, 1, 1)
    shares = (views.float().cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1)
    values = data.source.train.values
    if values is not None and (values.is_float or values.display is not None):
        return np.stack([values.shown(view) for view in shares.numpy()])
    return (shares * 255).round().byte().numpy()
