"""A backbone with random weights, to be measured as a checkpoint is."""

from typing import Any

import torch
from torch import nn

from moco.models.backbones import build_backbone, settings_of_backbone
from moco.models.encoder import Encoder
from moco.weights.architecture import RGB_BANDS, settings_of
from moco.weights.inflation import check_bands
from moco.weights.load_encoder import Pretrained


def build_untrained(given: dict[str, Any], seed: int) -> Pretrained:
    """Return an encoder with random weights and without a projector, in eval mode.

    Args:
        given: the arguments of `build_backbone`.
        seed: of the weights. The random state of the process does not change.

    Raises:
        InputError: there is no such backbone.
    """
    backbone = seeded_backbone(given, seed)
    return Pretrained(
        encoder=Encoder(backbone, nn.Identity()).eval(),
        settings=settings_of(backbone, given),
        config={},
        epoch=0,
        step=0,
        feature="backbone",
        window_size=getattr(backbone, "window_size", None),
    )


def rebuild_for_data(
    pretrained: Pretrained, given: dict[str, Any], seed: int, image_size: int, bands: int
) -> None:
    """Build the backbone again for images that are known now: their bands and their size.

    Args:
        pretrained: from `build_untrained`; its encoder is changed in place.
        given, seed: as there.
        image_size: side of the images, px.
        bands: of the images.
    """
    settings = dict(given)
    # As in training, a backbone of RGB images has no setting for that.
    if bands != RGB_BANDS:
        settings.setdefault("in_channels", bands)
    if "image_size" in settings_of_backbone(given["name"]):
        settings.setdefault("image_size", image_size)
    encoder = pretrained.encoder
    if settings != given:
        device = next(encoder.parameters()).device
        encoder.backbone = seeded_backbone(settings, seed).to(device).eval()
    check_bands(encoder.backbone, bands, "backbone.in_channels")


def seeded_backbone(settings: dict[str, Any], seed: int) -> Any:
    """Return a backbone whose random weights depend on the seed alone."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return build_backbone(**settings)
