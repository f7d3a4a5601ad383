"""The backbone that fine-tuning starts from: a checkpoint's, or one with random weights."""

import logging
from typing import Any, NamedTuple

from moco.config.pretrained import with_usual_settings
from moco.config.train import AugmentationConfig
from moco.errors import InputError
from moco.models.backbones import build_backbone
from moco.models.swin.backbone import Swin
from moco.weights.loading import load_pretrained, log_window_advice

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


def untrained_backbone(
    given: dict[str, Any],
    image_size: int | None,
    mean: list[float] | None,
    std: list[float] | None,
) -> StartingBackbone:
    """Return a backbone with random weights.

    Args:
        given: arguments of `build_backbone`.
        image_size: px; it has to be given.
        mean, std: None: ImageNet's.

    Raises:
        InputError: the backbone or the image size is not given.
    """
    if "name" not in given:
        raise InputError("backbone: missing; without a checkpoint give backbone=NAME")
    if image_size is None:
        raise InputError("image_size: missing; without a checkpoint give image_size=PIXELS")
    default = AugmentationConfig()
    backbone = build_backbone(**given)
    return StartingBackbone(backbone, given, image_size, mean or default.mean, std or default.std)


def pretrained_backbone(
    checkpoint: str,
    encoder: str,
    given: dict[str, Any],
    image_size: int | None,
    mean: list[float] | None,
    std: list[float] | None,
) -> StartingBackbone:
    """Return the backbone of a checkpoint.

    Args:
        checkpoint: the path of any file of weights.
        encoder: ``query`` or ``key``.
        given: arguments of `build_backbone` that the user gave, see `load_pretrained`.
        image_size: px; None: the checkpoint's.
        mean, std: None: the checkpoint's, or ImageNet's if it does not say them.

    Raises:
        InputError: the checkpoint cannot be used, has another backbone than was asked for, or does
            not say the image size.
    """
    pretrained = load_pretrained(checkpoint, encoder, given)
    config = with_usual_settings(pretrained.config)
    image_size = image_size or config["data"]["image_size"]
    if image_size is None:
        raise InputError(
            f"image_size: missing; {checkpoint} does not say it, give image_size=PIXELS"
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
    augmentation = config["augmentation"]
    return StartingBackbone(
        backbone, settings, image_size, mean or augmentation["mean"], std or augmentation["std"]
    )
