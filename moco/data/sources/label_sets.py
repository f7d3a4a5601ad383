"""Labels of images with several classes each.

The rest of the project handles one number for each image. So each combination of classes that
occurs gets a number, and a table says which classes it stands for.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def is_matrix_of_classes(labels: Any, num_images: int) -> bool:
    """Return whether an array holds 0 and 1 for each image and each of several classes."""
    shape = tuple(getattr(labels, "shape", ()))
    if len(shape) != 2 or shape[0] != num_images or shape[1] < 2:
        return False
    return bool(np.isin(np.asarray(labels), (0, 1)).all())


def numbered_sets(is_class: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the combinations of classes that occur.

    Args:
        is_class: (images, classes), 1 where an image has a class. An image may have none.

    Returns:
        (images,) int64, the number of each image's combination; and (combinations, classes) bool,
        the classes of each combination.
    """
    label_sets, numbers = np.unique(np.asarray(is_class, bool), axis=0, return_inverse=True)
    return numbers.reshape(-1).astype(np.int64), label_sets


def shared_numbers(sides: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """Number the combinations of classes of several sets of images, with one table for all.

    Args:
        sides: (images, classes) each, with the same classes, see `numbered_sets`.

    Returns:
        For each side (images,) int64; and (combinations, classes) bool.
    """
    numbers, label_sets = numbered_sets(np.concatenate(sides))
    ends = np.cumsum([len(side) for side in sides])
    return np.split(numbers, ends[:-1]), label_sets
