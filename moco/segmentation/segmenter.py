"""The Lightning module that learns to segment, from a pretrained backbone or from scratch."""

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from moco.models.backbones import build_backbone
from moco.segmentation.decoders import SegmentationModel, build_decoder
from moco.segmentation.layer_depths import depths_from_the_top
from moco.segmentation.pixel_losses import SegmentationLoss
from moco.training.optimizers import build_layered_optimizer
from moco.training.schedules import fine_tuning_lr_at


class Segmenter(pl.LightningModule):
    """A backbone, a decoder, and a loss of the pixels that have a class.

    The arguments are plain numbers, strings and dicts, because a checkpoint holds them and rebuilds
    the module from them.

    Args:
        backbone: arguments of `build_backbone`. Its weights are loaded afterwards.
        decoder: arguments of `build_decoder`.
        optimizer: the fields of ``SegmentOptimizerConfig``, with a number as `layer_decay`.
        num_classes: how many classes there are.
        ignore_index: the number of pixels that have no class. If it is the number of a class, that
            class is never predicted.
        freeze_backbone: train the decoder alone.
        image_size: side of the training crops and of sliding windows, px.
        class_names: one name for each class.
        mean, std: of the images' normalisation, per channel, of pixels in 0..1.
        loss: name of the loss, see `SegmentationLoss`. Checkpoints of earlier versions have none:
            they were trained with ``ce``.
        class_weights: of the loss, a number above 0 for each class; None: all weigh alike.
    """

    def __init__(
        self,
        backbone: dict[str, Any],
        decoder: dict[str, Any],
        optimizer: dict[str, Any],
        num_classes: int,
        ignore_index: int,
        freeze_backbone: bool,
        image_size: int,
        class_names: list[str],
        mean: list[float],
        std: list[float],
        loss: str = "ce",
        class_weights: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        net = build_backbone(**backbone)
        head = build_decoder(backbone=net, num_classes=num_classes, **decoder)
        self.model = SegmentationModel(net, head, freeze_backbone)
        self.loss = SegmentationLoss(loss, ignore_index, class_weights)
        self.num_classes = num_classes
        self.schedule_offset = 0
        """Added to the step that the schedule sees, see `ResumedSchedule`."""
        self.ignore_index = ignore_index

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes, height, width) of normalised images (N, 3, height, width)."""
        return self.model(images)

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits in float32, with minus infinity for a class that is left out."""
        logits = self.model(images).float()
        if self.ignore_index < self.num_classes:
            logits[:, self.ignore_index] = -torch.inf
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        logits = self.model(batch.images)
        return {"loss": self.loss(logits, batch.classes)}

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Set the learning rate of every layer, then take the step."""
        # Set here and not by a scheduler: a resumed run needs no state for a function of the step.
        lr = self.learning_rate_at(self.trainer.global_step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        settings = self.hparams["optimizer"]
        depths: dict[nn.Parameter, int] = {}
        if settings["layer_decay"] != 1:
            depths = depths_from_the_top(self.model.backbone)
        return build_layered_optimizer(
            self,
            depths,
            lr=settings["lr"],
            weight_decay=settings["weight_decay"],
            layer_decay=settings["layer_decay"],
        )

    @property
    def num_steps(self) -> int:
        """The number of optimizer steps in the whole training, while it runs."""
        return int(self.trainer.estimated_stepping_batches)

    def learning_rate_at(self, step: int) -> float:
        """Return the decoder's learning rate at an optimizer step, counted from 0."""
        settings = self.hparams["optimizer"]
        return fine_tuning_lr_at(
            step + self.schedule_offset,
            self.num_steps,
            lr=settings["lr"],
            schedule=settings["schedule"],
            warmup_steps=settings["warmup_steps"],
            power=settings["power"],
        )
