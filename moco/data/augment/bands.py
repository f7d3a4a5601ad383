"""Operations on the bands of an image, for images that need not be RGB."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from moco.data.augment import image_kernels
from moco.data.augment.draws import seeded_uniforms, seeds_from
from moco.data.augment.operation import (
    Drawn,
    ImageKind,
    Numbers,
    Operation,
    about_one,
    between,
)


@dataclass
class BandJitter(Operation):
    """Change gamma, contrast and brightness of each band.

    A value x becomes x ** gamma. Then it is moved away from the mean of its band in this image
    (contrast), multiplied (brightness) and clipped to 0..1. It is the colour jitter of images that
    are not RGB: torchgeo's MoCo and SSL4EO-S12 (arXiv 2211.07044) keep brightness and contrast of
    colour jitter for satellite images, and leave out saturation and hue.

    Args:
        brightness, contrast: the factor is drawn from 1 - x to 1 + x.
        gamma: the exponent is drawn from 1 / (1 + x) to 1 + x, evenly on a logarithmic scale.
        shared: all bands of an image have the same factors, as in torchgeo and SSL4EO-S12. By
            default each band has its own.
    """

    brightness: float = 0
    contrast: float = 0
    gamma: float = 0
    shared: bool = False
    num_draws: ClassVar[int] = 1
    limits: ClassVar = dict.fromkeys(("brightness", "contrast", "gamma"), (0, 100))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.shared, bool):
            raise ValueError(f"shared={self.shared}: expected true or false")

    def draw(self, draws: Tensor, sizes: Tensor) -> Drawn:
        bands = self.image_kind.bands
        num_factors = bands
        if self.shared:
            num_factors = 1
        # The number of draws may not depend on the bands, so that they come from a seed.
        numbers = seeded_uniforms(seeds_from(draws[:, 0]), 3 * num_factors)
        brightness, contrast, gamma = numbers.view(-1, 3, num_factors).unbind(1)
        drawn = {
            "brightness": about_one(self.brightness, brightness),
            "contrast": about_one(self.contrast, contrast),
            "gamma": (1 + self.gamma) ** between([-1, 1], gamma),
        }
        for name, values in drawn.items():
            drawn[name] = values.expand(-1, bands)
        return drawn

    def on_image(self, image: np.ndarray, drawn: Numbers) -> np.ndarray:
        if image.dtype == np.uint8 or self.gamma > 0:
            return super().on_image(image, drawn)
        return image_kernels.band_jitter(image, drawn["brightness"], drawn["contrast"])

    def on_batch(self, images: Tensor, drawn: Drawn) -> Tensor:
        brightness = per_band(drawn["brightness"], images)
        contrast = per_band(drawn["contrast"], images)
        if self.gamma > 0:
            # Rounding can leave a value just below 0, which has no power.
            images = images.clamp(min=0) ** per_band(drawn["gamma"], images)
        if self.contrast == 0:
            return (images * brightness).clamp_(0, 1)
        mean = images.mean((2, 3), keepdim=True)
        added = (1 - contrast) * mean * brightness
        return (images * (contrast * brightness)).add_(added).clamp_(0, 1)

    def describe(self, drawn: Numbers) -> str:
        words = []
        for name in ("gamma", "contrast", "brightness"):
            if getattr(self, name) > 0:
                words.append(f"{name} {factors_in_words(drawn[name])}")
        return ", ".join(words)


@dataclass
class BandMean(Operation):
    """Put the mean of all bands into all bands, the grey of images that are not RGB (torchgeo)."""

    def on_batch(self, images: Tensor, drawn: Drawn) -> Tensor:
        return images.mean(1, keepdim=True).expand_as(images)


@dataclass
class BandDrop(Operation):
    """Set random bands to 0. One band, which is drawn too, always stays.

    It is the channel dropout of albumentations.

    Args:
        fraction: how probable it is for a band to be dropped.
    """

    fraction: float = 0.2
    num_draws: ClassVar[int] = 1
    limits: ClassVar = {"fraction": (0, 1)}

    def check_kind(self, kind: ImageKind) -> None:
        if kind.bands == 1:
            raise ValueError("it needs at least 2 bands, the images have 1; leave it out")

    def draw(self, draws: Tensor, sizes: Tensor) -> Drawn:
        bands = self.image_kind.bands
        numbers = seeded_uniforms(seeds_from(draws[:, 0]), bands + 1)
        is_kept = numbers[:, 1:] >= self.fraction
        always = (numbers[:, :1] * bands).long()
        return {"kept": is_kept.scatter(1, always, True)}

    def on_batch(self, images: Tensor, drawn: Drawn) -> Tensor:
        return images * per_band(drawn["kept"], images)

    def describe(self, drawn: Numbers) -> str:
        dropped = []
        for band, is_kept in enumerate(drawn["kept"].tolist(), start=1):
            if not is_kept:
                dropped.append(str(band))
        if not dropped:
            return "of no band"
        return f"of band {', '.join(dropped)}"


def per_band(values: Tensor, images: Tensor) -> Tensor:
    """Return numbers (batch, bands) as (batch, bands, 1, 1), in the type of the images."""
    return values.to(images.dtype)[:, :, None, None]


def factors_in_words(factors: Any) -> str:
    """Return the factor of all bands, or the smallest and the largest."""
    low, high = float(factors.min()), float(factors.max())
    if low == high:
        return f"{low:.2f}"
    return f"{low:.2f} to {high:.2f}"
