"""The geometry of attention windows: which cells of a map each holds, which see each other, and how far apart they are.

Letters: N batch, C channels, H W cells of a map, B windows of a whole batch, L cells of a window, h heads.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Size = tuple[int, int]

T = TypeVar("T")


GRID_TENSORS = ("cells", "places", "filling", "whole", "cut", "mask")


def constant_of_sizes(function: Callable[..., T]) -> Callable[..., T]:
    """Keep what a pure function makes of sizes and a device; torch.compile takes the results as constants.

    Compiled code reads the kept tensors where they are. It neither traces the function nor copies anything to the device
    in a step. The arguments must be hashable, and no result may depend on anything else, such as weights.
    """
    kept = lru_cache(maxsize=512)(
        torch.inference_mode(False)(function)
    )  # what is kept serves training too

    @wraps(function)
    def constant(*arguments: Any) -> T:
        return kept(*arguments)

    return torch.compiler.assume_constant_result(constant)


@dataclass(frozen=True, eq=False)
class WindowGrid:
    """How a map of P cells is cut into windows that hold Q cells together, padding included."""

    window: Size
    """Height and width of a window, clipped to the map."""
    num_windows: int
    """Windows of one map."""
    cells: Tensor
    """(Q,) int64: which cell of the map each cell of the windows is, window after window; for padding any one."""
    places: Tensor
    """(P,) int64: where among the windows' cells each cell of the map is."""
    filling: Tensor
    """(p,) int64: the windows' cells that are no cells of the map."""
    whole: Tensor
    """(w,) int64: the windows whose cells all see each other."""
    cut: Tensor
    """(b,) int64: the windows that hold cells which must not see each other."""
    mask: Tensor
    """(b, L, L) float32, of the windows `cut`: 0 where a cell (row) sees a cell (column), -inf where not."""


