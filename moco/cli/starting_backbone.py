"""The backbone that fine-tuning starts from: a checkpoint's, or one with random weights."""

import logging
from typing import Any, NamedTuple

from moco.config.pretrained import given_settings, with_usual_settings
from moco.config.segment import SegmentConfig
from moco.config.train import AugmentationConfig
from moco.errors import InputError
from moco.models.backbones import build_backbone
from moco.models.swin.backbone import Swin
from moco.weights.load_encoder import load_pretrained, log_window_advice

log = logging.getLogger(__name__)


class StartingBackbone(NamedTuple):
    """A backbone, and how its images look."""

    backbone: Any
    """With its weights, and with the attention windows that were asked for."""
    settings: dict[str, Any]
    """The arguments of `build_backbone` that make such a backbone."""
    image_size: int
    """Side of the training images, px."""
    mean: list[float]
    """Of the normalisation, per channel, of pixels in 0..1."""
    std: list[float]


def find_backbone(config: SegmentConfig) -> StartingBackbone:
    """Return the backbone of the checkpoint, or one with random weights without a checkpoint.

    Raises:
        InputError: the checkpoint cannot be used or has another backbone than was asked for, or the
            backbone or the image size is neither given nor known.
    """
    given = given_settings(config.backbone)
    if config.checkpoint is None:
        return untrained_backbone(config, given)
    pretrained = load_pretrained(config.checkpoint, config.encoder, given)
    settings_of_run = with_usual_settings(pretrained.config)
    image_size = config.image_size or settings_of_run["data"]["image_size"]
    if image_size is None:
        raise InputError(
            f"image_size: missing; {config.checkpoint} does not say it, give image_size=PIXELS"
        )
    backbone = pretrained.encoder.backbone
    if isinstance(backbone, Swin) and "window_size" in given:
        log.info(
            "attention windows of %s cells, pretrained with %s",
            backbone.window_size,
            backbone.pretrained_window_size,
        )
    log_window_advice(pretrained, given, image_size)
    settings = {key: value for key, value in pretrained.settings.items() if value is not None}
    # A patch projection that pretraining kept frozen is trained, unless the user asks otherwise.
    settings.pop("freeze_patch_embed", None)
    if "freeze_patch_embed" in given:
        settings["freeze_patch_embed"] = given["freeze_patch_embed"]
    augmentation = settings_of_run["augmentation"]
    mean = config.augmentation.mean or augmentation["mean"]
    std = config.augmentation.std or augmentation["std"]
    return StartingBackbone(backbone, settings, image_size, mean, std)


def untrained_backbone(config: SegmentConfig, given: dict[str, Any]) -> StartingBackbone:
    """Return a backbone with random weights.

    Args:
        given: arguments of `build_backbone`.

    Raises:
        InputError: the backbone or the image size is not given.
    """
    if config.freeze_backbone:
        log.warning(
            "freeze_backbone=true and checkpoint=null: the backbone stays at its random weights"
        )
    if "name" not in given:
        raise InputError("backbone: missing; without a checkpoint give backbone=NAME")
    if config.image_size is None:
        raise InputError("image_size: missing; without a checkpoint give image_size=PIXELS")
    backbone = build_backbone(**given)
    usual = AugmentationConfig()
    mean = config.augmentation.mean or usual.mean
    std = config.augmentation.std or usual.std
    return StartingBackbone(backbone, given, config.image_size, mean, std)
