"""The figures on the held-out images while a segmentation model trains, as a Lightning callback."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
from torch import Tensor

from moco.callbacks.epoch_measurement import EpochMeasurement
from moco.callbacks.running_trainer import board_of, log_scalars
from moco.data.sources.pixel_values import PixelValues
from moco.evaluation.features import evaluating
from moco.evaluation.reports.plots import pixels
from moco.evaluation.reports.segmentation_plots import (
    compared_masks,
    confused_pixels,
    shown_names,
)
from moco.phases import counted
from moco.segmentation.inference import predicted_logits
from moco.segmentation.mask_batches import MaskBatch, num_read
from moco.segmentation.metrics import COMMONEST, SegmentationCounts, miou_of_commonest_class
from moco.segmentation.segmentation_data import SegmentationData, check_readable
from moco.training.board_layout import tag_of

log = logging.getLogger(__name__)


class SegmentationMonitor(EpochMeasurement):
    """Measure the held-out images every n epochs, in eval mode and float32.

    Args:
        figures: gets those of `segmentation_figures`, ``segment/epoch`` and the protocol.
        inference: ``whole`` or ``slide``, see `predicted_logits`.
        num_plotted_images: how many images TensorBoard shows beside truth and prediction.
        when: ``every_n_epochs`` and ``should_stop`` of `EpochMeasurement`.
    """

    def __init__(
        self, figures: dict[str, Any], *, inference: str, num_plotted_images: int = 0, **when: Any
    ) -> None:
        super().__init__(figures, **when)
        self.inference = inference
        self.num_plotted_images = num_plotted_images

    def measure(self, trainer: pl.Trainer, pl_module: Any, epoch: int) -> None:
        data: SegmentationData = trainer.datamodule  # type: ignore[attr-defined]
        num_classes, device = pl_module.num_classes, pl_module.device
        counts = SegmentationCounts(num_classes, pl_module.ignore_index, device)
        names = shown_names(data.source.class_names)
        board = board_of(trainer)
        plots: list[np.ndarray] = []
        with evaluating(pl_module):
            total = len(data.source.validation)
            loader = data.evaluation_dataloader()
            for batch in counted(loader, "mIoU", total, size=num_read):
                # A measurement that is cut short is done when the run is resumed.
                if self.should_stop():
                    self.owed = True
                    return
                check_readable(batch)
                images, classes = batch.images.to(device), batch.classes.to(device)
                logits = predicted_logits(
                    pl_module.logits, images, self.inference, data.view.image_size
                )
                predicted = counts.add(logits, classes)
                num_missing_plots = 0
                if board is not None:
                    num_missing_plots = self.num_plotted_images - len(plots)
                values = data.source.validation.images.values
                plots += plot_first_images(
                    batch, predicted, pl_module, names, values, num_missing_plots
                )
        self.owed = False
        scores = counts.figures(data.source.class_names)
        self.figures |= {
            **scores,
            COMMONEST: miou_of_commonest_class(counts.confusion),
            "segment/inference": self.inference,
            "segment/image_size": data.view.image_size,
            "segment/num_images": len(data.source.validation),
            "segment/num_classes": num_classes,
            "segment/decoder": pl_module.hparams["decoder"]["name"],
            "segment/loss": pl_module.hparams["loss"],
            "segment/class_weights": pl_module.hparams["class_weights"],
            "segment/epoch": epoch,
        }
        log_scalars(trainer, {key: score for key, score in scores.items() if score is not None})
        if board is None or not self.num_plotted_images:
            return
        step = trainer.global_step
        for number, plot in enumerate(plots):
            tag = tag_of(f"image_truth_prediction/{number}")
            board.add_image(tag, plot, step, dataformats="HWC")
        matrix = confused_pixels(names, counts.confusion)
        board.add_image(tag_of("segment/confusion"), pixels(matrix), step, dataformats="HWC")


def plot_first_images(
    batch: MaskBatch,
    predicted: Tensor,
    pl_module: Any,
    names: Sequence[str],
    values: PixelValues | None,
    count: int,
) -> list[np.ndarray]:
    """Return the pixels of plots of the first `count` images of a batch, see `compared_masks`.

    Args:
        names: of the classes, as plots show them.
        values: how the pixels of the images were made.
    """
    mean, std = pl_module.hparams["mean"], pl_module.hparams["std"]
    plots = []
    for row in range(min(count, len(batch.images))):
        image, classes = batch.images[row], batch.classes[row]
        plots.append(compared_masks(image, classes, predicted[row], names, mean, std, values))
    return plots
