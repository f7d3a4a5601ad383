"""The backbone that fine-tuning starts from: a checkpoint's, or one with random weights."""

import logging
from typing import Any, NamedTuple

from moco.config.pretrained import (
    given_settings,
    image_size_of,
    with_defaults,
    with_usual_settings,
)
from moco.config.segment import SegmentConfig
from moco.data.sources.pixel_values import RGB_BANDS
from moco.data.sources.source import PIXEL_SETTINGS
from moco.errors import InputError
from moco.models.backbones import build_backbone
from moco.weights.inflation import widen_stem
from moco.weights.load_encoder import load_pretrained, log_window_advice
from moco.weights.pretrained_decoder import PretrainedDecoder

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
    pixel_settings: dict[str, Any]
    """How the pretraining made its pixels."""
    is_pretrained: bool
    decoder: PretrainedDecoder | None = None
    """The decoder that was pretrained with it, if any."""


def find_backbone(config: SegmentConfig) -> StartingBackbone:
    """Return the backbone of the checkpoint, or one with random weights without a checkpoint.

    Raises:
        InputError: the checkpoint cannot be used or has another backbone than was asked for, or the
            backbone or the image size is neither given nor known.
    """
    given = given_settings(config.backbone)
    pretrained = None
    if config.checkpoint is not None:
        pretrained = load_pretrained(
            config.checkpoint, config.encoder, given, trust_targets=config.trust_targets
        )
    elif "name" not in given:
        raise InputError("backbone: missing; without a checkpoint give backbone=NAME")
    of_run = with_usual_settings(pretrained.config if pretrained else {})
    image_size = image_size_of(config, of_run["data"])
    if pretrained is None:
        if config.freeze_backbone:
            log.warning(
                "freeze_backbone=true and checkpoint=null: the backbone stays at its random weights"
            )
        backbone = build_backbone(**given)
        settings = given
    else:
        backbone = pretrained.encoder.backbone
        log.info(
            "weights: the %s encoder of %s, after %d epochs and %d steps",
            config.encoder,
            config.checkpoint,
            pretrained.epoch,
            pretrained.step,
        )
        log_window_advice(pretrained, given, image_size)
        # A patch projection that pretraining kept frozen is trained, unless it is frozen here too.
        both = pretrained.settings | {"freeze_patch_embed": given.get("freeze_patch_embed")}
        settings = {key: value for key, value in both.items() if value is not None}
    look = with_defaults(config.augmentation, of_run["augmentation"])
    pixel_settings = {key: of_run["data"].get(key) for key in PIXEL_SETTINGS}
    return StartingBackbone(
        backbone,
        settings,
        image_size,
        look["mean"],
        look["std"],
        pixel_settings,
        is_pretrained=pretrained is not None,
        decoder=None if pretrained is None else pretrained.decoder,
    )


def with_bands(start: StartingBackbone, bands: int) -> StartingBackbone:
    """Return the backbone for images of `bands` bands.

    Pretrained weights of RGB images are inflated. Without a checkpoint the backbone is built anew.

    Raises:
        InputError: it was pretrained on images of other bands.
    """
    if bands == start.settings.get("in_channels", RGB_BANDS):
        return start
    settings = start.settings | {"in_channels": bands}
    if not start.is_pretrained:
        return start._replace(backbone=build_backbone(**settings), settings=settings)
    widen_stem(start.backbone, bands, "checkpoint")
    return start._replace(settings=settings)
