"""Augmented pairs as the model sees them, for TensorBoard and for a program's image."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torchvision.utils import make_grid

from moco.callbacks.monitors import data_of
from moco.callbacks.stopwatches import LOGGING, epoch_time
from moco.data.loading.datamodule import PretrainingData


class ViewPairPlot(pl.Callback):
    """Before the first step and every n epochs, augmented pairs as the model sees them: queries above, their keys below.

    Args:
        every_n_epochs: None: no images.
    """

    NUM_PAIRS = 16
    TAG = "views/query_above_key"

    def __init__(self, every_n_epochs: int | None) -> None:
        self.every_n_epochs = every_n_epochs

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.every_n_epochs and trainer.global_step == 0 and trainer.logger:
            self._show(
                trainer, *data_of(trainer).pairs(data_of(trainer).first_images(self.NUM_PAIRS))
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        epoch = trainer.current_epoch
        if (
            self.every_n_epochs
            and batch_idx == 0
            and epoch > 0
            and epoch % self.every_n_epochs == 0
            and trainer.logger
        ):
            self._show(trainer, *(view[: self.NUM_PAIRS].cpu() for view in batch.views))

    @epoch_time.measured(LOGGING)
    def _show(self, trainer: pl.Trainer, query: Tensor, key: Tensor) -> None:
        image = pairs_in_columns(data_of(trainer), query, key)
        trainer.logger.experiment.add_image(self.TAG, image, trainer.global_step)  # type: ignore[union-attr]


def view_pair_plot(data: PretrainingData, num_pairs: int) -> Tensor:
    """Pairs of the first epoch in columns, query above key: (3, H, W) in 0..1."""
    return pairs_in_columns(data, *data.pairs(data.first_images(num_pairs)))


def pairs_in_columns(data: PretrainingData, query: Tensor, key: Tensor) -> Tensor:
    """Normalised views (N, 3, S, S) of N images as what they show, query above key: (3, H, W) in 0..1."""
    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1) for values in (data.augment.mean, data.augment.std)
    )
    return make_grid((torch.cat([query, key]) * std + mean).clamp(0, 1), nrow=len(query), padding=2)
