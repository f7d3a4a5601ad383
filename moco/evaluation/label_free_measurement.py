"""The label-free figures of a checkpoint, which ``moco.evaluate`` shows beside the kNN accuracy."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from rich.table import Table

from moco.data.augment.views import ViewPair, foreign_code
from moco.data.loading.loaders import PairMaker
from moco.errors import printable
from moco.evaluation.collapse import EARLY_STEPS, Collapse, collapse_of
from moco.evaluation.diagnostics import MOST_ROWS, evenly_spaced, label_free_figures
from moco.evaluation.reports.embedded import Embedded
from moco.evaluation.subject import Subject, table_of
from moco.phases import counted

log = logging.getLogger(__name__)

MOST_VIEWED = 1_000
"""Images of which two views are made. The mean squared distance is steady by then, and the cost is
that of 2,000 images."""


class LabelFree(NamedTuple):
    """What is known of an encoder without labels."""

    figures: Mapping[str, float]
    """By the names of ``metrics.json``."""
    tables: Sequence[Table]
    views: np.ndarray | None
    """(images, 2, embedding_dim) embeddings of two augmented views of some images; None if the
    encoder has no projector, or the checkpoint no augmentation without code of the user's."""


NOTHING = LabelFree({}, [], None)


def measure_label_free(subject: Subject, features: Mapping[str, Embedded]) -> LabelFree:
    """Measure the features and embeddings of plain images, and of augmented views of some images.

    The views are made by the augmentation of the checkpoint's run. A collapse of the embeddings is
    logged as a warning, unless the run has hardly begun.
    """
    backbone = features["backbone"].features
    embeddings = None
    views = None
    if "embedding" in features:
        embeddings = features["embedding"].features
    if embeddings is None:
        log.info(
            "there is a backbone and no projector: of the label-free figures there is the rank of "
            "its features only"
        )
    elif code_of_pair(subject):
        log.info(
            "the views of the run are made by code that is not in this project (%s), and nothing "
            "that a checkpoint names is imported: no alignment, LiDAR and similarities of views",
            ", ".join(code_of_pair(subject)),
        )
    elif subject.pair:
        views = view_embeddings(subject, features["backbone"])
    else:
        log.info(
            "the checkpoint does not hold the augmentation of its run: no alignment, LiDAR and "
            "similarities of views"
        )
    figures = label_free_figures(backbone, embeddings, views)
    shape = None
    if embeddings is not None:
        shape = embeddings.shape
        std, rank = figures["label_free/embedding_std"], figures["label_free/rank_me"]
        collapse = collapse_of(std, rank, (min(shape[0], MOST_ROWS), shape[1]))
        if collapse:
            say_collapse(collapse, subject.num_steps)
    return LabelFree(figures, [figures_table(figures, backbone.shape, shape)], views)


def say_collapse(collapse: Collapse, num_steps: int) -> None:
    """Log a collapse as a warning, or that it is too early where the training has hardly begun.

    Args:
        collapse: what the embeddings show.
        num_steps: optimizer steps of the checkpoint; 0 if it does not say them.
    """
    if 0 < num_steps < EARLY_STEPS:
        log.info(
            "too early to tell: the checkpoint is of step %d, and %s. In the first %d steps "
            "healthy runs are near that, too; if it is still so later, it is a collapse",
            num_steps,
            collapse.sign,
            EARLY_STEPS,
        )
        return
    log.warning("%s: %s", collapse.name, collapse.in_words())


def code_of_pair(subject: Subject) -> list[str]:
    """Return the user's own code that the augmentation of the checkpoint's run needs, by name."""
    names: dict[str, None] = {}  # in order, each once
    for view in subject.pair.values():
        names |= dict.fromkeys(map(printable, foreign_code(view)))
    return list(names)


@torch.no_grad()
def view_embeddings(subject: Subject, embedded: Embedded) -> np.ndarray:
    """Embed a query view and a key view of at most `MOST_VIEWED` images.

    Returns:
        (images, 2, embedding_dim), of any norm.
    """
    augment = ViewPair(
        subject.pair["query"],
        subject.pair["key"],
        **subject.augmentation,
        image_size=subject.data["image_size"],
        seed=0,
        bands=subject.values.bands,
        is_float=subject.values.is_float,
    )
    make = PairMaker(augment)
    images = embedded.labelled.images
    rows = evenly_spaced(embedded.rows, MOST_VIEWED)
    batch_size = subject.settings["batch_size"]
    parts = []
    starts = range(0, len(rows), batch_size)
    for start in counted(starts, "embedding views", len(starts), "batches"):
        samples = []
        for row in rows[start : start + batch_size].tolist():
            samples.append((row, images.prepared(row), images.name(row)))
        batch = make(samples, 0)
        pair = [view.to(subject.device) for view in batch.views]
        views = augment.finished(pair, 0, batch.indices)
        parts.append(torch.stack([subject.encoder(view) for view in views], dim=1).cpu())
    return torch.cat(parts).numpy()


def figures_table(
    figures: Mapping[str, float], features: Sequence[int], embeddings: Sequence[int] | None
) -> Table:
    """Return a table of the figures, each beside the values that it can have.

    Args:
        features: (images, feature_dim), the shape of the features.
        embeddings: (images, embedding_dim), the shape of the embeddings; None if there are none.
    """
    expected = {"feature_rank_me": f"at most {min(features)}, higher is often better"}
    if embeddings is not None:
        expected |= {
            "rank_me": f"at most {min(embeddings)}, higher is often better",
            "lidar": f"at most {min(embeddings[1], MOST_VIEWED)}, higher is often better",
            "embedding_std": f"0: all equal, {1 / math.sqrt(embeddings[1]):.4f}: spread out",
            "uniformity": "0: all in one place, -4: spread out",
            # A run's own figure is of the training, see docs/evaluation.md.
            "alignment": "0: equal views, 2: unrelated; a run's own has two encoders",
        }
    title = f"Figures without labels, of {features[0]:,} images"
    rows = []
    for name, value in figures.items():
        rows.append([name, f"{value:.4f}", expected[name.removeprefix("label_free/")]])
    return table_of(title, ("figure", "value", "range"), rows, texts=("figure", "range"))
