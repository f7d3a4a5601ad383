"""Segmentation by patch features while a run pretrains, as a Lightning callback."""

import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytorch_lightning as pl

from moco.callbacks.epoch_measurement import EpochMeasurement
from moco.callbacks.running_trainer import log_scalars
from moco.data.augment.views import Normalized
from moco.errors import InputError
from moco.evaluation.dense_bank import knn_scores
from moco.evaluation.dense_features import (
    DenseSet,
    NotFinite,
    check_maps,
    dense_figures,
)
from moco.evaluation.features import EmbeddingStopped, evaluating
from moco.evaluation.knn import capped
from moco.segmentation.mask_sources import build_segmentation_source
from moco.training.distributed.collectives import from_rank_zero
from moco.training.stopwatches import MONITORS, epoch_time

log = logging.getLogger(__name__)


def build_dense_set(
    *,
    data: str,
    root: str | None,
    ignore_index: int,
    max_image_pixels: int,
    mean: Sequence[float],
    std: Sequence[float],
    maps: Sequence[int],
    **settings: Any,
) -> DenseSet:
    """Return the images of ``monitor.dense``, with every file checked.

    Args:
        data, root, ignore_index, max_image_pixels: see `build_segmentation_source`.
        mean, std: per channel, of pixels in 0..1.
        maps: see `DenseSet`.
        settings: the other arguments of `DenseSet`.

    Raises:
        InputError: the images cannot be used. The message names the key below ``monitor.dense``.
    """
    check_maps(maps, "monitor.dense.maps")
    try:
        source = build_segmentation_source(
            data, root, ignore_index=ignore_index, max_image_pixels=max_image_pixels
        )
    except InputError as error:
        # The message names keys below data, as moco.segment has them.
        message = re.sub(r"\bdata\.(root|ignore_index)\b", r"monitor.dense.\1", str(error))
        raise InputError(message) from error
    return DenseSet(source, Normalized(mean, std), maps=maps, **settings)


class DenseMonitor(EpochMeasurement):
    """Segment by the query encoder's patch features every n epochs, in eval mode and float32.

    Rank 0 measures, with the weights and running statistics that the checkpoint holds. The other
    processes wait. No number of the training's random generators is drawn.

    Args:
        figures: gets ``dense/knn_miou``, ``dense/knn_pixel_accuracy``, ``dense/epoch`` and the
            protocol.
        images: the images with masks.
        num_neighbors, temperature: see `knn_scores`.
        every_n_epochs, should_stop: see `EpochMeasurement`.
    """

    def __init__(
        self,
        figures: dict[str, Any],
        images: DenseSet,
        *,
        num_neighbors: int,
        temperature: float,
        every_n_epochs: int = 1,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(figures, every_n_epochs, should_stop)
        self.images = images
        self.num_neighbors = num_neighbors
        self.temperature = temperature

    @epoch_time.measured(MONITORS)
    def measure(self, trainer: pl.Trainer, pl_module: Any, epoch: int) -> None:
        measured = from_rank_zero(partial(self._measure, pl_module, epoch))
        scores, protocol, self.owed = measured
        if not scores:
            return
        self.figures |= scores
        self.figures |= protocol
        self.figures["dense/epoch"] = epoch
        log_scalars(trainer, scores)

    def _measure(self, pl_module: Any, epoch: int) -> tuple[dict[str, float], dict[str, Any], bool]:
        """Return scores and protocol, both empty without a measurement, and whether it is owed."""
        images, device = self.images, pl_module.device
        backbone = pl_module.query_encoder.backbone
        try:
            with evaluating(pl_module):
                bank = images.bank(backbone, device, self.should_stop)
                self.num_neighbors = capped(
                    self.num_neighbors, len(bank.features), "monitor.dense.num_neighbors"
                )
                scorer = partial(knn_scores, bank, self.num_neighbors, self.temperature, device)
                confusions = images.confusions({"knn": scorer}, backbone, device, self.should_stop)
        except EmbeddingStopped:
            return {}, {}, True
        except NotFinite as error:
            log.warning("no dense figure at epoch %d: %s", epoch, error)
            return {}, {}, False
        # The IoU of every class would crowd TensorBoard.
        scores, _ = dense_figures(confusions["knn"], images.source.class_names, "knn")
        return scores, images.protocol(bank, self.num_neighbors, self.temperature), False
