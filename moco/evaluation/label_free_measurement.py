"""The label-free figures of a checkpoint, as ``moco.evaluate`` shows them beside the kNN accuracy.

Letters: M images, D feature width, C embedding width, N batch.
"""

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from rich.table import Table

from moco.callbacks.collapse_watch import CAUSES, CollapseWatch
from moco.data.augment.views import ViewPair
from moco.data.loading.loaders import PairMaker
from moco.data.sources.source import Labelled
from moco.evaluation.diagnostics import MOST_ROWS, evenly_spaced, label_free_figures, rank_me
from moco.evaluation.subject import Features, Subject

log = logging.getLogger(__name__)

MOST_VIEWED = 1_000
"""Images of which two views are made: the mean squared distance is steady by then, and the cost that of 2,000 images."""


class LabelFree(NamedTuple):
    """What can be said of an encoder without labels."""

    figures: Mapping[str, float]
    """Under the names of ``metrics.json``."""
    tables: Sequence[Table]
    views: np.ndarray | None
    """(M, 2, C) embeddings of two augmented views of some images; None where they cannot be had."""


NOTHING = LabelFree({}, [], None)


def measure_label_free(subject: Subject, features: Features, labelled: Labelled) -> LabelFree:
    """Figures of the features and embeddings of plain images, and of views that the run's own augmentation makes.

    Warns in words of embeddings that are ill.

    Args:
        features: of `labelled`.
    """
    backbone, embeddings = features.of["backbone"], features.of.get("embedding")
    if len(backbone) < 2:
        log.info("no label-free figures of a single image")
        return NOTHING
    if embeddings is None:
        log.info(
            "a backbone alone: of the label-free figures the rank of its features, and no similarities of views"
        )
        figures = {
            "label_free/feature_rank_me": rank_me(
                torch.from_numpy(evenly_spaced(backbone, MOST_ROWS))
            )
        }
        return LabelFree(figures, [figures_table(figures, backbone.shape, None)], None)
    if not subject.pair:
        log.info(
            "the checkpoint does not say how its run augmented: no alignment, LiDAR and similarities of views"
        )
    views = view_embeddings(subject, features, labelled) if subject.pair else None
    figures = label_free_figures(backbone, embeddings, views)
    for words in illnesses(figures, embeddings.shape):
        log.warning("%s %s", words, CAUSES)
    return LabelFree(figures, [figures_table(figures, backbone.shape, embeddings.shape)], views)


def view_embeddings(subject: Subject, features: Features, labelled: Labelled) -> np.ndarray:
    """Embeddings of a query view and a key view of at most `MOST_VIEWED` images, not normalised: (M, 2, C).

    With ``evaluation.cache`` they are kept, under a key of the images' plain features and the augmentation.
    """
    chosen = evenly_spaced(np.arange(len(features.rows)), MOST_VIEWED)
    if not subject.settings["cache"]:
        return embedded_views(subject, labelled, features.rows[chosen])
    key = hashlib.sha256(json.dumps(subject.pair, sort_keys=True).encode())
    for values in (features.rows, *features.of.values()):
        key.update(np.ascontiguousarray(values[chosen]).tobytes())
    path = subject.cache.named(key.hexdigest())
    kept = subject.cache.read(path)
    if kept is not None:
        return kept["views"]
    views = embedded_views(subject, labelled, features.rows[chosen])
    subject.cache.write(path, {"views": views})
    return views


@torch.no_grad()
def embedded_views(subject: Subject, labelled: Labelled, rows: np.ndarray) -> np.ndarray:
    """`view_embeddings` of the images in these rows (M,), computed."""
    augment = ViewPair(
        subject.pair["query"],
        subject.pair["key"],
        **subject.augmentation,
        image_size=subject.data["image_size"],
        seed=0,
    )
    make, images, device = PairMaker(augment), labelled.images, subject.device
    parts = []
    for first in range(0, len(rows), subject.settings["batch_size"]):
        block = [int(row) for row in rows[first : first + subject.settings["batch_size"]]]
        batch = make([(row, images.opened(row), images.name(row)) for row in block], 0)
        with torch.autocast(device.type, enabled=False):
            views = augment.finished([view.to(device) for view in batch.views], 0, batch.indices)
            embeddings = [subject.encoder(view).float().cpu() for view in views]  # (N, C) each
        parts.append(torch.stack(embeddings, dim=1))
    return torch.cat(parts).numpy()


def illnesses(figures: Mapping[str, float], shape: Sequence[int]) -> list[str]:
    """What is ill, in words, by the thresholds of the run's own watch.

    Args:
        shape: (M, C) of the embeddings.
    """
    std, spread = figures["label_free/embedding_std"], 1 / math.sqrt(shape[1])
    if std < CollapseWatch.SAME * spread:
        return [
            f"COLLAPSED: all embeddings are nearly the same (standard deviation {std:.5f}, spread out it would be "
            f"{spread:.5f})."
        ]
    effective, highest = figures["label_free/rank_me"], min(*shape, MOST_ROWS)
    # Of a few images the rank says nothing.
    if (
        highest >= 1 / CollapseWatch.FEW_DIMENSIONS
        and effective < CollapseWatch.FEW_DIMENSIONS * highest
    ):
        return [
            "DIMENSIONAL COLLAPSE: the embeddings differ in few dimensions only (effective rank "
            f"{effective:.1f} of {highest})."
        ]
    return []


def figures_table(
    figures: Mapping[str, float], features: Sequence[int], embeddings: Sequence[int] | None
) -> Table:
    """Each figure beside what it is held to.

    Args:
        features, embeddings: the shapes (M, D) and (M, C).
    """
    held_to = {"feature_rank_me": f"at most {min(features)}"}
    if embeddings is not None:
        held_to |= {
            "rank_me": f"at most {min(embeddings)}",
            "lidar": f"at most {min(embeddings[1], MOST_VIEWED)}",
            "embedding_std": f"{1 / math.sqrt(embeddings[1]):.4f} if spread out",
            "uniformity": "0: all in one place, -4: spread out",
            "alignment": "0: views are equal, 2: unrelated",
        }
    table = Table(
        title=f"without labels, of {features[0]:,} images of the bank", title_justify="left"
    )
    for name in ("figure", "value", "beside"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4f}", held_to[name.removeprefix("label_free/")])
    return table
