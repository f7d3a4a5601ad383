"""Images with masks as the loader processes make batches of them.

Apart from `moco.segmentation.segmentation_data`, since every loader process imports this: Lightning would take it seconds.

Letters: M images, N batch, H W pixels.
"""

from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from moco.data.augment.views import Transform
from moco.data.files.images import UnreadableImage
from moco.data.loading.lost_workers import LastRead
from moco.segmentation.mask_augmentation import SegmentationView
from moco.segmentation.mask_sources import MaskedImages


class MaskBatch(NamedTuple):
    """A batch of images with their classes."""

    images: Tensor
    """(N, 3, H, W)."""
    classes: Tensor
    """(N, H, W) int64."""
    indices: Tensor
    """(N,) which image of its part each row is."""
    unreadable: Tensor
    """(N,) bool: that image could not be read, and the row stands for nothing."""


class CropDataset(Dataset[MaskBatch]):
    """Augmented crops, asked for by (epoch, index).

    Args:
        num_workers: processes that will read from this object at the same time.
    """

    def __init__(
        self, images: MaskedImages, view: SegmentationView, image_size: int, num_workers: int = 0
    ) -> None:
        self.last_read = LastRead(num_workers)
        self.images = images
        self.view = view
        self.image_size = image_size

    def __getitem__(self, place: tuple[int, int]) -> MaskBatch:
        epoch, index = place
        self.last_read.note(self.images.images.name(index))
        try:
            image, mask = self.images[index]
        except UnreadableImage:
            return unreadable_row(index, (self.image_size, self.image_size))
        return MaskBatch(
            *self.view(image, mask, epoch, index), torch.tensor(index), torch.tensor(False)
        )


class WholeDataset(Dataset[MaskBatch]):
    """Images as they are, normalised, by index.

    Args:
        num_workers: processes that will read from this object at the same time.
    """

    def __init__(self, images: MaskedImages, normalize: Transform, num_workers: int = 0) -> None:
        self.last_read = LastRead(num_workers)
        self.images = images
        self.normalize = normalize

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> MaskBatch:
        self.last_read.note(self.images.images.name(index))
        try:
            image, mask = self.images[index]
        except UnreadableImage:
            height, width = self.images.sizes[index].tolist()
            return unreadable_row(index, (height, width))
        classes = torch.from_numpy(mask).long()
        return MaskBatch(self.normalize(image), classes, torch.tensor(index), torch.tensor(False))


def unreadable_row(index: int, size: tuple[int, int]) -> MaskBatch:
    """What stands in for an image that could be opened when the run began, and cannot be decoded now."""
    return MaskBatch(
        torch.zeros(3, *size),
        torch.zeros(size, dtype=torch.int64),
        torch.tensor(index),
        torch.tensor(True),
    )


def batches_of_one_size(sizes: np.ndarray, batch_size: int) -> list[list[int]]:
    """Numbers of images (M, 2 sizes) in batches of at most `batch_size`, each of images of the same size."""
    rows: dict[Any, list[int]] = defaultdict(list)
    for row, size in enumerate(map(tuple, sizes.tolist())):
        rows[size].append(row)
    return [
        alike[start : start + batch_size]
        for alike in rows.values()
        for start in range(0, len(alike), batch_size)
    ]
