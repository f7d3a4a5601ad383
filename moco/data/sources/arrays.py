"""Datasets that fit in memory: scikit-learn's digits, synthetic noise, and .npz archives."""

import math
from pathlib import Path

import numpy as np

from moco.data.files.archives import DAMAGED, read_arrays
from moco.data.sources.source import ArrayImages, DataSource, Labelled
from moco.errors import InputError, printable

NPZ_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
NUM_DIGITS_TO_TRAIN_ON = 1437  # of 1,797


def digits_source() -> DataSource:
    """Return scikit-learn's 1,797 scanned digits, 8 x 8 px; a fixed random 360 are the queries."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)  # 16 grey levels to 256
    labels = data.target.astype(np.int64)
    # NumPy promises that RandomState draws the same in every version (NEP 19).
    order = np.random.RandomState(0).permutation(len(images))
    train = order[:NUM_DIGITS_TO_TRAIN_ON]
    test = order[NUM_DIGITS_TO_TRAIN_ON:]
    return source_from_arrays("digits", images[train], labels[train], images[test], labels[test])


def synthetic_source(num_images: int) -> DataSource:
    """Return uniform noise of 224 px in 10 arbitrary classes: a load test that teaches nothing."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (num_images, 224, 224, 3), dtype=np.uint8)
    labels = np.arange(num_images) % 10
    # The queries are images of the bank too: the figures mean nothing anyway.
    num_queries = max(1, num_images // 10)
    return source_from_arrays(
        "synthetic", images, labels, images[:num_queries], labels[:num_queries]
    )


def npz_source(root: str, max_image_pixels: int) -> DataSource:
    """Return an archive in the MedMNIST layout.

    It holds train_images, and for labelled sets also train_labels, test_images and test_labels.
    Images are uint8 (images, height, width[, channels]); labels are integers, (images,) or
    (images, 1).

    Raises:
        InputError: the file is missing or damaged, or an array does not have this form.
    """
    if not Path(root).is_file():
        raise InputError(f"data.root={root}: no such file")
    try:
        arrays, present = read_arrays(root, NPZ_ARRAYS)
    except DAMAGED as error:
        raise InputError(
            f"data.root={root}: not a readable .npz archive of plain arrays "
            f"({printable(str(error))})"
        ) from error
    if "train_images" not in arrays:
        found = printable(", ".join(present)) or "none"
        raise InputError(f"data.root={root}: no array train_images in there (found {found})")
    check_image_size(root, "train_images", arrays["train_images"], max_image_pixels)
    if "test_images" in arrays:
        check_image_size(root, "test_images", arrays["test_images"], max_image_pixels)
    train_labels = npz_labels(arrays, "train", root)
    test_labels = npz_labels(arrays, "test", root)
    return source_from_arrays(
        root, arrays["train_images"], train_labels, arrays.get("test_images"), test_labels
    )


def check_image_size(root: str, name: str, images: np.ndarray, max_image_pixels: int) -> None:
    """Raise InputError if images, (images, height, width, ...), have too many pixels."""
    if math.prod(images.shape[1:3]) > max_image_pixels:
        raise InputError(
            f"data.root={root}: {name} is {images.shape}: "
            f"its images exceed data.max_image_pixels={max_image_pixels}"
        )


def npz_labels(arrays: dict[str, np.ndarray], part: str, root: str) -> np.ndarray | None:
    """Return the labels of ``train`` or ``test``, (images,) int64, or None if there are none.

    Raises:
        InputError: the labels are not one class number for each image.
    """
    labels = arrays.get(f"{part}_labels")
    images = arrays.get(f"{part}_images")
    if labels is None or images is None:
        return None
    is_integer = np.issubdtype(labels.dtype, np.integer)
    if labels.size != len(images) or not is_integer or (labels < 0).any():
        raise InputError(
            f"data.root={root}: {part}_labels must hold one class number (0 or more) for each of "
            f"the {len(images)} images, got {labels.dtype} {labels.shape}"
        )
    return labels.reshape(-1).astype(np.int64)


def source_from_arrays(
    what: str,
    train_images: np.ndarray,
    train_labels: np.ndarray | None,
    test_images: np.ndarray | None,
    test_labels: np.ndarray | None,
) -> DataSource:
    """Return arrays as a source; the labelled training images are the bank, the test the queries.

    Args:
        what: name of the dataset for messages.
        test_images: ignored without `test_labels`.

    Raises:
        InputError: the arrays are no images, or there are more or fewer labels than images.
    """
    train = ArrayImages(train_images, f"{what}: train_images")
    bank = None
    queries = None
    if train_labels is not None:
        bank = labelled(what, train, train_labels)
    if test_images is not None and test_labels is not None:
        test = ArrayImages(test_images, f"{what}: test_images")
        queries = labelled(what, test, test_labels)
    return DataSource(train, bank, queries, image_size=max(train.tensor.shape[1:3]))


def labelled(what: str, images: ArrayImages, labels: np.ndarray) -> Labelled:
    """Return images with their labels. Raises InputError if their numbers differ."""
    if len(images) != len(labels):
        raise InputError(f"{what}: {len(images)} images and {len(labels)} labels")
    return Labelled(images, np.asarray(labels, dtype=np.int64))
