"""The plots that ``moco.evaluate`` leaves beside its kNN figures."""

import logging
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from moco.evaluation.diagnostics import evenly_spaced
from moco.evaluation.knn import Search, confusion_matrix, without_own
from moco.evaluation.neighbors import joined, nearest_by_block, normalized
from moco.evaluation.reports.embedded import (
    NUM_NEIGHBORS,
    NUM_QUERIES,
    Embedded,
    neighbors_plot,
    shown,
)
from moco.evaluation.reports.plots import (
    confusion_plot,
    feature_maps_plot,
    map_plot,
    similarity_histogram,
)
from moco.evaluation.reports.projections import LEAST_ROWS, laid_out, principal_colors
from moco.evaluation.subject import Subject
from moco.phases import phase

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

NUM_MAPPED_IMAGES = 8
"""Images whose feature maps are drawn."""
MOST_MAPPED = 2_000
"""Queries in the map of features."""
MAP_TITLES = {"tsne": "t-SNE", "umap": "UMAP"}


class Searched(NamedTuple):
    """A bank, its queries, and the search for neighbours."""

    bank: Embedded
    queries: Embedded
    search: Search
    own_rows: np.ndarray | None
    """(queries,) each query's own row in the bank, which is not its neighbour (leave one out). None
    if the queries are not in the bank."""

    @property
    def kind(self) -> str:
        """Return where the queries come from, in words."""
        return "test" if self.own_rows is None else "leave one out"


def knn_plots(
    subject: Subject,
    searched: Searched,
    predicted: np.ndarray,
    views: np.ndarray | None,
) -> dict[str, "Figure"]:
    """Return the plots of a kNN measurement by file name.

    Args:
        predicted: (queries,) class numbers.
        views: (images, 2, embedding_dim) embeddings of two views of some images; None if there
            are none.
    """
    plots = {
        "neighbors.png": neighbors_of_some(searched),
        "feature_maps.png": feature_maps_of_some(subject, searched.queries),
    }
    # An image with several classes has no place in a confusion matrix.
    if searched.queries.labelled.label_sets is None:
        labels = searched.queries.labels
        plots["confusion.png"] = confusion_of(searched.queries, labels, predicted)
    if views is not None:
        plots["similarities.png"] = similarities_of_views(views)
    kind = subject.settings["map"]
    if kind == "none":
        return plots
    if len(searched.queries.rows) < LEAST_ROWS:
        log.info("map.png: skipped, it needs at least %d queries", LEAST_ROWS)
        return plots
    plots["map.png"] = map_of_queries(searched.queries, kind, subject.settings["feature"])
    return plots


def label_free_plots(
    subject: Subject, embedded: Embedded, views: np.ndarray | None
) -> dict[str, "Figure"]:
    """Return the plots of images without labels by file name.

    Args:
        embedded: features of the images; each is compared with all others.
        views: as in `knn_plots`.
    """
    search = partial(nearest_by_block, embedded.features, device=subject.device)
    own_rows = np.arange(len(embedded.rows))
    plots = {"feature_maps.png": feature_maps_of_some(subject, embedded)}
    if len(own_rows) > 1:
        searched = Searched(embedded, embedded, search, own_rows)
        plots["neighbors.png"] = neighbors_of_some(searched)
    if views is not None and len(views) > 1:
        plots["similarities.png"] = similarities_of_views(views)
    kind = subject.settings["map"]
    if kind != "none" and len(own_rows) >= LEAST_ROWS:
        plots["map.png"] = map_of_queries(embedded, kind, subject.settings["feature"])
    return plots


def confusion_of(queries: Embedded, labels: np.ndarray, predicted: np.ndarray) -> "Figure":
    """Draw the confusion matrix of class numbers, (rows,) each, with the names of the classes."""
    classes, counts = confusion_matrix(labels, predicted)
    return confusion_plot([queries.shown_class(number) for number in classes], counts)


def neighbors_of_some(searched: Searched) -> "Figure":
    """Draw queries of all classes with their nearest neighbours, as the measurement finds them."""
    bank, queries, search, own_rows = searched
    shown = spread_over_classes(queries.labels, NUM_QUERIES)
    # A query in the bank is its own nearest neighbour; one more is needed in its place.
    num_found = NUM_NEIGHBORS if own_rows is None else NUM_NEIGHBORS + 1
    num_found = min(num_found, len(bank.rows))
    similarities, rows = joined(search(queries.features[shown], num_found))
    if own_rows is not None:
        similarities, rows = without_own(similarities, rows, own_rows[shown])
    return neighbors_plot(bank, queries, shown, similarities, rows)


def spread_over_classes(labels: np.ndarray, number: int) -> np.ndarray:
    """Choose rows that are evenly spaced in the order of their classes, and return them in it.

    Args:
        labels: (rows,) class numbers.
        number: rows to choose; all rows if there are fewer.
    """
    return evenly_spaced(np.argsort(labels, kind="stable"), number)


def similarities_of_views(views: np.ndarray) -> "Figure":
    """Draw the cosines of two views of an image, and of views of different images.

    Args:
        views: (images, 2, embedding_dim), of any norm, at least two images.
    """
    query = normalized(views[:, 0])
    key = normalized(views[:, 1])
    cosines = query @ key.T  # (images, images)
    is_own = np.eye(len(cosines), dtype=bool)
    return similarity_histogram(cosines[is_own], cosines[~is_own])


def map_of_queries(queries: Embedded, kind: str, feature: str) -> "Figure":
    """Draw some queries as points that are near one another if their features are similar.

    Args:
        queries: at least `LEAST_ROWS`.
        kind: tsne or umap.
        feature: its name, for the title.
    """
    shown = evenly_spaced(np.arange(len(queries.rows)), MOST_MAPPED)
    with phase(f"{MAP_TITLES[kind]} map", unit=""):
        points = laid_out(normalized(queries.features[shown]), kind)
    labels = queries.labels[shown]
    if (labels < 0).all():
        title = f"{MAP_TITLES[kind]} of the {feature} features of {len(shown):,} images"
        return map_plot(points, None, title)
    title = f"{MAP_TITLES[kind]} of the {feature} features of {len(shown):,} queries"
    return map_plot(points, labels, title, queries.shown_class)


@torch.no_grad()
def feature_maps_of_some(subject: Subject, queries: Embedded) -> "Figure":
    """Draw images of all classes beside their last two feature maps.

    The colours of a map are its principal components over all images that are drawn.
    """
    view = subject.evaluation_view()
    chosen = spread_over_classes(queries.labels, NUM_MAPPED_IMAGES)
    images = queries.labelled.images
    squares = [view.crop(images[int(row)]) for row in queries.rows[chosen]]
    batch = torch.stack([view.normalized(square) for square in squares])
    maps = subject.encoder.backbone.feature_maps(batch.to(subject.device))
    columns = {}
    for name, values in (("last map", maps[-1]), ("map before", maps[-2])):
        height, width = values.shape[2:]
        colors = principal_colors(values.cpu().numpy())
        columns[f"{name} {height}x{width}"] = colors
    return feature_maps_plot([shown(images, square) for square in squares], columns)
