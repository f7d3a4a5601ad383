"""The label-free figures of a checkpoint, which ``moco.evaluate`` shows beside the kNN accuracy."""

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from rich.table import Table

from moco.data.augment.views import ViewPair
from moco.data.loading.loaders import PairMaker
from moco.data.sources.source import Labelled
from moco.evaluation.collapse import collapse_of
from moco.evaluation.diagnostics import MOST_ROWS, evenly_spaced, label_free_figures
from moco.evaluation.subject import Features, Subject

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
    encoder has no projector or the checkpoint no augmentation."""


NOTHING = LabelFree({}, [], None)


def measure_label_free(subject: Subject, features: Features) -> LabelFree:
    """Measure the features and embeddings of plain images, and of augmented views of some images.

    The views are made by the augmentation of the checkpoint's run. A collapse of the embeddings is
    logged as a warning.
    """
    backbone = features.of["backbone"]
    embeddings = features.of.get("embedding")
    if len(backbone) < 2:
        log.info("no label-free figures: they need two images, and there is one")
        return NOTHING
    views = None
    if embeddings is None:
        log.info(
            "the checkpoint has a backbone and no projector: of the label-free figures there is "
            "the rank of its features only"
        )
    elif subject.pair:
        views = view_embeddings(subject, features)
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
            log.warning("%s: %s", *collapse)
    return LabelFree(figures, [figures_table(figures, backbone.shape, shape)], views)


def view_embeddings(subject: Subject, features: Features) -> np.ndarray:
    """Embed a query view and a key view of at most `MOST_VIEWED` images.

    With ``evaluation.cache`` the embeddings are kept for the next evaluation, under a key made of
    the images' plain features and the augmentation.

    Returns:
        (images, 2, embedding_dim), of any norm.
    """
    chosen = evenly_spaced(np.arange(len(features.rows)), MOST_VIEWED)
    rows = features.rows[chosen]
    if not subject.settings["cache"]:
        return embedded_views(subject, features.labelled, rows)
    key = hashlib.sha256(json.dumps(subject.pair, sort_keys=True).encode())
    for values in (rows, *(values[chosen] for values in features.of.values())):
        key.update(values.tobytes())
    path = subject.cache.named(key.hexdigest())
    kept = subject.cache.kept_or(
        path, lambda: {"views": embedded_views(subject, features.labelled, rows)}
    )
    return kept["views"]


@torch.no_grad()
def embedded_views(subject: Subject, labelled: Labelled, rows: np.ndarray) -> np.ndarray:
    """Embed two views of the images in these rows.

    Args:
        rows: (images,) indices in `labelled`.

    Returns:
        (images, 2, embedding_dim), of any norm.
    """
    augment = ViewPair(
        subject.pair["query"],
        subject.pair["key"],
        **subject.augmentation,
        image_size=subject.data["image_size"],
        seed=0,
    )
    make = PairMaker(augment)
    images = labelled.images
    device = subject.device
    batch_size = subject.settings["batch_size"]
    parts = []
    for start in range(0, len(rows), batch_size):
        samples = []
        for row in rows[start : start + batch_size].tolist():
            samples.append((row, images.opened(row), images.name(row)))
        batch = make(samples, 0)
        with torch.autocast(device.type, enabled=False):
            views = augment.finished([view.to(device) for view in batch.views], 0, batch.indices)
            embeddings = [subject.encoder(view).float().cpu() for view in views]
        parts.append(torch.stack(embeddings, dim=1))
    return torch.cat(parts).numpy()


def figures_table(
    figures: Mapping[str, float], features: Sequence[int], embeddings: Sequence[int] | None
) -> Table:
    """Return a table of the figures, each beside the values that it can have.

    Args:
        features: (images, feature_dim), the shape of the features.
        embeddings: (images, embedding_dim), the shape of the embeddings; None if there are none.
    """
    expected = {"feature_rank_me": f"at most {min(features)}"}
    if embeddings is not None:
        expected |= {
            "rank_me": f"at most {min(embeddings)}",
            "lidar": f"at most {min(embeddings[1], MOST_VIEWED)}",
            "embedding_std": f"{1 / math.sqrt(embeddings[1]):.4f} if spread out",
            "uniformity": "0: all in one place, -4: spread out",
            "alignment": "0: views are equal, 2: unrelated",
        }
    title = f"without labels, of {features[0]:,} images of the bank"
    table = Table(title=title, title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("range")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4f}", expected[name.removeprefix("label_free/")])
    return table
