"""Scores of an image of any size: overlapping windows, blended, in bounded memory.

An image is divided into panels of columns. Inside a panel the windows of one row follow those of
the row before, and the rows of pixels that no later window covers are handed out. So at most one
row of windows is in memory, and never the scores of the whole image.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moco.segmentation.inference import window_starts

LARGEST_SUMS = 2**28
"""Bytes that the sums over the windows of a panel may take, if one window needs less."""
BYTES_PER_SUM = 4  # float32


class ScoredPart(NamedTuple):
    """The scores of a part of an image."""

    top: int
    """First row, px."""
    left: int
    """First column, px."""
    scores: Tensor
    """(classes, height, width) float32."""


class Panel(NamedTuple):
    """Neighbouring windows of a row, and the columns of pixels that they settle."""

    lefts: Sequence[int]
    """Where the windows begin, px. The first ones may belong to the panel before, too."""
    start: int
    """The first column that is settled."""
    end: int
    """The column after the last one."""


def blended_scores(
    score: Callable[[Tensor], Tensor],
    read: Callable[[int, int, int, int], Tensor],
    size: tuple[int, int],
    num_classes: int,
    window: int,
    *,
    num_at_once: int = 1,
    smooth: bool = True,
    largest_sums: int = LARGEST_SUMS,
) -> Iterator[ScoredPart]:
    """Yield the scores of an image in parts, which cover every pixel once.

    The score of a pixel is the weighted mean over all windows that hold it. Windows overlap by a
    third, as in `moco.segmentation.inference.predicted_classes`. At the edge of the image a window
    has neighbours on one side alone, and the weights are divided by their sum, so they do not fade.

    Memory: the sums take ``4 * (classes + 1) * window * width`` bytes. An image for which these
    would be more than `largest_sums` is divided into panels. Each panel computes the windows again
    that reach into it from the panel before. The result does not depend on `largest_sums`.

    Args:
        score: returns (n, classes, height, width) float32 for windows (n, bands, height, width).
        read: returns the pixels (bands, height, width) of a part, given its first row, first
            column, height and width, px.
        size: (height, width) of the image, px.
        num_classes: how many classes `score` returns.
        window: side of the windows, px. A shorter side of the image is taken whole.
        num_at_once: windows in one call of `score`.
        smooth: weigh the pixels of a window by their distance from its edge, see `smooth_weights`.
            Otherwise all pixels of a window count alike.
        largest_sums: see above, bytes.
    """
    height, width = size
    rows, columns = min(window, height), min(window, width)
    stride = max(1, window * 2 // 3)
    tops = window_starts(height, window, stride)
    weights = torch.ones(rows, columns)
    if smooth:
        weights = smooth_weights(rows)[:, None] * smooth_weights(columns)
    bytes_per_column = BYTES_PER_SUM * (num_classes + 1) * rows
    most_columns = largest_sums // bytes_per_column
    for panel in panels(window_starts(width, window, stride), columns, width, most_columns):
        yield from panel_scores(score, read, panel, tops, weights, num_classes, num_at_once)


def panel_scores(
    score: Callable[[Tensor], Tensor],
    read: Callable[[int, int, int, int], Tensor],
    panel: Panel,
    tops: Sequence[int],
    weights: Tensor,
    num_classes: int,
    num_at_once: int,
) -> Iterator[ScoredPart]:
    """Yield the scores of a panel's columns from top to bottom.

    Args:
        score, read, num_classes, num_at_once: see `blended_scores`.
        panel: its windows.
        tops: where the rows of windows begin, px.
        weights: (rows, columns) of the pixels of a window.
    """
    rows, columns = weights.shape
    left = panel.lefts[0]
    width = panel.lefts[-1] + columns - left
    own = slice(panel.start - left, panel.end - left)
    sums: Tensor | None = None  # (classes, rows, width), of the weighted scores
    weight_sums = torch.empty(0)  # (rows, width)
    for number, top in enumerate(tops):
        strip = read(top, left, rows, width)
        for first in range(0, len(panel.lefts), num_at_once):
            starts = [start - left for start in panel.lefts[first : first + num_at_once]]
            windows = [strip[:, :, start : start + columns] for start in starts]
            scores = score(torch.stack(windows))
            if sums is None:
                weights = weights.to(scores.device)
                sums = scores.new_zeros(num_classes, rows, width)
                weight_sums = scores.new_zeros(rows, width)
            for start, of_window in zip(starts, scores, strict=True):
                place = slice(start, start + columns)
                sums[:, :, place] += of_window * weights
                weight_sums[:, place] += weights
        assert sums is not None
        # No later window covers the rows above the next row of windows.
        num_settled = rows
        if number + 1 < len(tops):
            num_settled = tops[number + 1] - top
        settled = sums[:, :num_settled, own] / weight_sums[:num_settled, own]
        yield ScoredPart(top, panel.start, settled)
        sums = moved_up(sums, num_settled)
        weight_sums = moved_up(weight_sums[None], num_settled)[0]


def panels(lefts: Sequence[int], window: int, width: int, most_columns: int) -> Iterator[Panel]:
    """Divide a row of windows into panels of at most `most_columns`, of a window at least.

    Args:
        lefts: where the windows begin, px, in ascending order.
        window: width of each, px.
        width: of the image, px.
        most_columns: that the windows of a panel may cover together, px.
    """
    first = 0
    while first < len(lefts):
        # Earlier windows reach into the columns of this panel.
        reaching = first
        while reaching > 0 and lefts[reaching - 1] + window > lefts[first]:
            reaching -= 1
        end = first + 1
        while end < len(lefts) and lefts[end] + window - lefts[reaching] <= most_columns:
            end += 1
        # The columns of the next panel begin with its first window.
        last_column = width
        if end < len(lefts):
            last_column = lefts[end]
        yield Panel(lefts[reaching:end], lefts[first], last_column)
        first = end


def smooth_weights(length: int) -> Tensor:
    """Return the weight of each pixel along a side of a window, (length,) float32 above 0.

    It is the square of a sine: near 0 at the edge, where a network sees the least context, and 1 in
    the middle. Neighbouring windows then fade into each other, and no edge shows.

    Args:
        length: of the side, px.
    """
    # Places in the middle of pixels, so that no weight is 0: 0 / 0 at the corner of an image.
    places = (torch.arange(length, dtype=torch.float32) + 0.5) / length
    return torch.sin(torch.pi * places) ** 2


def moved_up(sums: Tensor, num_rows: int) -> Tensor:
    """Return sums (classes, rows, width) without the first rows, and as many zeros at the end."""
    moved = torch.zeros_like(sums)
    kept = sums.shape[1] - num_rows
    moved[:, :kept] = sums[:, num_rows:]
    return moved
