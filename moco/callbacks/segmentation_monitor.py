"""The figures on the held-out images while a segmentation model trains, as a Lightning callback."""

import logging
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from moco.callbacks.epoch_measurement import EpochMeasurement
from moco.callbacks.running_trainer import board_of, log_scalars
from moco.data.sources.pixel_values import PixelValues
from moco.evaluation.features import evaluating
from moco.phases import counted
from moco.segmentation.comparison_plot import comparison_plot
from moco.segmentation.inference import predicted_classes
from moco.segmentation.mask_batches import MaskBatch, num_read
from moco.segmentation.metrics import confusion_matrix, segmentation_figures
from moco.segmentation.segmentation_data import SegmentationData, check_readable

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
        plots: list[Tensor] = []
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
                num_missing_plots = self.num_plotted_images - len(plots)
                values = data.source.validation.images.values
                plots += plot_first_images(batch, predicted, pl_module, values, num_missing_plots)
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
        log_scalars(trainer, scores)
        board = board_of(trainer)
        if board is not None:
            for number, plot in enumerate(plots):
                board.add_image(f"image_truth_prediction/{number}", plot, trainer.global_step)


def plot_first_images(
    batch: MaskBatch, predicted: Tensor, pl_module: Any, values: PixelValues | None, count: int
) -> list[Tensor]:
    """Return plots of the first `count` images of a batch, see `comparison_plot`.

    Args:
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
        plots.append(
            comparison_plot(image, batch.classes[row], predicted[row], pl_module.num_classes)
        )
    return plots
