"""What ``moco.evaluate`` draws beside its figures.

Letters: M images, Q queries, N images.
"""

import logging
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image

from moco.callbacks.feature_plots import NUM_NEIGHBORS, NUM_QUERIES, Embedded, neighbor_row, spaced
from moco.data.augment.views import Normalized, evaluation_crop
from moco.evaluation.knn import Search, without_own
from moco.evaluation.neighbors import normalized
from moco.evaluation.reports.drawing import (
    confusion_plot,
    feature_maps_plot,
    map_plot,
    neighbors_plot,
    similarity_histogram,
)
from moco.evaluation.reports.projections import LEAST_ROWS, laid_out, principal_colors
from moco.evaluation.subject import Subject

log = logging.getLogger(__name__)

NUM_MAPPED_IMAGES = 8
MOST_MAPPED = 2_000
MAP_TITLES = {"tsne": "t-SNE", "umap": "UMAP"}


class Searched(NamedTuple):
    """A bank, its queries, and how neighbours are found."""

    bank: Embedded
    queries: Embedded
    search: Search
    own_rows: np.ndarray | None
    """(Q,) each query's own row in the bank, which is no neighbour; None: the queries are others."""


def knn_plots(
    subject: Subject,
    searched: Searched,
    confusion: np.ndarray,
    classes: np.ndarray,
    views: np.ndarray | None,
) -> dict[str, Image.Image]:
    """What there is to draw of a kNN measurement, by file name.

    Args:
        confusion, classes: of `confusion_matrix`.
        views: (M, 2, C) embeddings of two views of some images; None if there are none.
    """
    queries, kind = searched.queries, subject.settings["map"]
    found = {
        "neighbors.png": neighbors_of_some(searched),
        "similarities.png": None if views is None else similarities_of_views(views),
        "confusion.png": confusion_plot(confusion, [str(name) for name in classes]),
        "map.png": None
        if kind == "none"
        else map_of_queries(queries, kind, subject.settings["feature"]),
        "feature_maps.png": feature_maps_of_some(subject, queries),
    }
    return {name: image for name, image in found.items() if image is not None}


def save_png(image: Image.Image, file: BinaryIO) -> None:
    """Write the image as a small file."""
    image.save(file, "PNG", optimize=True)


def neighbors_of_some(searched: Searched) -> Image.Image:
    """Queries of all classes with their nearest neighbours, found as the measurement finds them."""
    bank, queries, search, own_rows = searched
    shown = spread_over_classes(queries.labels, NUM_QUERIES)
    is_own_left_out = own_rows is not None
    most = min(NUM_NEIGHBORS + is_own_left_out, len(bank.rows))
    found = list(search(queries.features[shown], most))
    similarities, rows = (np.concatenate(parts) for parts in zip(*found, strict=True))
    if own_rows is not None:
        similarities, rows = without_own(similarities, rows, own_rows[shown])
    lines = zip(shown, similarities, rows, strict=True)
    return neighbors_plot(
        [neighbor_row(bank, queries, int(query), near, row) for query, near, row in lines]
    )


def spread_over_classes(labels: np.ndarray, number: int) -> np.ndarray:
    """So many rows of all classes alike, or of evenly spaced classes where these are more; by class.

    Args:
        labels: (M,).
    """
    order = np.argsort(labels, kind="stable")
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    place = np.arange(len(labels)) - np.repeat(starts, counts)  # within the class
    if len(starts) >= number:
        return order[starts[spaced(len(starts), number)]]
    first = np.sort(np.argsort(place, kind="stable")[:number])
    return order[first]


def similarities_of_views(views: np.ndarray) -> Image.Image | None:
    """Cosines of two views of an image, and of views of different images; None of one image, which has no others.

    Args:
        views: (M, 2, C), of any norm.
    """
    if len(views) < 2:
        return None
    query, key = normalized(views[:, 0]), normalized(views[:, 1])
    cosines = query @ key.T  # (M, M)
    is_own = np.eye(len(cosines), dtype=bool)
    return similarity_histogram(cosines[is_own], cosines[~is_own])


def map_of_queries(queries: Embedded, kind: str, feature: str) -> Image.Image | None:
    """Some queries as points, near one another where their features are similar; None of too few.

    Args:
        kind: tsne or umap.
        feature: its name, for the title.
    """
    shown = spaced(len(queries.rows), MOST_MAPPED)
    if len(shown) < LEAST_ROWS:
        log.info("map.png: left out, of fewer than %d queries there is none", LEAST_ROWS)
        return None
    points = laid_out(normalized(queries.features[shown]), kind)
    title = (
        f"{MAP_TITLES[kind]} of {len(shown):,} queries by their {feature} features; colour: class"
    )
    return map_plot(points, queries.labels[shown], title)


@torch.no_grad()
def feature_maps_of_some(subject: Subject, queries: Embedded) -> Image.Image:
    """Images of all classes beside their last two feature maps, each in its own principal components."""
    data, device = subject.data, subject.device
    crop = evaluation_crop(data["image_size"], data["crop_ratio"])
    chosen = spread_over_classes(queries.labels, NUM_MAPPED_IMAGES)
    thumbnails = [crop(queries.labelled.images[int(row)]) for row in queries.rows[chosen]]
    batch = torch.stack(
        [Normalized(**subject.augmentation)(image) for image in thumbnails]
    )  # (N, 3, S, S)
    with torch.autocast(device.type, enabled=False):
        maps: list[Any] = subject.encoder.backbone.feature_maps(batch.to(device))[-2:]
    columns = {}
    for name, values in zip(("the map before it", "last map"), maps, strict=True):
        height, width = values.shape[2:]
        columns[f"{name}, {height} x {width}"] = principal_colors(values.float().cpu().numpy())
    return feature_maps_plot(thumbnails, dict(reversed(columns.items())))
