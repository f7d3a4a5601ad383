"""The kNN monitor's features in TensorBoard: neighbours, confusion matrix, embedding projector."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moco.errors import printable
from moco.evaluation.diagnostics import evenly_spaced
from moco.evaluation.knn import Protocol, classify, confusion_matrix
from moco.evaluation.neighbors import nearest_by_block, normalized
from moco.evaluation.reports.cards import LONGEST_NAME, confusion_card, neighbors_card
from moco.evaluation.reports.embedded import Embedded
from moco.evaluation.reports.plots import pixels
from moco.evaluation.reports.projections import principal_components
from moco.training.board_layout import tag_of

MOST_PREDICTED = 5_000
"""Queries in the confusion matrix."""
SPRITE = 32
"""Side of a thumbnail in the projector, in px."""
PROJECTED_DIM = 64
"""Dimensions in the projector. It reads text: 2,048 dimensions would be 100 MB, and it reduces them
to 3 in any case."""


class FeaturePlots:
    """Plot the features of a measurement, always of the same queries, so that one sees them change.

    Args:
        every_n_epochs: epochs between two plots; None: no plots.
        projector_images: images in the embedding projector, at the end of the run; 0: no projector.
    """

    def __init__(self, every_n_epochs: int | None, projector_images: int) -> None:
        self.every_n_epochs = every_n_epochs
        self.projector_images = projector_images

    def is_due(self, epoch: int, previous_epoch: int, is_last: bool = False) -> bool:
        """Return whether the measurement after `epoch` is plotted.

        Args:
            previous_epoch: the epoch of the measurement before.
            is_last: the training ends with `epoch`.
        """
        if self.every_n_epochs is None:
            return False
        is_next = epoch // self.every_n_epochs > previous_epoch // self.every_n_epochs
        return is_last or is_next

    def draw(
        self,
        experiment: Any,
        step: int,
        bank: Embedded,
        queries: Embedded,
        num_neighbors: int,
        temperature: float,
    ) -> None:
        """Write the neighbours of some queries, and the confusion matrix of at most 5,000.

        Args:
            experiment: TensorBoard's ``SummaryWriter``.
            num_neighbors, temperature: of the vote.
        """
        search = partial(nearest_by_block, bank.features)
        neighbors = pixels(neighbors_card(bank, queries, search))
        experiment.add_image(tag_of("knn/neighbors"), neighbors, step, dataformats="HWC")

        # An image with several classes has no place in a confusion matrix.
        if queries.labelled.label_sets is not None:
            return
        chosen = evenly_spaced(np.arange(len(queries.rows)), MOST_PREDICTED)
        labels = queries.labels[chosen]
        protocol = Protocol(num_neighbors, temperature)
        votes = classify(search, bank.labels, queries.features[chosen], labels, [protocol])
        classes, counts = confusion_matrix(labels, votes[protocol].predicted)
        names = [queries.shown_class(number, LONGEST_NAME) for number in classes]
        confusion = pixels(confusion_card(names, counts, "queries"))
        experiment.add_image(tag_of("knn/confusion"), confusion, step, dataformats="HWC")

    def project(self, experiment: Any, queries: Embedded) -> None:
        """Write features, labels and thumbnails of the queries for the embedding projector.

        They replace those of an earlier part of the run.
        """
        chosen = evenly_spaced(np.arange(len(queries.rows)), self.projector_images)
        # add_embedding writes into this folder, and warns if it is there.
        shutil.rmtree(Path(experiment.log_dir) / "00000", ignore_errors=True)
        thumbnails = [np.asarray(queries.thumbnail(row, SPRITE)) for row in chosen]
        images = torch.from_numpy(np.stack(thumbnails)).permute(0, 3, 1, 2) / 255
        units = normalized(queries.features[chosen])
        features = principal_components(units, PROJECTED_DIM, centred=False)
        experiment.add_embedding(
            features.round(4),
            # A tab or a newline would begin another cell of the projector's table.
            [printable(queries.labelled.label_name(label)) for label in queries.labels[chosen]],
            images,
            tag="features",
        )
