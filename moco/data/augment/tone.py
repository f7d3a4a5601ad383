"""Tone and detail: a random curve of values, local contrast, and sharpness."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.data.augment.draws import seeded_uniforms, seeds_from
from moco.data.augment.operation import (
    Drawn,
    Numbers,
    Operation,
    about_one,
    between,
    per_image,
)

NUM_LEVELS = 256  # of the histograms of local contrast


@dataclass
class HistogramShift(Operation):
    """Move values along a random curve that never falls; all bands of an image have the same one.

    The curve is a line through points at equal distances. Black and white stay. In order, each
    other point is moved to a random height between the point before it, which has been moved, and
    the point after it, which has not. This is the random histogram shift of MONAI.

    Args:
        num_points: with black and white. Fewer points are larger changes.
    """

    num_points: int = 10
    num_draws: ClassVar[int] = 1
    limits: ClassVar = {"num_points": (3, 256)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.num_points, int):
            raise ValueError(f"num_points={self.num_points}: expected a whole number")

    def draw(self, draws: Tensor, sizes: Tensor) -> Drawn:
        last = self.num_points - 1
        numbers = seeded_uniforms(seeds_from(draws[:, 0]), last - 1)
        heights = [torch.zeros_like(numbers[:, 0])]
        for place in range(1, last):
            below = heights[-1]
            above = (place + 1) / last
            heights.append(below + (above - below) * numbers[:, place - 1])
        heights.append(torch.ones_like(numbers[:, 0]))
        return {"heights": torch.stack(heights, 1)}

    def on_batch(self, images: Tensor, drawn: Drawn) -> Tensor:
        last = self.num_points - 1
        heights = drawn["heights"].to(images.dtype)
        slopes = heights.diff(dim=1)
        places = images.flatten(1) * last  # (batch, values)
        before = places.long().clamp_(0, last - 1)
        rest = places - before
        changed = heights.gather(1, before).addcmul_(rest, slopes.gather(1, before))
        return changed.clamp_(0, 1).view(images.shape)

    def describe(self, drawn: Numbers) -> str:
        middle = drawn["heights"][self.num_points // 2]
        return f"{(self.num_points // 2) / (self.num_points - 1):.2f} becomes {middle:.2f}"


@dataclass
class LocalContrast(Operation):
    """Equalize the histogram of each tile of each band, with a limit to the contrast (CLAHE).

    Each tile has a histogram of 256 levels. Levels above the limit are cut, and what is cut is
    shared out over all levels. The sum over the lower levels is the new value; between the levels
    and between the middles of the tiles it is interpolated, so that 16 bits stay 16 bits. It is the
    method of Zuiderveld (Graphics Gems IV, 1994) as in OpenCV, which works on 8 bits.

    Args:
        clip_limit: smallest and largest limit, as a multiple of the mean of a histogram. 1 changes
            little.
        tiles: in each direction.
    """

    clip_limit: Sequence[float] = (1.0, 4.0)
    tiles: int = 8
    num_draws: ClassVar[int] = 1
    limits: ClassVar = {"tiles": (1, 64)}
    pair_limits: ClassVar = {"clip_limit": (1, 256)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.tiles, int):
            raise ValueError(f"tiles={self.tiles}: expected a whole number")

    def draw(self, draws: Tensor, sizes: Tensor) -> Drawn:
        return {"clip_limit": between(self.clip_limit, draws[:, 0])}

    def on_batch(self, images: Tensor, drawn: Drawn) -> Tensor:
        return equalized_tiles(images, drawn["clip_limit"], self.tiles)

    def describe(self, drawn: Numbers) -> str:
        return f"up to {drawn['clip_limit']:.1f}"


def equalized_tiles(images: Tensor, clip_limit: Tensor, tiles: int) -> Tensor:
    """Equalize images (batch, bands, height, width) in 0..1; see `LocalContrast`.

    Args:
        clip_limit: (batch,).
        tiles: in each direction, at most the side of the images.
    """
    num, bands, height, width = images.shape
    row_tiles = min(tiles, height)
    column_tiles = min(tiles, width)
    curves = tile_curves(images, clip_limit, row_tiles, column_tiles)
    curves = curves.view(num * bands, -1)  # (batch * bands, tiles * levels)

    level = images.reshape(num * bands, height, width) * (NUM_LEVELS - 1)
    lower = level.long().clamp_(0, NUM_LEVELS - 2)
    rest = level - lower
    above, below, row_share = nearest_tiles(height, row_tiles, images)
    left, right, column_share = nearest_tiles(width, column_tiles, images)

    def value_of(row_tile: Tensor, column_tile: Tensor) -> Tensor:
        tile = row_tile[:, None] * column_tiles + column_tile  # (height, width)
        place = (tile * NUM_LEVELS + lower).flatten(1)
        value = curves.gather(1, place)
        next_value = curves.gather(1, place + 1)
        return torch.lerp(value, next_value, rest.flatten(1)).view_as(level)

    upper = torch.lerp(value_of(above, left), value_of(above, right), column_share)
    lower_row = torch.lerp(value_of(below, left), value_of(below, right), column_share)
    return torch.lerp(upper, lower_row, row_share[:, None]).view(images.shape)


def tile_curves(images: Tensor, clip_limit: Tensor, row_tiles: int, column_tiles: int) -> Tensor:
    """Return the new value of each level in each tile, (batch, bands, tiles, levels) in 0..1."""
    num, bands, height, width = images.shape
    rows = torch.arange(height, device=images.device) * row_tiles // height
    columns = torch.arange(width, device=images.device) * column_tiles // width
    tile = rows[:, None] * column_tiles + columns  # (height, width)
    level = (images * (NUM_LEVELS - 1)).round_().long().clamp_(0, NUM_LEVELS - 1)
    place = (tile * NUM_LEVELS + level).flatten(2)  # (batch, bands, values)
    num_places = row_tiles * column_tiles * NUM_LEVELS
    counts = images.new_zeros(num, bands, num_places)
    counts.scatter_add_(2, place, torch.ones_like(place, dtype=images.dtype))
    counts = counts.view(num, bands, row_tiles * column_tiles, NUM_LEVELS)
    shares = counts / counts.sum(3, keepdim=True)
    # As in OpenCV, the limit is at least one pixel.
    limit = per_image(clip_limit, images) / NUM_LEVELS
    limit = torch.maximum(limit, 1 / counts.sum(3, keepdim=True))
    cut = (shares - limit).clamp_(min=0).sum(3, keepdim=True)
    shares = torch.minimum(shares, limit) + cut / NUM_LEVELS
    return shares.cumsum(3).clamp_(max=1)


def nearest_tiles(size: int, tiles: int, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tiles before and after each pixel of a line, and the share of the second."""
    pixels = torch.arange(size, device=images.device, dtype=images.dtype)
    place = (pixels + 0.5) * (tiles / size) - 0.5
    before = place.floor()
    share = place - before
    first = before.long().clamp_(0, tiles - 1)
    second = (before.long() + 1).clamp_(0, tiles - 1)
    return first, second, share


