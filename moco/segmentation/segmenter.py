"""Semantic segmentation by fine-tuning, or by training from scratch. Letters: N batch, C classes, H W pixels."""

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from moco.models.backbones import build_backbone
from moco.segmentation.decoders import SegmentationModel, build_decoder, depths_from_the_top
from moco.training import trainer
from moco.training.fine_tuning import build_layered_optimizer, fine_tuning_lr_at


class Segmenter(pl.LightningModule):
    """A backbone, a decoder, and cross-entropy at every pixel that has a class.

    The arguments are plain numbers, strings and dicts: they are the checkpoint's hyperparameters and rebuild the module.

    Args:
        backbone: arguments of `build_backbone`; its weights are to be loaded afterwards.
        decoder: arguments of `build_decoder`.
        optimizer: the fields of ``SegmentOptimizerConfig``, `layer_decay` a number.
        num_classes: C.
        ignore_index: the class number of pixels without a class. If it is below C, that class is never predicted.
        freeze_backbone: train the decoder alone.
        image_size: side of the crops to train on, and of sliding windows, px.
        class_names: C names.
        mean, std: with which the images are normalised, per channel, of pixels in 0..1.
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
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        net = build_backbone(**backbone)
        self.model = SegmentationModel(
            net, build_decoder(backbone=net, num_classes=num_classes, **decoder), freeze_backbone
        )
        self.num_classes = num_classes
        self.ignore_index = ignore_index

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, C, H, W) of normalised images (N, 3, H, W) of any size."""
        return self.model(images)

    def logits(self, images: Tensor) -> Tensor:
        """The same in float32, for predictions: a class that is left out has none."""
        logits = self.model(images).float()
        if self.ignore_index < self.num_classes:
            logits[:, self.ignore_index] = -torch.inf
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return {
            "loss": pixel_cross_entropy(self.model(batch.images), batch.classes, self.ignore_index)
        }

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """The learning rate of this step in every layer, then the step."""
        lr = self.learning_rate_at(self.trainer.global_step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = self.hparams["optimizer"]
        settings = {key: optimizer[key] for key in ("lr", "weight_decay", "layer_decay")}
        depths = depths_from_the_top(self.model.backbone) if settings["layer_decay"] != 1 else {}
        return build_layered_optimizer(self, depths, **settings)

    @property
    def num_steps(self) -> int:
        """Optimizer steps in the whole running training."""
        return trainer.num_steps(self.trainer)

    def learning_rate_at(self, step: int) -> float:
        """The decoder's, a pure function of the optimizer step, counted from 0."""
        optimizer = self.hparams["optimizer"]
        settings = {key: optimizer[key] for key in ("lr", "schedule", "warmup_steps", "power")}
        return fine_tuning_lr_at(step, self.num_steps, **settings)


def pixel_cross_entropy(logits: Tensor, classes: Tensor, ignore_index: int) -> Tensor:
    """Mean over the pixels that have a class, in nats; 0 if none has. In fp32 whatever the precision.

    Args:
        logits: (N, C, H, W).
        classes: (N, H, W), 0 to C - 1 or `ignore_index`.
    """
    with torch.autocast(logits.device.type, enabled=False):
        # Summed here: CUDA has no deterministic form of the loss that sums by itself.
        losses = F.cross_entropy(
            logits.float(), classes, ignore_index=ignore_index, reduction="none"
        )  # (N, H, W)
    return losses.sum() / (classes != ignore_index).sum().clamp(min=1)
