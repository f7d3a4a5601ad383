"""Noise, and a square that is cut out.

Noise needs a number for each value of an image. They come from a seed of the image by the hash of
all draws, so that they are the same bits in both engines and in a resumed run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moco.data.augment.draws import seeded_normals, seeds_from
from moco.data.augment.operation import Drawn, Numbers, Operation, between, per_image


@dataclass
class GaussianNoise(Operation):
    """Add Gaussian noise, and clip to 0..1.

    Args:
        sigma: smallest and largest standard deviation, as fractions of the range of values.
    """

    sigma: Sequence[float] = (0.0, 0.05)
    num_draws: ClassVar[int] = 2
    pair_limits: ClassVar = {"sigma": (0, 1)}

    def draw(self, draws: Tensor, sizes: Tensor) -> Drawn:
        sigma = between(self.sigma, draws[:, 0])
        return {"sigma": sigma, "seed": seeds_from(draws[:, 1])}

    def on_batch(self, images: Tensor, drawn: Drawn) -> Tensor:
        noise = normals_like(images, drawn["seed"])
        noise.mul_(per_image(drawn["sigma"], images))
        return noise.add_(images).clamp_(0, 1)

    def describe(self, drawn: Numbers) -> str:
        return f"sigma {drawn['sigma']:.3f}"


@dataclass
class PoissonNoise(Operation):
    """Count photons: their number has a Poisson distribution whose mean is the value of the pixel.

    The count is the quantile of a normal number, by the Cornish-Fisher expansion to second order
    (doi.org/10.2307/1400905), rounded. The mean is that of the Poisson distribution to within 0.05
    photons, and the variance to within 0.15. Black stays black.

    Args:
        photons: smallest and largest mean count of a white pixel. Fewer photons are more noise.
    """

    photons: Sequence[float] = (100.0, 1000.0)
    num_draws: ClassVar[int] = 2
    pair_limits: ClassVar = {"photons": (1, 1e6)}

    def draw(self, draws: Tensor, sizes: Tensor) -> Drawn:
        photons = between(self.photons, draws[:, 0])
        return {"photons": photons, "seed": seeds_from(draws[:, 1])}

    def on_batch(self, images: Tensor, drawn: Drawn) -> Tensor:
        photons = per_image(drawn["photons"], images)
        mean = images.clamp(min=0) * photons  # rounding can leave a value just below 0
        normals = normals_like(images, drawn["seed"])
        skewness = (normals**2).sub_(1).mul_(1 / 6)
        counts = normals.mul_(mean.sqrt()).add_(mean).add_(skewness).round_()
        counts.mul_(images > 0)  # black stays black
        return counts.div_(photons).clamp_(0, 1)

    def describe(self, drawn: Numbers) -> str:
        return f"{drawn['photons']:.0f} photons"


@dataclass
class Cutout(Operation):
    """Replace a square by the mean of each band (arXiv 1708.04552).

    Its middle can be any pixel, so that a part of the square may lie outside of the image. Differs
    from the paper: the mean is the image's and not the dataset's, and the side is random.

    Args:
        side: smallest and largest side, as fractions of the shorter side of the image.
    """

    side: Sequence[float] = (0.1, 0.4)
    num_draws: ClassVar[int] = 3
    pair_limits: ClassVar = {"side": (0, 1)}

    def draw(self, draws: Tensor, sizes: Tensor) -> Drawn:
        shorter = sizes.min(1, keepdim=True).values
        side = torch.round(between(self.side, draws[:, :1]) * shorter)
        middle = torch.floor(draws[:, 1:] * sizes)
        start = middle - torch.floor(side / 2)
        return {"start": start.long(), "end": (start + side).long()}

    def on_batch(self, images: Tensor, drawn: Drawn) -> Tensor:
        height, width = images.shape[2:]
        top, left = drawn["start"][:, :, None].unbind(1)  # (batch, 1)
        bottom, right = drawn["end"][:, :, None].unbind(1)
        rows = torch.arange(height, device=images.device)
        columns = torch.arange(width, device=images.device)
        is_row = (rows >= top) & (rows < bottom)  # (batch, height)
        is_column = (columns >= left) & (columns < right)  # (batch, width)
        is_inside = is_row[:, None, :, None] & is_column[:, None, None, :]
        means = images.mean((2, 3), keepdim=True)  # (batch, bands, 1, 1)
        return torch.where(is_inside, means, images)

    def describe(self, drawn: Numbers) -> str:
        top, left = drawn["start"].tolist()
        side = int(drawn["end"][0]) - top
        return f"{side} x {side} px at {top}, {left}"


def normals_like(images: Tensor, seeds: Tensor) -> Tensor:
    """Return a normal number for each value of images (batch, bands, height, width)."""
    num, bands, height, width = images.shape
    # In the order of arrays (height, width, bands), which saves loader processes a copy.
    normals = seeded_normals(seeds, height * width * bands)
    return normals.view(num, height, width, bands).permute(0, 3, 1, 2)
