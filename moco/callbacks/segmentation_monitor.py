"""The held-out images' figures while a segmentation model trains, as a Lightning callback.

Letters: N batch, H W pixels.
"""

import logging
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from moco.callbacks.epoch_measurement import EpochMeasurement
from moco.callbacks.stopwatches import MONITORS, epoch_time
from moco.evaluation.features import evaluating
from moco.segmentation.mask_batches import MaskBatch
from moco.segmentation.metrics import (
    comparison_plot,
    confusion_matrix,
    predicted_classes,
    segmentation_figures,
)
from moco.segmentation.segmentation_data import SegmentationData, check_readable

log = logging.getLogger(__name__)


class SegmentationMonitor(EpochMeasurement):
    """mIoU, pixel accuracy and the IoU of every class on the held-out images every n epochs, in eval mode and float32.

    Args:
        figures: gets ``segment/miou``, ``segment/pixel_accuracy``, ``segment/iou/NAME``, ``segment/epoch`` and the protocol.
        inference: ``whole`` or ``slide``, see `predicted_classes`.
        num_plotted_images: so many go to TensorBoard, image, truth and prediction side by side.
        every_n_epochs, should_stop: see `EpochMeasurement`.
    """

    def __init__(
        self,
        figures: dict[str, Any],
        *,
        inference: str,
        every_n_epochs: int = 1,
        num_plotted_images: int = 0,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(figures, every_n_epochs, should_stop)
        self.inference = inference
        self.num_plotted_images = num_plotted_images

    @epoch_time.measured(MONITORS)
    def measure(self, trainer: pl.Trainer, pl_module: Any, epoch: int) -> None:
        data, hparams = trainer.datamodule, pl_module.hparams  # type: ignore[attr-defined]
        assert isinstance(data, SegmentationData)
        confusion: Tensor | None = None
        plots: list[Tensor] = []
        with evaluating(pl_module), torch.autocast(pl_module.device.type, enabled=False):
            for batch in data.evaluation_dataloader():
                if self.should_stop():
                    self.owed = True
                    return
                check_readable(batch, data.source.validation)
                images, classes = (
                    batch.images.to(pl_module.device),
                    batch.classes.to(pl_module.device),
                )
                predicted = predicted_classes(
                    pl_module.logits, images, self.inference, data.image_size
                )
                matrix = confusion_matrix(
                    predicted, classes, pl_module.num_classes, pl_module.ignore_index
                )
                confusion = matrix if confusion is None else confusion + matrix
                if len(plots) < self.num_plotted_images:
                    plots += images_of(
                        batch, predicted, hparams, self.num_plotted_images - len(plots)
                    )
        assert confusion is not None  # a source without held-out images does not exist
        self.owed = False
        scores = segmentation_figures(confusion.cpu(), data.source.class_names)
        self.figures |= scores | {"segment/epoch": epoch} | self._protocol(data, hparams)
        if trainer.logger:
            known = {key: score for key, score in scores.items() if score is not None}
            trainer.logger.log_metrics(known, step=trainer.global_step)
            for number, plot in enumerate(plots):
                trainer.logger.experiment.add_image(  # type: ignore[attr-defined]
                    f"image_truth_prediction/{number}", plot, trainer.global_step
                )

    def _protocol(self, data: SegmentationData, hparams: Any) -> dict[str, Any]:
        """The conditions of the figures, under the names of ``metrics.json``."""
        return {
            "segment/inference": self.inference,
            "segment/image_size": data.image_size,
            "segment/num_images": len(data.source.validation),
            "segment/num_classes": len(data.source.class_names),
            "segment/decoder": hparams["decoder"]["name"],
        }


def images_of(batch: MaskBatch, predicted: Tensor, hparams: Any, at_most: int) -> list[Tensor]:
    """The first rows of a batch with truth and prediction beside them, see `comparison_plot`."""
    mean, std = (torch.tensor(hparams[name]).view(3, 1, 1) for name in ("mean", "std"))
    return [
        comparison_plot((image * std + mean).clamp(0, 1), classes, found, hparams["num_classes"])
        for image, classes, found in zip(
            batch.images[:at_most], batch.classes[:at_most], predicted[:at_most], strict=True
        )
    ]
