"""Datasets that fit in memory: digits, noise, .npz archives, and what torchvision downloads."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moco.data.files.archives import DAMAGED, read_arrays
from moco.data.sources.label_sets import is_matrix_of_classes, shared_numbers
from moco.data.sources.own_dataset import class_names_of
from moco.data.sources.source import (
    ArrayImages,
    DataSource,
    Labelled,
    warn_of_missing_classes,
)
from moco.errors import InputError, printable

NPZ_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
NUM_DIGITS_TO_TRAIN_ON = 1437  # of 1,797
TORCHVISION_CLASSES = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "fashion_mnist": "FashionMNIST",
    "stl10": "STL10",
}


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
    queries = slice(max(1, num_images // 10))
    return source_from_arrays("synthetic", images, labels, images[queries], labels[queries])


def npz_source(root: str) -> DataSource:
    """Return an archive in the MedMNIST layout.

    It holds train_images, and for labelled sets also train_labels, test_images and test_labels.
    Images are (images, height, width), or have an axis of bands, see `stored_layout`. Labels are
    integers, (images,) or (images, 1).

    Raises:
        InputError: the file is missing or damaged, or an array does not have this form.
    """
    if not Path(root).is_file():
        raise InputError(f"data.root={root}: no such file")
    try:
        arrays, present = read_arrays(root, NPZ_ARRAYS)
    except DAMAGED as error:
        reason = printable(str(error))
        raise InputError(f"data.root={root}: no .npz archive of plain arrays ({reason})") from error
    if "train_images" not in arrays:
        found = printable(", ".join(present)) or "none"
        raise InputError(f"data.root={root}: no array train_images in there (found {found})")
    return source_from_arrays(root, *map(arrays.get, NPZ_ARRAYS))


def source_from_arrays(
    what: str, train_images: Any, train_labels: Any, test_images: Any, test_labels: Any
) -> DataSource:
    """Return arrays as a source; the labelled training images are the bank, the test the queries.

    Args:
        what: name of the dataset for messages.
        train_labels, test_labels: whole numbers, (images,) or (images, 1); or 0 and 1,
            (images, classes), for images with several classes each; None without labels.
        test_images: ignored without `test_labels`.

    Raises:
        InputError: the arrays are no images, or the labels are none.
    """
    train = ArrayImages(train_images, f"{what}: train_images")
    sides: dict[str, tuple[ArrayImages, np.ndarray]] = {}
    if train_labels is not None:
        sides["train_labels"] = (train, np.asarray(train_labels))
    if test_images is not None and test_labels is not None:
        test = ArrayImages(test_images, f"{what}: test_images")
        sides["test_labels"] = (test, np.asarray(test_labels))
    labelled = labelled_sides(what, sides)
    bank, queries = labelled.get("train_labels"), labelled.get("test_labels")
    if bank is not None and queries is not None:
        warn_of_missing_classes(bank, queries)
    return DataSource(train, bank, queries, image_size=max(train.tensor.shape[1:3]))


def labelled_sides(
    what: str, sides: Mapping[str, tuple[ArrayImages, np.ndarray]]
) -> dict[str, Labelled]:
    """Return images with their labels, by the names of the labels' arrays.

    Args:
        what: name of the dataset for messages.
        sides: images and labels.

    Raises:
        InputError: the labels are neither one number for each image nor rows of 0 and 1.
    """
    matrices = []
    for images, labels in sides.values():
        if is_matrix_of_classes(labels, len(images)):
            matrices.append(labels)
    widths = {matrix.shape[1] for matrix in matrices}
    if sides and len(matrices) == len(sides) and len(widths) == 1:
        all_numbers, label_sets = shared_numbers(matrices)
        found = {}
        for (name, (images, _)), numbers in zip(sides.items(), all_numbers, strict=True):
            found[name] = Labelled(images, numbers, label_sets=label_sets)
        return found
    return {name: numbered(f"{what}: {name}", *side) for name, side in sides.items()}


def numbered(what: str, images: ArrayImages, labels: np.ndarray) -> Labelled:
    """Return images with a class number each."""
    is_integer = np.issubdtype(labels.dtype, np.integer)
    if labels.size != len(images) or not is_integer or (labels < 0).any():
        raise InputError(
            f"{what} must hold one class number (0 or more) for each of the {len(images)} images, "
            f"or a row of 0 and 1, got {labels.dtype} {labels.shape}"
        )
    return Labelled(images, labels.reshape(-1).astype(np.int64))


def torchvision_source(name: str, root: str, download: bool) -> DataSource:
    """Return one of `TORCHVISION_CLASSES`; its test images are the queries.

    Raises:
        InputError: see `torchvision_dataset`.
    """
    if name == "stl10":
        return stl10_source(root, download)
    class_name = TORCHVISION_CLASSES[name]
    arrays = []
    for is_train in (True, False):
        dataset = torchvision_dataset(class_name, root, train=is_train, download=download)
        arrays += [np.asarray(dataset.data), dataset.targets]
    return with_class_names(source_from_arrays(class_name, *arrays), class_names_of(dataset))


def stl10_source(root: str, download: bool) -> DataSource:
    """Return STL-10: training uses the 100,000 unlabelled images too."""
    arrays = []
    for split in ("train", "test", "train+unlabeled"):
        dataset = torchvision_dataset("STL10", root, split=split, download=download)
        # (images, channels, height, width) becomes (images, height, width, channels).
        arrays += [dataset.data.transpose(0, 2, 3, 1), dataset.labels]
    *of_labelled, all_images, _ = arrays
    labelled = source_from_arrays("STL10", *of_labelled)
    labelled = with_class_names(labelled, class_names_of(dataset))
    return replace(labelled, train=ArrayImages(all_images, "STL10"))


def with_class_names(source: DataSource, class_names: tuple[str, ...] | None) -> DataSource:
    """Return a source whose bank and queries have names for their classes, if there are any."""
    assert source.bank is not None
    assert source.queries is not None
    bank = replace(source.bank, class_names=class_names)
    return replace(source, bank=bank, queries=replace(source.queries, class_names=class_names))


def torchvision_dataset(class_name: str, root: str, **kwargs: Any) -> Any:
    """Return the dataset of that class in ``torchvision.datasets``.

    Raises:
        InputError: it is not below `root`, or it is damaged.
    """
    import torchvision.datasets

    dataset_class = getattr(torchvision.datasets, class_name)
    try:
        return dataset_class(root, **kwargs)
    # torchvision compares the MD5 of most files before it reads them, of all pickles among them.
    # Its parsers of the other files raise nearly any exception on damaged data.
    except Exception as error:
        reason = str(error) or type(error).__name__
        advice = ""
        if not kwargs.get("download"):
            advice = "; data.download=true fetches it"
        problem = f"{class_name} is not there or damaged ({reason}){advice}"
        raise InputError(f"data.root={root}: {problem}") from error
