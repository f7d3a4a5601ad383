"""What the kNN monitor's features look like in TensorBoard: neighbours, confusions, and the embedding projector.

Letters: M bank size, Q queries, D feature width, k neighbours.
"""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from moco.data.sources.source import Labelled
from moco.evaluation.knn import vote
from moco.evaluation.neighbors import nearest, normalized
from moco.evaluation.reports.drawing import (
    Neighbor,
    NeighborRow,
    confusion_counts,
    confusion_plot,
    neighbors_plot,
    thumbnail,
)

NUM_QUERIES, NUM_NEIGHBORS = 16, 8
THUMBNAIL, SPRITE = 64, 32  # px
MOST_PREDICTED = 5_000
PROJECTED_DIM = 64
"""The projector reads text, which of 2,048 dimensions would be 100 MB; it makes 3 dimensions of them in any case."""


class Embedded(NamedTuple):
    """Features and what they are of."""

    features: np.ndarray
    """(M, D), of any norm."""
    labels: np.ndarray
    """(M,)."""
    labelled: Labelled
    rows: np.ndarray
    """(M,) the place of each in `labelled`."""

    def thumbnail(self, row: int, side: int) -> Any:
        """The image that a row of the features is of, as a square of so many px."""
        return thumbnail(self.labelled.images[int(self.rows[row])], side)


class FeaturePlots:
    """Draws a measurement's features, always of the same queries, so that one sees them change.

    Args:
        every_n_epochs: between two images; None: no images.
        projector_images: in the embedding projector, at the end of the run; 0: no projector.
    """

    def __init__(self, every_n_epochs: int | None, projector_images: int) -> None:
        self.every_n_epochs = every_n_epochs
        self.projector_images = projector_images

    def is_due(self, epoch: int, previous_epoch: int) -> bool:
        """Whether an image is, at a measurement after `epoch` when the one before was after `previous_epoch`."""
        return (
            self.every_n_epochs is not None
            and epoch // self.every_n_epochs > previous_epoch // self.every_n_epochs
        )

    def draw(
        self,
        experiment: Any,
        step: int,
        bank: Embedded,
        queries: Embedded,
        num_neighbors: int,
        temperature: float,
    ) -> None:
        """The nearest neighbours of some queries, and the confusion matrix of at most 5,000.

        Args:
            experiment: TensorBoard's ``SummaryWriter``.
            num_neighbors, temperature: k and T of the vote.
        """
        shown, predicted = (
            spaced(len(queries.rows), NUM_QUERIES),
            spaced(len(queries.rows), MOST_PREDICTED),
        )
        asked = normalized(queries.features[np.concatenate([shown, predicted])])
        most = min(max(num_neighbors, NUM_NEIGHBORS), len(bank.rows))
        similarities, rows = nearest(bank.features, asked, most)
        image = neighbors_plot(
            [
                neighbor_row(
                    bank,
                    queries,
                    query,
                    similarities[place, :NUM_NEIGHBORS],
                    rows[place, :NUM_NEIGHBORS],
                )
                for place, query in enumerate(shown)
            ]
        )
        experiment.add_image("knn/neighbors", np.asarray(image), step, dataformats="HWC")
        classes, bank_classes = np.unique(bank.labels, return_inverse=True)
        voters = rows[len(shown) :, :num_neighbors]
        scores = vote(
            similarities[len(shown) :, :num_neighbors],
            bank_classes.reshape(-1)[voters],
            len(classes),
            temperature,
        )
        counts, names = confusion_counts(queries.labels[predicted], classes[scores.argmax(axis=1)])
        matrix = confusion_plot(counts, [str(name) for name in names])
        experiment.add_image("knn/confusion", np.asarray(matrix), step, dataformats="HWC")

    def project(self, experiment: Any, queries: Embedded) -> None:
        """Features, labels and thumbnails of the queries for the embedding projector, in place of earlier ones."""
        chosen = spaced(len(queries.rows), self.projector_images)
        shutil.rmtree(
            Path(experiment.log_dir) / "00000", ignore_errors=True
        )  # where add_embedding puts its files
        thumbnails = np.stack(
            [np.asarray(queries.thumbnail(row, SPRITE)) for row in chosen]
        )  # (Q, 32, 32, 3)
        experiment.add_embedding(
            projected(normalized(queries.features[chosen]), PROJECTED_DIM).round(4),
            [str(label) for label in queries.labels[chosen]],
            torch.from_numpy(thumbnails).permute(0, 3, 1, 2) / 255,
            tag="features",
        )


def spaced(number: int, most: int) -> np.ndarray:
    """All of so many rows, or `most` of them from the first to the last."""
    return np.linspace(0, number - 1, min(number, most)).astype(np.int64)


def neighbor_row(
    bank: Embedded, queries: Embedded, query: int, similarities: np.ndarray, rows: np.ndarray
) -> NeighborRow:
    """A query by its row, with its neighbours by theirs."""
    neighbors = [
        Neighbor(
            bank.thumbnail(row, THUMBNAIL),
            float(similarity),
            str(bank.labels[row]),
            bool(bank.labels[row] == queries.labels[query]),
        )
        for similarity, row in zip(similarities, rows, strict=True)
    ]
    return NeighborRow(queries.thumbnail(query, THUMBNAIL), str(queries.labels[query]), neighbors)


def projected(features: np.ndarray, dim: int) -> np.ndarray:
    """Rows (M, D) in the `dim` directions that keep most of their inner products: (M, at most dim), float64."""
    rows = torch.from_numpy(features).double()
    if rows.shape[1] <= dim:
        return rows.numpy()
    _, directions = torch.linalg.eigh(rows.T @ rows)  # the weightiest last
    return (rows @ directions[:, -dim:].flip(1)).numpy()