def window_grid(
    canvas: Size, size: Size, window: Size, shifted: bool, device: torch.device
) -> WindowGrid:
    """Return the windows of a map of `canvas` cells whose top left `size` cells are real; the rest is padding.

    A side of the canvas that is no multiple of the window is filled up with padding, at its end and before the cyclic
    shift. Cells see each other if they are real, and neighbours in the map and not only by the cyclic shift. Padding sees
    padding, so that no row of attention is empty.
    """
    height, width = min(window[0], size[0]), min(window[1], size[1])
    num_windows = -(-canvas[0] // height) * -(-canvas[1] // width)
    tensors = [grid_tensor(name, canvas, size, window, shifted, device) for name in GRID_TENSORS]
    return WindowGrid((height, width), num_windows, *tensors)


# One tensor a call: torch.compile of torch 2.11 takes no other constants.
@constant_of_sizes
def grid_tensor(
    name: str, canvas: Size, size: Size, window: Size, shifted: bool, device: torch.device
) -> Tensor:
    """Return one of the tensors of a `WindowGrid` by its name."""
    return grid_tensors(canvas, size, window, shifted)[name].to(device)


@lru_cache(maxsize=8)  # for the six calls of a grid
def grid_tensors(canvas: Size, size: Size, window: Size, shifted: bool) -> dict[str, Tensor]:
    """Return the tensors of a `WindowGrid` by name, on the CPU."""
    sides = []
    for length, real, cells in zip(canvas, size, window, strict=True):
        clipped = min(cells, real)
        shift = clipped // 2 if shifted and clipped < real else 0
        filled = -(-length // clipped) * clipped
        position = torch.arange(filled) + shift  # of the shifted map's cells
        sides.append((clipped, position % filled, position >= filled, position % filled < real))
    (height, rows, row_wraps, row_is_real), (width, columns, column_wraps, column_is_real) = sides
    window = (height, width)
    is_real = row_is_real[:, None] & column_is_real
    group = torch.where(is_real, row_wraps[:, None] * 2 + column_wraps, 4)
    group = partition(group[None, :, :, None], window)[..., 0]  # (windows of one map, L)
    cell = rows[:, None] * canvas[1] + columns
    is_there = (rows < canvas[0])[:, None] & (columns < canvas[1])
    cell, is_there = (partition(x[None, :, :, None], window).flatten() for x in (cell, is_there))
    places = torch.empty(canvas[0] * canvas[1], dtype=torch.int64)
    places[cell[is_there]] = torch.arange(len(cell))[is_there]
    sees = group[:, :, None] == group[:, None, :]
    is_whole = sees.all(dim=(1, 2))
    cut = (~is_whole).nonzero()[:, 0]
    return {
        "cells": cell.where(is_there, 0),
        "places": places,
        "filling": (~is_there).nonzero()[:, 0],
        "whole": is_whole.nonzero()[:, 0],
        "cut": cut,
        "mask": torch.zeros(len(cut), *sees.shape[1:]).masked_fill_(~sees[cut], -math.inf),
    }


def partition(x: Tensor, window: Size) -> Tensor:
    """Maps (N, H, W, C), H and W multiples of the window, to windows (B, L, C): of one map row by row, map after map."""
    n, height, width, channels = x.shape
    x = x.view(n, height // window[0], window[0], width // window[1], window[1], channels)
    return x.transpose(2, 3).reshape(-1, window[0] * window[1], channels)


def into_windows(x: Tensor, grid: WindowGrid) -> Tensor:
    """Maps' cells (N, P, C) to windows' cells (N, Q, C): one copy, in place of a pad, a roll and a partition."""
    return _Rearranged.apply(x, grid.cells, grid.places, grid.cells[:0])


def out_of_windows(x: Tensor, grid: WindowGrid) -> Tensor:
    """Windows' cells (N, Q, C) to maps' cells (N, P, C): undo of `into_windows`."""
    return _Rearranged.apply(x, grid.places, grid.cells, grid.filling)


class _Rearranged(torch.autograd.Function):
    """Rows by their numbers, with a backward pass that takes too, where autograd's own would add up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, take: Tensor, back: Tensor, unused: Tensor) -> Tensor:
        """`take` leads there, `back` back, and rows of x that are in `unused` have no gradient."""
        ctx.back, ctx.unused = back, unused
        return _rows(x, take)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _rows(grad, ctx.back).index_fill_(1, ctx.unused, 0), None, None, None


def _rows(x: Tensor, take: Tensor) -> Tensor:
    starts = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return (
        x.reshape(-1, x.shape[2])
        .index_select(0, (starts + take).flatten())
        .view(len(x), len(take), x.shape[2])
    )


@constant_of_sizes
def relative_positions(window: Size, device: torch.device) -> Tensor:
    """For each pair of cells of a window, its place in a list of offsets: (L L,) int64.

    The list holds the (2 window - 1)^2 offsets from (-window + 1, -window + 1) row by row; the offset is that of the first
    cell (the query) from the second.
    """
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in window), indexing="ij")
    down, right = (cells.flatten()[:, None] - cells.flatten() for cells in (rows, columns))
    return (
        ((down + window[0] - 1) * (2 * window[1] - 1) + right + window[1] - 1).flatten().to(device)
    )


@constant_of_sizes
def log_coordinates(window: Size, pretrained: Size, device: torch.device) -> Tensor:
    """Return the offsets in a window on V2's log scale: (2 window_h - 1, 2 window_w - 1, 2) float64.

    arXiv 2111.09883, section 3.3, equation 4, in the official code's form: sign(x) log2(1 + |8 x|) / log2(8), where x is
    the offset over the largest one of the pretraining window. Offsets beyond that one lie beyond log2(9) / 3 = 1.057.
    """
    axes = []
    for cells, reference in zip(window, pretrained, strict=True):
        offsets = torch.arange(1 - cells, cells, dtype=torch.float64) / max(reference - 1, 1) * 8
        axes.append(offsets.sign() * torch.log2(offsets.abs() + 1) / 3)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).to(device)
