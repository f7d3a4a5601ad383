"""Weights of RGB networks for images with another number of bands."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from moco.errors import InputError
from moco.weights.library_names import Weights

log = logging.getLogger(__name__)

RGB_BANDS = 3


def inflated(weight: Tensor, bands: int) -> Tensor:
    """Return the weight of an RGB network's first convolution for images of `bands` bands.

    Every band gets the mean over RGB, times 3 / bands. If all bands are alike, the result of the
    convolution is that of a grey image in three channels. For one band this is timm's rule, the sum
    over RGB. For more bands timm repeats red, green and blue, which other bands are not.

    Args:
        weight: (channels, 3, height, width).

    Returns:
        (channels, bands, height, width).
    """
    mean = weight.mean(dim=1, keepdim=True) * (RGB_BANDS / bands)
    return mean.repeat(1, bands, 1, 1)


def first_convolution(backbone: nn.Module) -> tuple[str, nn.Conv2d] | None:
    """Return name and module of the convolution that reads the images; None if there is none."""
    # Networks define their stem before the layers that follow it.
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Conv2d):
            return name, module
    return None


def fit_bands(weights: Weights, backbone: nn.Module, *, is_logged: bool = True) -> Weights:
    """Return the weights of an RGB network, inflated if the backbone reads other bands.

    Args:
        weights: the backbone's, under our names.
        backbone: what they are for.
        is_logged: say it in the log.
    """
    found = first_convolution(backbone)
    if found is None:
        return weights
    name, stem = found
    weight = weights.get(f"{name}.weight")
    if weight is None or weight.ndim != 4 or stem.groups != 1:
        return weights
    bands = stem.in_channels
    if weight.shape[1] != RGB_BANDS or bands == RGB_BANDS:
        return weights
    if is_logged:
        log_inflation(f"{name}.weight", bands)
    return weights | {f"{name}.weight": inflated(weight, bands)}


def widen_stem(backbone: Any, bands: int, source: str) -> None:
    """Make a backbone of RGB images one of `bands` bands, in place; do nothing if it is one.

    Args:
        source: where the backbone is from, for messages.

    Raises:
        InputError: it reads another number of bands, and is no network of RGB images.
    """
    found = first_convolution(backbone)
    if found is None:
        return
    name, stem = found
    if stem.in_channels == bands or stem.groups != 1:
        return
    if stem.in_channels != RGB_BANDS:
        check_bands(backbone, bands, source)
    log_inflation(f"{name}.weight", bands)
    with torch.no_grad():
        stem.weight = nn.Parameter(
            inflated(stem.weight, bands), requires_grad=stem.weight.requires_grad
        )
    stem.in_channels = bands


def check_bands(backbone: Any, bands: int, source: str) -> None:
    """Raise InputError, which begins with `source`, if a backbone reads other images."""
    found = first_convolution(backbone)
    if found is not None and found[1].in_channels != bands and found[1].groups == 1:
        raise InputError(
            f"{source}: its backbone reads images of {found[1].in_channels} bands, and these have "
            f"{bands}; data.bands=[...] chooses bands"
        )


def log_inflation(name: str, bands: int) -> None:
    """Say that the weights of RGB are used for other bands."""
    number = f"{bands} bands"
    if bands == 1:
        number = "1 band"
    log.info("%s: from RGB to %s, each with the mean over RGB times 3 / %d", name, number, bands)
