"""Images by their names: in messages, and to find the same image in another part of a dataset."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from moco.data.sources.source import Labelled
from moco.errors import printable

# Images that a message names.
MOST_NAMED = 3


def first_names(images: Any, rows: Sequence[int] | np.ndarray) -> str:
    """Return the names of the first images in these rows, for a message."""
    names = [printable(images.name(int(row))) for row in rows[:MOST_NAMED]]
    if len(rows) > MOST_NAMED:
        names.append("...")
    return ", ".join(names)


def labels_by_name(images: Any, sides: Iterable[Labelled]) -> np.ndarray:
    """Return the label of each image, (images,) int64; -1 for one that no side has.

    Args:
        images: of a dataset.
        sides: parts of these images, in any order. They have the same names there.
    """
    label_of = {}
    for side in sides:
        for row, label in enumerate(side.labels):
            label_of[side.images.name(row)] = label
    labels = [label_of.get(images.name(row), -1) for row in range(len(images))]
    return np.array(labels, np.int64)
