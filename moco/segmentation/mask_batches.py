"""Datasets and loaders that make batches of images with masks.

Every loader process imports this file, so it does not import Lightning, which would take seconds.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from moco.data.augment.views import Normalized
from moco.data.files.images import UnreadableImage
from moco.data.loading.loaders import ResumableLoader
from moco.data.loading.lost_workers import WatchedLoader, note_read
from moco.data.loading.samplers import EpochSampler
from moco.data.loading.workers import CPU, loader_options
from moco.segmentation.mask_augmentation import SegmentationView
from moco.segmentation.masked_images import MaskedImages

# The longer side of a scaled image, in multiples of the shorter one's target. Without a limit an
# image of one pixel by a million would need gigabytes.
MAX_ASPECT = 8


class MaskBatch(NamedTuple):
    """A batch of N images with their masks, or one row of it."""

    images: Tensor
    """(N, 3, height, width) normalised."""
    classes: Tensor
    """(N, height, width) int64, the class of each pixel."""
    indices: Tensor
    """(N,) the number of each image in its dataset."""
    unreadable: Tensor
    """(N,) bool: the image could not be read, and its row holds zeros."""


class CropDataset(Dataset[MaskBatch]):
    """Augmented crops for training, by (epoch, index).

    Args:
        images: the training images.
        view: the augmentation.
        image_size: side of the crops, px.
    """

    def __init__(self, images: MaskedImages, view: SegmentationView, image_size: int) -> None:
        self.images = images
        self.view = view
        self.image_size = image_size

    def __getitem__(self, place: tuple[int, int]) -> MaskBatch:
        epoch, index = place
        note_read(self.images.name(index))
        try:
            image, mask = self.images[index]
        except UnreadableImage:
            crop_size = (self.image_size, self.image_size)
            return unreadable_row(index, crop_size, crop_size)
        pixels, classes = self.view(image, mask, epoch, index)
        return readable_row(index, pixels, classes)


class WholeDataset(Dataset[MaskBatch]):
    """Whole images with their masks, by index.

    Args:
        images: the images.
        normalize: makes a normalised tensor of an image.
        image_size: None: an image keeps its size. Otherwise it is scaled, see `scaled_size`; its
            mask keeps its size.
        stride: the sides of a scaled image are multiples of it, px.
    """

    def __init__(
        self,
        images: MaskedImages,
        normalize: Normalized,
        image_size: int | None = None,
        stride: int = 1,
    ) -> None:
        self.images = images
        self.normalize = normalize
        self.image_size = image_size
        self.stride = stride

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> MaskBatch:
        note_read(self.images.name(index))
        height, width = self.images.sizes[index].tolist()
        size = (height, width)
        if self.image_size is not None:
            size = scaled_size(height, width, self.image_size, self.stride)
        try:
            image, mask = self.images[index]
        except UnreadableImage:
            return unreadable_row(index, size, (height, width))
        # The mask is not scaled. Predictions are enlarged to its size instead.
        if size != (height, width):
            image = v2.functional.resize(image, list(size))
        return readable_row(index, self.normalize(image), torch.from_numpy(mask).long())


def readable_row(index: int, image: Tensor, classes: Tensor) -> MaskBatch:
    """Return one row of a batch."""
    return MaskBatch(image, classes, torch.tensor(index), torch.tensor(False))


def unreadable_row(
    index: int, image_size: tuple[int, int], mask_size: tuple[int, int]
) -> MaskBatch:
    """Return the row for an image that was readable when the run began, and is not any more.

    Args:
        image_size, mask_size: height and width, px.
    """
    image = torch.zeros(3, *image_size)
    classes = torch.zeros(mask_size, dtype=torch.int64)
    return MaskBatch(image, classes, torch.tensor(index), torch.tensor(True))


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


def crop_loader(
    images: MaskedImages,
    view: SegmentationView,
    image_size: int,
    sampler: EpochSampler,
    batch_size: int,
    num_workers: int,
    device: torch.device,
) -> ResumableLoader:
    """Return the loader of the training crops, for `device`.

    Args:
        batch_size: images that the device gets at once.
    """
    dataset = CropDataset(images, view, image_size)
    options = loader_options(num_workers, device)
    return ResumableLoader(dataset, sampler, batch_size, **options)


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
        image_size, stride: see `WholeDataset`.
    """
    if indices is None:
        indices = range(len(images))
    # The loader processes end after each pass: passes are rare, and idle processes hold memory.
    dataset = WholeDataset(images, normalize, image_size, stride)
    batches = batches_of_one_size(images.sizes, indices, batch_size)
    options = loader_options(num_workers, device) | {"persistent_workers": False}
    return WatchedLoader(dataset, batch_sampler=batches, **options)
