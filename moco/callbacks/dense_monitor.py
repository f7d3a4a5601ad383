"""Segmentation by patch features while a run pretrains, as a Lightning callback."""

import logging
from dataclasses import replace
from functools import partial
from typing import Any

import pytorch_lightning as pl

from moco.callbacks.epoch_measurement import EpochMeasurement
from moco.callbacks.running_trainer import log_scalars
from moco.evaluation.dense_bank import knn_scores
from moco.evaluation.dense_features import DenseSet, NotFinite, dense_figures
from moco.evaluation.features import EmbeddingStopped, evaluating
from moco.evaluation.knn import capped
from moco.training.distributed.collectives import from_rank_zero

log = logging.getLogger(__name__)


class DenseMonitor(EpochMeasurement):
    """Segment by the query encoder's patch features every n epochs, in eval mode and float32.

    Rank 0 measures, with the weights and running statistics that the checkpoint holds. The other
    processes wait. No number of the training's random generators is drawn.

    Args:
        figures: gets ``dense/knn_miou``, ``dense/knn_pixel_accuracy``, ``dense/epoch`` and the
            protocol.
        images: the images with masks.
        num_neighbors, temperature: see `knn_scores`.
        when: ``every_n_epochs`` and ``should_stop`` of `EpochMeasurement`.
    """

    def __init__(
        self,
        figures: dict[str, Any],
        images: DenseSet,
        num_neighbors: int,
        temperature: float,
        **when: Any,
    ) -> None:
        super().__init__(figures, **when)
        self.images = replace(images, should_stop=self.should_stop)
        self.num_neighbors = num_neighbors
        self.temperature = temperature

    def measure(self, trainer: pl.Trainer, pl_module: Any, epoch: int) -> None:
        measured = from_rank_zero(partial(self._measure, pl_module, epoch))
        scores, protocol, self.owed = measured
        if scores:
            self.figures |= {**scores, **protocol, "dense/epoch": epoch}
            log_scalars(trainer, scores)

    def _measure(
        self, pl_module: Any, epoch: int
    ) -> tuple[dict[str, float | None], dict[str, Any], bool]:
        """Return scores and protocol, both empty without a measurement, and whether it is owed."""
        images, device = self.images, pl_module.device
        backbone = pl_module.query_encoder.backbone
        try:
            with evaluating(pl_module):
                bank = images.bank(backbone, device)
                self.num_neighbors = capped(
                    self.num_neighbors, len(bank.features), "monitor.dense.num_neighbors"
                )
                vote = self.num_neighbors, self.temperature
                scorer = partial(knn_scores, bank, *vote, device)
                confusions = images.confusions({"knn": scorer}, backbone, device)
        except EmbeddingStopped:
            return {}, {}, True
        except NotFinite as error:
            log.warning("no dense figure at epoch %d: %s", epoch, error)
            return {}, {}, False
        # The IoU of every class would crowd TensorBoard.
        scores, _ = dense_figures(confusions["knn"], images.source.class_names, "knn")
        return scores, images.protocol(bank, *vote), False
