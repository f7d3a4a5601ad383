"""The geometry of attention windows: which cells a window holds, and which of them see each other.

Shapes use N for the batch, H and W for the cells of a map, P for all cells of a map, Q for the
cells of its windows with their padding, L for the cells of one window, and C for channels.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moco.models.size_constants import Size, constant_of_sizes

GRID_TENSORS = ("cells", "places", "padding", "whole", "cut", "mask")


@dataclass(frozen=True, eq=False)
class WindowGrid:
    """How a map of P cells is cut into windows, which hold Q cells together."""

    window: Size
    """Height and width of a window, clipped to the map."""
    num_windows: int
    """Windows of one map."""
    cells: Tensor
    """(Q,) int64: which cell of the map each cell of the windows is; any cell for padding."""
    places: Tensor
    """(P,) int64: where among the windows' cells each cell of the map is."""
    padding: Tensor
    """Indices of the windows' cells that are not cells of the map."""
    whole: Tensor
    """Indices of the windows whose cells all see each other."""
    cut: Tensor
    """Indices of the windows with cells that must not see each other."""
    mask: Tensor
    """(len(cut), L, L) float32: 0 if a cell (row) sees a cell (column), -inf if it does not."""


def window_grid(size: Size, window: Size, shifted: bool, device: torch.device) -> WindowGrid:
    """Return the windows of a map.

    A side that is no multiple of the window is padded at its end, before the cyclic shift. Two
    cells see each other if both are real and they are neighbours in the map, not only by the cyclic
    shift. Padding sees padding, so that no row of the attention is empty.

    Args:
        size: (height, width) of the map, cells.
        window: (height, width) of the windows, cells. They are clipped to the map.
        shifted: whether the windows are shifted by half their side. A clipped side is not.
        device: of the tensors.
    """
    clipped = (min(window[0], size[0]), min(window[1], size[1]))
    num_windows = -(-size[0] // clipped[0]) * -(-size[1] // clipped[1])
    # torch.compile of torch 2.11 takes no other constants than single tensors.
    tensors = {}
    for name in GRID_TENSORS:
        tensors[name] = grid_tensor(name, size, clipped, shifted, device)
    return WindowGrid(clipped, num_windows, **tensors)


@constant_of_sizes
def grid_tensor(name: str, size: Size, window: Size, shifted: bool, device: torch.device) -> Tensor:
    """Return one of the tensors of a `WindowGrid` by its name."""
    return grid_tensors(size, window, shifted)[name].to(device)


@lru_cache(maxsize=8)  # for the six calls of one grid
def grid_tensors(size: Size, window: Size, shifted: bool) -> dict[str, Tensor]:
    """Return all tensors of a `WindowGrid` by name, on the CPU. The window fits into the map."""
    row, row_wraps = _shifted_side(size[0], window[0], shifted)
    column, column_wraps = _shifted_side(size[1], window[1], shifted)
    is_real = (row < size[0])[:, None] & (column < size[1])

    # Cells see each other if they are in one window and in one group.
    group = torch.where(is_real, row_wraps[:, None] * 2 + column_wraps, 4)
    group = _partition_cells(group, window)  # (windows, L)
    sees = group[:, :, None] == group[:, None, :]  # (windows, L, L)
    is_whole = sees.all(dim=(1, 2))  # (windows,)
    cut = (~is_whole).nonzero()[:, 0]
    is_hidden = ~sees[cut]  # (cut windows, L, L)
    mask = torch.zeros(is_hidden.shape).masked_fill_(is_hidden, -math.inf)

    numbers = row[:, None] * size[1] + column  # of the cells, row by row
    cell = _partition_cells(numbers, window).flatten()  # (Q,)
    is_real = _partition_cells(is_real, window).flatten()
    places = torch.empty(size[0] * size[1], dtype=torch.int64)
    places[cell[is_real]] = torch.arange(len(cell))[is_real]
    return {
        "cells": cell.where(is_real, 0),
        "places": places,
        "padding": (~is_real).nonzero()[:, 0],
        "whole": is_whole.nonzero()[:, 0],
        "cut": cut,
        "mask": mask,
    }


def _shifted_side(length: int, window: int, shifted: bool) -> tuple[Tensor, Tensor]:
    """Return one side of a map that is padded to whole windows and cyclically shifted.

    Returns:
        Where each of its cells comes from, and whether it came from the other end.
    """
    shift = 0
    if shifted and window < length:
        shift = window // 2
    filled = -(-length // window) * window
    unwrapped = torch.arange(filled) + shift
    return unwrapped % filled, unwrapped >= filled


def _partition_cells(cells: Tensor, window: Size) -> Tensor:
    """Return one number for each cell (H, W) window by window: (windows, L)."""
    height, width = cells.shape
    rows, columns = window
    cells = cells.view(height // rows, rows, width // columns, columns)
    return cells.transpose(1, 2).reshape(-1, rows * columns)


def into_windows(x: Tensor, grid: WindowGrid) -> Tensor:
    """Return the windows' cells (N, Q, C) of maps (N, P, C).

    This is one copy, in place of padding, a cyclic shift and a partition.
    """
    nothing = grid.cells[:0]
    return _RearrangeCells.apply(x, grid.cells, grid.places, nothing)


def out_of_windows(x: Tensor, grid: WindowGrid) -> Tensor:
    """Return the maps' cells (N, P, C) of windows (N, Q, C): undo `into_windows`."""
    return _RearrangeCells.apply(x, grid.places, grid.cells, grid.padding)


class _RearrangeCells(torch.autograd.Function):
    """Takes cells by their indices, forward and backward.

    The backward pass takes too, because each cell is used once. PyTorch's would add up.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, taken: Tensor, undo: Tensor, unused: Tensor) -> Tensor:
        """Return the cells `taken` of x (N, cells, C).

        Args:
            undo: the indices that lead back.
            unused: the cells of x that are not taken, and have a gradient of zero.
        """
        ctx.undo = undo
        ctx.unused = unused
        return _take_cells(x, taken)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        back = _take_cells(gradient, ctx.undo).index_fill_(1, ctx.unused, 0)
        return back, None, None, None


def _take_cells(x: Tensor, taken: Tensor) -> Tensor:
    """Return x[:, taken], by the faster way over one dimension."""
    num_maps, num_cells, channels = x.shape
    starts = torch.arange(num_maps, device=x.device)[:, None] * num_cells
    rows = (starts + taken).flatten()
    return x.reshape(-1, channels).index_select(0, rows).view(num_maps, len(taken), channels)


@constant_of_sizes
def relative_positions(window: Size, device: torch.device) -> Tensor:
    """Return for each pair of cells of a window its index in a list of offsets: (L * L,) int64.

    The list holds the (2 height - 1) * (2 width - 1) offsets row by row, from (1 - height, 1 -
    width) on. The offset is that of the first cell (the query) from the second one.
    """
    height, width = window
    rows = torch.arange(height).repeat_interleave(width)  # (L,)
    columns = torch.arange(width).repeat(height)
    down = rows[:, None] - rows + height - 1  # (L, L), from 0
    right = columns[:, None] - columns + width - 1
    return (down * (2 * width - 1) + right).flatten().to(device)


@constant_of_sizes
def offset_coordinates(
    position_bias: str, window: Size, pretrained: Size, device: torch.device
) -> Tensor:
    """Return the offsets in a window as the MLP of a position bias sees them.

    With x for the offset over the largest one of the pretraining window, they are x for
    ``linear_cpb``, and sign(x) * log2(1 + |8 x|) / log2(8) for ``log_cpb``. From window 7 to 18 the
    largest coordinate grows from 1 to 2.83 on the linear scale, and from 1.06 to 1.52 on the log
    scale.

    Args:
        position_bias: ``linear_cpb`` or ``log_cpb``.
        window: (height, width), cells.
        pretrained: the window of the pretraining.
        device: of the result.

    Returns:
        (2 height - 1, 2 width - 1, 2) float64.

    Source: arXiv 2111.09883, section 3.3, equations 3 and 4, in the form of the official code.
    Differs from the paper: there the offsets are not divided by the largest one.
    """
    axes = []
    for cells, reference in zip(window, pretrained, strict=True):
        offsets = torch.arange(1 - cells, cells, dtype=torch.float64)
        scaled = offsets / max(reference - 1, 1)
        if position_bias == "log_cpb":
            scaled = scaled * 8
            scaled = scaled.sign() * torch.log2(scaled.abs() + 1) / 3
        axes.append(scaled)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).to(device)
