"""Datasets and loaders that make batches of images with masks.

Every loader process imports this file, so it does not import Lightning, which would take seconds.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms import v2

from moco.data.augment.views import Normalized
from moco.data.loading.every_image import ReadImage, every_image
from moco.data.loading.workers import CPU, WatchedLoader, unchanged
from moco.segmentation.mask_augmentation import (
    SegmentationView,
    as_image,
    normalized_image,
)
from moco.segmentation.masked_images import MaskedImages

# The longer side of a scaled image, in multiples of the shorter one's target. Without a limit an
# image of one pixel by a million would need gigabytes.
MAX_ASPECT = 8


class MaskBatch(NamedTuple):
    """A batch of N readable images with their masks."""

    images: Tensor
    """(N, bands, height, width) normalised; no dimension but the first if N is 0."""
    classes: Tensor
    """(N, height, width) int64, the class of each pixel."""
    indices: Tensor
    """(N,) the number of each image in its dataset."""
    unreadable: list[ReadImage]
    """The images that were readable when the run began, and are not any more."""


def num_read(batch: MaskBatch) -> int:
    """Return the number of images of a batch, with the unreadable ones."""
    return len(batch.indices) + len(batch.unreadable)


@dataclass(frozen=True)
class Crops:
    """Augmented crops for training, by (epoch, number).

    A number of M or more is another crop of one of the M images: after the last comes the first.
    """

    images: MaskedImages
    view: SegmentationView

    def name(self, place: tuple[int, int]) -> str:
        """Return the path of the image."""
        return self.images.name(place[1] % len(self.images))

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        """Return a normalised crop, the classes of its pixels, and the number of the image."""
        epoch, number = place
        index = number % len(self.images)
        pixels, classes = self.view(*self.images[index], epoch, number)
        return pixels, classes, index


@dataclass(frozen=True)
class WholeImages:
    """Whole images with their masks, by index."""

    images: MaskedImages
    normalize: Normalized
    """Makes a normalised tensor of an image."""
    image_size: int | None
    """None: an image keeps its size. Otherwise it is scaled, see `scaled_size`."""
    stride: int
    """The sides of a scaled image are multiples of it, px."""

    def name(self, index: int) -> str:
        """Return the path of the image."""
        return self.images.name(index)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        """Return a normalised image, the classes of its mask's pixels, and its number."""
        pixels, mask = self.images[index]
        image = as_image(pixels)
        # The mask is not scaled. Predictions are enlarged to its size instead.
        if self.image_size is not None:
            size = scaled_size(pixels.shape[0], pixels.shape[1], self.image_size, self.stride)
            image = v2.functional.resize(image, list(size))
        classes = torch.from_numpy(mask).long()
        return normalized_image(self.normalize, image), classes, index


def mask_batch(read: list[ReadImage]) -> MaskBatch:
    """Make a batch of `Crops`, or of `WholeImages` of one size."""
    readable = []
    unreadable = []
    for image in read:
        if image.problem:
            unreadable.append(image)
        else:
            readable.append(image.value)
    if not readable:
        return MaskBatch(torch.empty(0), torch.empty(0), torch.empty(0), unreadable)
    images, classes, indices = default_collate(readable)
    return MaskBatch(images, classes, indices, unreadable)


def scaled_size(height: int, width: int, image_size: int, stride: int) -> tuple[int, int]:
    """Return the height and width of an image whose shorter side is scaled to about `image_size`.

    Both are multiples of `stride`, so the cells of every feature map cover the image exactly. The
    longer side has at most `MAX_ASPECT` times `image_size`.

    Args:
        height, width, image_size, stride: px.
    """
    shorter, longer = sorted((height, width))
    factor = min(image_size / shorter, MAX_ASPECT * image_size / longer)
    num_rows = max(1, round(height * factor / stride))
    num_columns = max(1, round(width * factor / stride))
    return num_rows * stride, num_columns * stride


def batches_of_one_size(
    sizes: np.ndarray, indices: Sequence[int], batch_size: int
) -> list[list[int]]:
    """Divide images into batches of at most `batch_size`, each with images of one size.

    Args:
        sizes: (M, 2) height and width of every image of the dataset.
        indices: which images to use. The order of a size's images stays.
    """
    by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index in indices:
        height, width = sizes[index].tolist()
        by_size[height, width].append(index)
    batches = []
    for alike in by_size.values():
        for start in range(0, len(alike), batch_size):
            batches.append(alike[start : start + batch_size])
    return batches


def whole_image_loader(
    images: MaskedImages,
    normalize: Normalized,
    batch_size: int,
    num_workers: int = 0,
    device: torch.device = CPU,
    *,
    indices: Sequence[int] | None = None,
    image_size: int | None = None,
    stride: int = 1,
) -> WatchedLoader:
    """Return a loader of whole images for `device`, each batch with images of one size.

    The order of the images does not depend on `batch_size`.

    Args:
        indices: which images; None: all.
        image_size, stride: see `WholeImages`.
    """
    if indices is None:
        indices = range(len(images))
    whole = WholeImages(images, normalize, image_size, stride)
    batches = batches_of_one_size(images.sizes, indices, batch_size)
    return every_image(whole, unchanged, mask_batch, batches, num_workers, device)
