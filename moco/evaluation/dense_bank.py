"""Segmentation by frozen features of patches. Arrays in, numbers out.

A patch is a cell of the backbone's feature map together with the pixels of the mask that it covers. Patches of images to
learn from make a bank; those of other images get the classes of their nearest neighbours there (arXiv 2306.01667).

Letters: N batch, M patches of the bank, Q patches to classify, P patches of an image, D feature width, C classes,
k neighbours, h w cells, H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moco.evaluation.neighbors import nearest_by_block

CLASSES_AT_ONCE = (
    8  # that are enlarged to an image's size; with all of them memory would grow with their number
)


@dataclass(frozen=True)
class Bank:
    """Patches whose classes are known."""

    features: np.ndarray
    """(M, D) float32."""
    shares: np.ndarray
    """(M, C) float32: the share of each class in a patch's labelled pixels; a row adds up to 1."""
    weights: np.ndarray
    """(M,) float32: how many of its image's patches each one stands for."""
    images: np.ndarray
    """(M,) int64: which image each is from."""


def joined_maps(maps: Sequence[Tensor]) -> Tensor:
    """Maps (N, D_i, h_i, w_i) as one of the finest one's size: (N, D, h, w).

    Each map has unit norm in every cell before it is enlarged, so that none outweighs the others.
    """
    unit = [F.normalize(part.float(), dim=1) for part in maps]
    height, width = max(part.shape[2:] for part in unit)
    return torch.cat(
        [F.interpolate(part, (height, width), mode="bilinear") for part in unit], dim=1
    )


def class_shares(
    classes: np.ndarray, grid: tuple[int, int], num_classes: int, ignore_index: int
) -> np.ndarray:
    """How much of each patch belongs to each class: (P, C) float32, row by row of the grid.

    A row adds up to 1, or to 0 where a patch has no labelled pixel. A pixel belongs to the patch that holds its upper left
    corner.

    Args:
        classes: (H, W), 0 to C - 1 or `ignore_index`.
        grid: h and w.
    """
    rows, columns = (
        np.arange(side) * cells // side for side, cells in zip(classes.shape, grid, strict=True)
    )
    patch = rows[:, None] * grid[1] + columns
    labelled = classes != ignore_index
    cells = patch[labelled] * num_classes + classes[labelled]
    counts = np.bincount(cells, minlength=grid[0] * grid[1] * num_classes).reshape(-1, num_classes)
    return (counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)).astype(np.float32)


def drawn(
    labels: np.ndarray, number: int, sampling: str, generator: np.random.Generator
) -> np.ndarray:
    """At most `number` random patches of an image, as rows.

    Args:
        labels: (P,) the class of each patch.
        sampling: ``uniform``: every patch has the same chance; ``balanced``: the image's classes take turns for as long as
            they have patches left.
    """
    order = generator.permutation(len(labels))
    if sampling == "uniform":
        return order[:number]
    by_class = np.argsort(labels[order], kind="stable")
    _, starts, counts = np.unique(labels[order][by_class], return_index=True, return_counts=True)
    turn = np.empty(len(labels), np.int64)
    turn[by_class] = np.arange(len(labels)) - np.repeat(starts, counts)
    return order[np.argsort(turn, kind="stable")][:number]


def patches_stood_for(labels: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """For each drawn row, how many patches of its class the image has per drawn one: float32."""
    there, taken = np.bincount(labels), np.bincount(labels[rows], minlength=labels.max() + 1)
    return (there[labels[rows]] / taken[labels[rows]]).astype(np.float32)


def knn_scores(
    bank: Bank,
    num_neighbors: int,
    temperature: float,
    device: torch.device | str,
    queries: np.ndarray,
) -> np.ndarray:
    """The classes of the k nearest patches, weighted by the softmax of similarity / T: (Q, C) float32, rows add up to 1.

    Args:
        num_neighbors: k, at most M.
        temperature: T.
        queries: (Q, D).
    """
    parts = []
    for similarities, rows in nearest_by_block(bank.features, queries, num_neighbors, device):
        weights = np.exp((similarities - similarities[:, :1]) / np.float32(temperature))
        weights /= weights.sum(axis=1, keepdims=True)
        scores = np.zeros((len(rows), bank.shares.shape[1]), np.float32)
        for neighbor in range(num_neighbors):  # all at once would take k times the memory
            scores += weights[:, neighbor, None] * bank.shares[rows[:, neighbor]]
        parts.append(scores)
    return np.concatenate(parts)


def pixel_classes(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """The class of every pixel by scores of cells (C, h, w) that are enlarged bilinearly: (H, W) int64.

    Of equal scores the smaller class wins.

    Args:
        size: H and W.
    """
    best = scores.new_full(size, -torch.inf)
    classes = torch.zeros(size, dtype=torch.int64, device=scores.device)
    for first in range(0, len(scores), CLASSES_AT_ONCE):
        some = F.interpolate(scores[None, first : first + CLASSES_AT_ONCE], size, mode="bilinear")[
            0
        ]
        value, number = some.max(dim=0)
        is_better = value > best
        classes = torch.where(is_better, number + first, classes)
        best = torch.where(is_better, value, best)
    return classes
