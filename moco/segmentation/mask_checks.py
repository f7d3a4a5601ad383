"""The look at every image and mask before training begins, so that a mistake is found at once."""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np

from moco.data.files.images import (
    UnreadableImage,
    decoded_mask,
    opened,
    pillow_warnings_ignored,
)
from moco.errors import InputError, printable
from moco.segmentation.masked_images import Pair

log = logging.getLogger(__name__)

MAX_THREADS = 32
MAX_NAMED_CLASSES = 10  # in one warning


class InspectedPairs(NamedTuple):
    """What was found in the files of M images and their masks."""

    sizes: np.ndarray
    """(M, 2) height and width, px."""
    largest: np.ndarray
    """(M,) the largest number in each mask except `ignore_index`; -1 where there is none."""
    numbers: list[int]
    """The numbers in all masks except `ignore_index`, ascending, each once."""


def inspect_pairs(
    pairs: Sequence[Pair], ignore_index: int, max_image_pixels: int
) -> InspectedPairs:
    """Open every pair of files, in parallel threads.

    Only the header of an image is read. A mask is decoded, because its numbers are needed. Pillow
    decodes without holding Python's lock, so threads are enough. A mask of one megapixel takes
    about 10 ms of one core.

    Raises:
        InputError: a pair cannot be used. The message names the file of the first such pair.
    """
    inspect = partial(inspect_pair, ignore_index=ignore_index, max_image_pixels=max_image_pixels)
    num_threads = min(MAX_THREADS, os.cpu_count() or 1)
    with pillow_warnings_ignored(), ThreadPoolExecutor(num_threads) as pool:
        # The results come in the order of the pairs, so the first wrong pair is named.
        sizes, numbers = zip(*pool.map(inspect, pairs), strict=True)
    largest = [max(of_mask, default=-1) for of_mask in numbers]
    return InspectedPairs(np.array(sizes), np.array(largest), sorted(set().union(*numbers)))


def inspect_pair(
    pair: Pair, ignore_index: int, max_image_pixels: int
) -> tuple[tuple[int, int], list[int]]:
    """Read the size of an image and the numbers in its mask.

    This runs in threads. The caller ignores Pillow's warnings around all of them.

    Returns:
        Height and width in px, and the numbers except `ignore_index`, each once.

    Raises:
        InputError: a file cannot be read, or the two files have different sizes.
    """
    try:
        with opened(pair.image, max_image_pixels) as image:
            width, height = image.size
        mask = decoded_mask(pair.mask, max_image_pixels)
    except UnreadableImage as error:
        raise InputError(str(error)) from error
    if mask.shape != (height, width):
        raise InputError(
            f"{printable(pair.mask)}: the mask has {mask.shape[1]} x {mask.shape[0]} px, "
            f"but its image {printable(pair.image)} has {width} x {height} px"
        )
    numbers = np.unique(mask)
    return (height, width), numbers[numbers != ignore_index].tolist()


def check_two_classes(root: str, numbers: Sequence[int], ignore_index: int) -> None:
    """Check that the training masks hold at least two classes.

    With one class the loss is 0 from the start, and every prediction is correct.

    Args:
        root: the dataset's folder, for the message.
        numbers: the numbers in the training masks except `ignore_index`.

    Raises:
        InputError: there are fewer than two.
    """
    if len(numbers) < 2:
        raise InputError(
            f"data.root={root}: the training masks hold the numbers {numbers} besides "
            f"data.ignore_index={ignore_index}; at least two classes are needed "
            "(masks of 0 and 255 have to be stored as 0 and 1)"
        )


def check_classes(
    pairs: Sequence[Pair], largest: np.ndarray, num_classes: int, origin: str
) -> None:
    """Check that no mask holds a number beyond the last class.

    Args:
        pairs: the files, M pairs.
        largest: (M,) the largest number in each mask.
        origin: what decided the number of classes, for the message.

    Raises:
        InputError: a mask does. The message names the first one.
    """
    wrong = np.flatnonzero(largest >= num_classes)
    if len(wrong):
        first = wrong[0]
        raise InputError(
            f"{printable(pairs[first].mask)}: the mask holds the number {largest[first]}, but "
            f"{origin} says {num_classes} classes, 0 to {num_classes - 1}{and_more(len(wrong))}"
        )


def warn_of_unseen_classes(
    class_names: Sequence[str], numbers: Sequence[int], ignore_index: int
) -> None:
    """Log a warning that names the classes which no training mask contains.

    Args:
        class_names: the names of all classes; the class number is the position.
        numbers: the numbers in the training masks.
    """
    unseen = []
    for number, name in enumerate(class_names):
        if number not in numbers and number != ignore_index:
            unseen.append(name)
    if unseen:
        named = ", ".join(unseen[:MAX_NAMED_CLASSES])
        rest = and_more(len(unseen), MAX_NAMED_CLASSES)
        log.warning("no training mask contains the classes %s%s", named, rest)


def and_more(count: int, num_named: int = 1) -> str:
    """Return the end of a message that has named some of `count` similar things."""
    return f" (and {count - num_named} more like it)" if count > num_named else ""
