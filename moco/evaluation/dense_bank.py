"""Segmentation of patches by their nearest neighbours in a bank (arXiv 2306.01667).

A patch is a cell of the backbone's feature map together with the pixels of the mask that it covers.
The patches of some images make a bank. The patches of other images get the classes of their nearest
neighbours in the bank. Everything here takes arrays and returns arrays.
"""

from dataclasses import dataclass

import numpy as np
import torch

from moco.evaluation.knn import turns_of_classes
from moco.evaluation.neighbors import nearest_by_block


@dataclass(frozen=True)
class Bank:
    """M patches whose classes are known."""

    features: np.ndarray
    """(M, feature width) float32."""
    shares: np.ndarray
    """(M, classes) float32: each class's share of a patch's labelled pixels; a row sums to 1."""
    weights: np.ndarray
    """(M,) float32: how many patches of its image each patch represents."""
    images: np.ndarray
    """(M,) int64: the number of the image that each patch is from."""


def class_shares(
    classes: np.ndarray, grid: tuple[int, int], num_classes: int, ignore_index: int
) -> np.ndarray:
    """Return how much of each patch belongs to each class.

    A pixel belongs to the patch that holds its upper left corner.

    Args:
        classes: (height, width) the class of each pixel, or `ignore_index`.
        grid: rows and columns of patches.

    Returns:
        (patches, num_classes) float32, row by row of the grid. A row sums to 1, or to 0 where a
        patch has no labelled pixel.
    """
    height, width = classes.shape
    num_rows, num_columns = grid
    row_of_pixel = np.arange(height) * num_rows // height
    column_of_pixel = np.arange(width) * num_columns // width
    patch_of_pixel = row_of_pixel[:, None] * num_columns + column_of_pixel
    is_labelled = classes != ignore_index
    # Each pair of a patch and a class has a number of its own, so one call counts them all.
    pairs = patch_of_pixel[is_labelled] * num_classes + classes[is_labelled]
    counts = np.bincount(pairs, minlength=num_rows * num_columns * num_classes)
    counts = counts.reshape(-1, num_classes)
    totals = counts.sum(axis=1, keepdims=True)
    return (counts / np.maximum(totals, 1)).astype(np.float32)


def draw_patches(
    labels: np.ndarray, count: int, sampling: str, generator: np.random.Generator
) -> np.ndarray:
    """Draw at most `count` different patches of an image.

    Args:
        labels: (patches,) the class of each patch.
        sampling: ``uniform``: every patch has the same chance. ``balanced``: the classes take
            turns, each for as long as it has patches left.

    Returns:
        The numbers of the patches.
    """
    order = generator.permutation(len(labels))
    if sampling == "uniform":
        return order[:count]
    turns = turns_of_classes(labels[order])
    # A stable sort keeps the random order within a turn.
    return order[np.argsort(turns, kind="stable")][:count]


def patches_represented(labels: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Return how many patches of its class the image has for each drawn one: float32.

    Args:
        labels: (patches,) the class of each patch.
        drawn: the numbers of the drawn patches.
    """
    drawn_labels = labels[drawn]
    num_in_image = np.bincount(labels)
    num_drawn = np.bincount(drawn_labels, minlength=len(num_in_image))
    return (num_in_image[drawn_labels] / num_drawn[drawn_labels]).astype(np.float32)


def knn_scores(
    bank: Bank,
    num_neighbors: int,
    temperature: float,
    device: torch.device | str,
    queries: np.ndarray,
) -> np.ndarray:
    """Return the mean class shares of each query's nearest patches, weighted by similarity.

    The weights are the softmax of similarity / temperature.

    Args:
        num_neighbors: at most the size of the bank.
        queries: (queries, feature width).

    Returns:
        (queries, classes) float32; a row sums to 1.
    """
    num_classes = bank.shares.shape[1]
    parts = []
    for similarities, rows in nearest_by_block(bank.features, queries, num_neighbors, device):
        # The first similarity is the largest. Subtracting it keeps exp from overflowing.
        weights = np.exp((similarities - similarities[:, :1]) / np.float32(temperature))
        weights /= weights.sum(axis=1, keepdims=True)
        scores = np.zeros((len(rows), num_classes), np.float32)
        for neighbor in range(num_neighbors):  # all at once would take num_neighbors x the memory
            scores += weights[:, neighbor, None] * bank.shares[rows[:, neighbor]]
        parts.append(scores)
    return np.concatenate(parts)
