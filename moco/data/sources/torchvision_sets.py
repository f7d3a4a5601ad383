"""Datasets that torchvision reads and downloads: CIFAR, Fashion-MNIST and STL-10."""

from typing import Any

import numpy as np

from moco.data.sources.arrays import source_from_arrays
from moco.data.sources.source import ArrayImages, DataSource
from moco.errors import InputError

TORCHVISION_CLASSES = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "fashion_mnist": "FashionMNIST",
    "stl10": "STL10",
}


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
    return source_from_arrays(class_name, *arrays)


def stl10_source(root: str, download: bool) -> DataSource:
    """Return STL-10: training uses the 100,000 unlabelled images too."""
    unlabelled = torchvision_dataset("STL10", root, split="train+unlabeled", download=download)
    train = torchvision_dataset("STL10", root, split="train", download=download)
    test = torchvision_dataset("STL10", root, split="test", download=download)
    labelled = source_from_arrays(
        "STL10", channels_last(train.data), train.labels, channels_last(test.data), test.labels
    )
    all_images = ArrayImages(channels_last(unlabelled.data), "STL10")
    return DataSource(all_images, labelled.bank, labelled.queries, labelled.image_size)


def channels_last(images: np.ndarray) -> np.ndarray:
    """Return images (images, channels, height, width) as (images, height, width, channels)."""
    return images.transpose(0, 2, 3, 1)


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
        advice = "" if kwargs.get("download") else "; data.download=true fetches it"
        raise InputError(
            f"data.root={root}: {class_name} is not there or damaged ({reason}){advice}"
        ) from error
