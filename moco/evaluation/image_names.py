"""Images by their names: in messages, and to find the same image in another part of a dataset."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from moco.data.loading.datamodule import check_unreadable
from moco.data.sources.source import Labelled
from moco.errors import printable

log = logging.getLogger(__name__)

# Images that a message names.
MOST_NAMED = 3


def first_names(images: Any, rows: Sequence[int] | np.ndarray) -> str:
    """Return the names of the first images in these rows, for a message."""
    names = [printable(images.name(int(row))) for row in rows[:MOST_NAMED]]
    if len(rows) > MOST_NAMED:
        names.append("...")
    return ", ".join(names)


def skip_unreadable(images: Any, rows: Sequence[int], max_bad_fraction: float) -> None:
    """Warn of the images in these rows, which could not be read.

    Raises:
        InputError: they are too many.
    """
    if rows:
        log.warning("skipped %d unreadable images: %s", len(rows), first_names(images, rows))
    check_unreadable(rows, images, max_bad_fraction)


def labels_by_name(
    images: Any, bank: Labelled | None, queries: Labelled | None = None
) -> np.ndarray:
    """Return the label of each image, (images,) int64; -1 for one that neither side has.

    Args:
        images: of a dataset.
        bank: the same object, or images of the same names in any order.
        queries: others of them.
    """
    if bank is not None and bank.images is images:
        return bank.labels
    label_of = {}
    for side in (bank, queries):
        if side is not None:
            for row, label in enumerate(side.labels):
                label_of[side.images.name(row)] = label
    if not label_of:
        # Naming a million images would take seconds.
        return np.full(len(images), -1)
    labels = [label_of.get(images.name(row), -1) for row in range(len(images))]
    return np.array(labels, np.int64)
