"""Segmentation by patch features while a run pretrains, as a Lightning callback."""

import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytorch_lightning as pl

from moco.callbacks.epoch_measurement import EpochMeasurement
from moco.callbacks.stopwatches import MONITORS, epoch_time
from moco.data.augment.views import Normalized
from moco.errors import InputError
from moco.evaluation.dense_bank import knn_scores
from moco.evaluation.dense_features import DenseSet, NotFinite, check_maps, figures_of
from moco.evaluation.features import EmbeddingStopped, evaluating
from moco.segmentation.mask_sources import build_segmentation_source
from moco.training.distributed.collectives import from_rank_zero

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
    """The images of ``monitor.dense``, every file of them checked.

    Args:
        data: see `build_segmentation_source`, of which root, ignore_index and max_image_pixels are, too.
        mean, std: per channel, of pixels in 0..1.
        settings: the others of `DenseSet`.

    Raises:
        InputError: they cannot be used; it names the key of that section.
    """
    check_maps(maps, "monitor.dense.maps")
    try:
        source = build_segmentation_source(
            data, root, ignore_index=ignore_index, max_image_pixels=max_image_pixels
        )
    except InputError as error:
        raise InputError(
            re.sub(r"\bdata\.(root|ignore_index)\b", r"monitor.dense.\1", str(error))
        ) from error
    return DenseSet(source, Normalized(mean, std), maps=maps, **settings)


class Measured(NamedTuple):
    """What rank 0 tells the others of a measurement."""

    scores: dict[str, float] = {}  # noqa: RUF012
    protocol: dict[str, Any] = {}  # noqa: RUF012
    is_cut_short: bool = False


class DenseMonitor(EpochMeasurement):
    """kNN segmentation by the query encoder's patch features every n epochs, in eval mode and float32.

    Of several processes rank 0 does it alone, with the weights and running statistics that the checkpoint holds; the others
    wait. It draws no number of the training's random generators.

    Args:
        figures: gets ``dense/knn_miou``, ``dense/knn_pixel_accuracy``, ``dense/epoch`` and the protocol.
        images: what it is measured by.
        num_neighbors, temperature: of the vote, see `moco.evaluation.dense_bank.knn_scores`.
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
        def result() -> Measured:
            try:
                return Measured(*self._result(pl_module))
            except EmbeddingStopped:
                return Measured(is_cut_short=True)
            except NotFinite as error:
                log.warning("no dense figure at epoch %d: %s", epoch, error)
                return Measured()

        scores, protocol, self.owed = from_rank_zero(result)
        if not scores:
            return
        self.figures |= scores | {"dense/epoch": epoch} | protocol
        if trainer.logger:
            trainer.logger.log_metrics(scores, step=trainer.global_step)

    def _result(self, pl_module: Any) -> tuple[dict[str, float], dict[str, Any]]:
        """Scores and protocol, on rank 0."""
        images, backbone, device = self.images, pl_module.query_encoder.backbone, pl_module.device
        with evaluating(pl_module):
            bank = images.bank(backbone, device, self.should_stop)
            if self.num_neighbors > len(bank.features):
                log.warning(
                    "monitor.dense.num_neighbors=%d is more than the bank's %d patches; using those",
                    self.num_neighbors, len(bank.features),
                )  # fmt: skip
                self.num_neighbors = len(bank.features)
            score = partial(knn_scores, bank, self.num_neighbors, self.temperature, device)
            confusion = images.confusions({"knn": score}, backbone, device, self.should_stop)["knn"]
        figures = figures_of(confusion, images.source.class_names, "knn")
        scores = {
            key: value for key, value in figures.items() if value is not None and "_iou/" not in key
        }
        return scores, images.protocol(bank, self.num_neighbors, self.temperature)
