"""The figures on the held-out images while a segmentation model trains, as a Lightning callback."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from moco.callbacks.epoch_measurement import EpochMeasurement
from moco.callbacks.running_trainer import board_of, log_scalars
from moco.data.sources.pixel_values import PixelValues
from moco.evaluation.features import evaluating
from moco.evaluation.reports.cards import (
    COMPARED_CLASSES,
    comparison_card,
    confusion_card,
    shown_name,
)
from moco.evaluation.reports.plots import pixels
from moco.phases import counted
from moco.segmentation.comparison_plot import class_colours, comparison_plot
from moco.segmentation.inference import predicted_classes
from moco.segmentation.mask_batches import MaskBatch, num_read
from moco.segmentation.metrics import confusion_matrix, segmentation_figures
from moco.segmentation.segmentation_data import SegmentationData, check_readable
from moco.training.board_layout import tag_of

log = logging.getLogger(__name__)


class SegmentationMonitor(EpochMeasurement):
    """Measure the held-out images every n epochs, in eval mode and float32.

    Args:
        figures: gets ``segment/miou``, ``segment/pixel_accuracy``, ``segment/iou/NAME``,
            ``segment/epoch`` and the protocol.
        inference: ``whole`` or ``slide``, see `predicted_classes`.
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
        confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        names = []
        for number, name in enumerate(data.source.class_names):
            names.append(shown_name(name, number))
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
                predicted = predicted_classes(
                    pl_module.logits, images, self.inference, data.view.image_size
                )
                confusion += confusion_matrix(
                    predicted, classes, num_classes, pl_module.ignore_index
                )
                num_missing_plots = 0
                if board is not None:
                    num_missing_plots = self.num_plotted_images - len(plots)
                values = data.source.validation.images.values
                plots += plot_first_images(
                    batch, predicted, pl_module, names, values, num_missing_plots
                )
        self.owed = False
        scores = segmentation_figures(confusion.cpu(), data.source.class_names)
        self.figures |= {
            **scores,
            "segment/inference": self.inference,
            "segment/image_size": data.view.image_size,
            "segment/num_images": len(data.source.validation),
            "segment/num_classes": num_classes,
            "segment/decoder": pl_module.hparams["decoder"]["name"],
            "segment/epoch": epoch,
        }
        log_scalars(trainer, {key: score for key, score in scores.items() if score is not None})
        if board is None or not self.num_plotted_images:
            return
        step = trainer.global_step
        for number, plot in enumerate(plots):
            tag = tag_of(f"image_truth_prediction/{number}")
            board.add_image(tag, plot, step, dataformats="HWC")
        matrix = confusion_card(names, confusion.cpu().numpy(), "pixels")
        board.add_image(tag_of("segment/confusion"), pixels(matrix), step, dataformats="HWC")


def plot_first_images(
    batch: MaskBatch,
    predicted: Tensor,
    pl_module: Any,
    names: Sequence[str],
    values: PixelValues | None,
    count: int,
) -> list[np.ndarray]:
    """Return the pixels of plots of the first `count` images of a batch, see `comparison_card`.

    Args:
        names: of the classes, as plots show them.
        values: how the pixels of the images were made.
    """
    mean = torch.tensor(pl_module.hparams["mean"]).view(-1, 1, 1)
    std = torch.tensor(pl_module.hparams["std"]).view(-1, 1, 1)
    plots = []
    for row in range(min(count, len(batch.images))):
        image = (batch.images[row] * std + mean).clamp(0, 1)
        if values is not None and values.is_float:
            shown = values.shown(image.permute(1, 2, 0).numpy())
            image = torch.from_numpy(shown).permute(2, 0, 1) / 255
        truth, guess = batch.classes[row].cpu(), predicted[row].cpu()
        panels = comparison_plot(image, truth, guess, pl_module.num_classes)
        classes = classes_in(torch.stack([truth, guess]), names)
        plots.append(pixels(comparison_card(panels.permute(1, 2, 0).numpy(), classes)))
    return plots


def classes_in(numbers: Tensor, names: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Return the names and colours of the classes that have most pixels, by class number.

    Args:
        numbers: class numbers of pixels, of any shape; a number without a name is no class.
        names: of all classes.
    """
    num_pixels = numbers.flatten().clamp(max=len(names)).bincount(minlength=len(names) + 1)
    largest = num_pixels.argsort(descending=True, stable=True)[:COMPARED_CLASSES]
    colours = class_colours(len(names)).tolist()
    classes = []
    for number in sorted(largest.tolist()):
        if num_pixels[number] > 0:
            name = names[number] if number < len(names) else "no class"
            classes.append((name, colours[number]))
    return classes
