"""Where the places of a view are in its image.

A placement is an affine map, (2, 3): it takes a place (x, y, 1) of the view to its place (x, y) in
the image. Both are fractions of the sides, x from left to right and y from top to bottom, so that
(0, 0) is the top left corner and (1, 1) the bottom right one. A crop of half the width at the left
edge is ((0.5, 0, 0), (0, 1, 0)); the same crop, mirrored, is ((-0.5, 0, 0.5), (0, 1, 0)).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def affine_maps(rows: Sequence[Sequence[Tensor | float]], like: Tensor) -> Tensor:
    """Return maps (batch, 2, 3) from their six numbers.

    Args:
        rows: two rows of three numbers; each is (batch,), or the same for all images.
        like: (batch,) float64 on the device of the maps.
    """
    lines = []
    for row in rows:
        numbers = [torch.zeros_like(like) + number for number in row]
        lines.append(torch.stack(numbers, dim=1))
    return torch.stack(lines, dim=1)


def identity_maps(like: Tensor) -> Tensor:
    """Return maps (batch, 2, 3) that leave each place where it is; `like` is (batch,)."""
    return affine_maps([[1, 0, 0], [0, 1, 0]], like)


def composed(outer: Tensor, inner: Tensor) -> Tensor:
    """Return the maps (batch, 2, 3) that apply `inner` and then `outer`, (batch, 2, 3) each."""
    linear = outer[:, :, :2] @ inner[:, :, :2]
    shift = outer[:, :, :2] @ inner[:, :, 2:] + outer[:, :, 2:]
    return torch.cat([linear, shift], dim=2)


def crop_maps(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Return the maps of crops, (batch, 2, 3) float64.

    Args:
        boxes: (batch, 4), top, left, height, width, px.
        sizes: (batch, 2), height and width of the images, px.
    """
    top, left, box_height, box_width = boxes.double().unbind(1)
    height, width = sizes.double().unbind(1)
    zero = torch.zeros_like(top)
    first_row = [box_width / width, zero, left / width]
    second_row = [zero, box_height / height, top / height]
    return affine_maps([first_row, second_row], height)


def turn_maps(turns: Tensor) -> Tensor:
    """Return the maps of quarter turns to the left of square images, (batch, 2, 3) float64.

    Args:
        turns: (batch,) int64, in 0..3.
    """
    cos = (turns == 0).double() - (turns == 2).double()
    sin = (turns == 1).double() - (turns == 3).double()
    # About the middle: what a turn to the left moved up came from the right.
    return about_middle(cos, -sin, sin, cos)


def about_middle(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Return maps (batch, 2, 3) by the matrix ((a, b), (c, d)) that keep the middle in its place.

    Args:
        a, b, c, d: (batch,) float64.
    """
    first_row = [a, b, 0.5 - 0.5 * (a + b)]
    second_row = [c, d, 0.5 - 0.5 * (c + d)]
    return affine_maps([first_row, second_row], a)