@dataclass
class Sharpness(Operation):
    """Blend with a smoothed image. A factor above 1 sharpens, a lower one smooths.

    The smoothed image is that of Pillow and torchvision: the mean of 3 x 3 pixels, in which the
    middle counts five times. The pixels at the edges stay.

    Args:
        sharpness: the factor is drawn from 1 - x to 1 + x.
    """

    sharpness: float = 0.5
    num_draws: ClassVar[int] = 1
    limits: ClassVar = {"sharpness": (0, 100)}

    def draw(self, draws: Tensor, sizes: Tensor) -> Drawn:
        return {"factor": about_one(self.sharpness, draws[:, 0])}

    def on_batch(self, images: Tensor, drawn: Drawn) -> Tensor:
        height, width = images.shape[2:]
        if height < 3 or width < 3:
            return images
        sums = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
        sums = sums[..., :-2] + sums[..., 1:-1] + sums[..., 2:]
        inner = images[:, :, 1:-1, 1:-1]
        smooth = sums.add_(inner, alpha=4).mul_(1 / 13)
        detail = (inner - smooth).mul_(per_image(drawn["factor"], images) - 1)
        return (images + F.pad(detail, (1, 1, 1, 1))).clamp_(0, 1)

    def describe(self, drawn: Numbers) -> str:
        return f"{drawn['factor']:.2f}"
