"""Every image of a set once, in order, from any place on. Unreadable images are marked.

`every_image` is the only way to do this. Evaluation uses it here, and `moco.embed` in
`moco.data.loading.image_sets`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset

from moco.data.augment.views import EvaluationView, Transform
from moco.data.files.images import UnreadableImage
from moco.data.loading.workers import CPU, WatchedLoader, loader_options, note_read
from moco.data.sources.source import ArrayImages, Labelled


class ReadImage(NamedTuple):
    """One image that was read, or that cannot be read."""

    key: Any
    name: str
    value: Any
    """The result of `make`; None if the image cannot be read."""
    problem: str
    """Why the image cannot be read; empty if it can."""


@dataclass(frozen=True)
class ImageReader(Dataset[ReadImage]):
    """Read images by their keys, in a loader process.

    Args:
        images: ``images[key]`` is an image, or raises `UnreadableImage`. ``images.name(key)`` is
            its name for messages.
        make: gets an image and returns what is wanted of it. It may raise `UnreadableImage`.
    """

    images: Any
    make: Callable[[Any], Any]

    def __getitem__(self, key: Any) -> ReadImage:
        name = self.images.name(key)
        note_read(name)
        try:
            value = self.make(self.images[key])
        except UnreadableImage as error:
            return ReadImage(key, name, None, str(error))
        return ReadImage(key, name, value, "")


def every_image(
    images: Any,
    make: Callable[[Any], Any],
    collate: Callable[[list[ReadImage]], Any],
    batches: Iterable[list[Any]],
    num_workers: int = 0,
    device: torch.device = CPU,
) -> WatchedLoader:
    """Return a loader that reads the images of each batch of keys, in order.

    Args:
        images, make: see `ImageReader`.
        collate: makes a batch of the results; runs in the loader processes.
        batches: the keys of each batch.
        device: the device that uses the batches.
    """
    options = loader_options(num_workers, device)
    options["persistent_workers"] = False  # the processes end with the pass
    reader = ImageReader(images, make)
    return WatchedLoader(reader, batch_sampler=batches, collate_fn=collate, **options)


class EvaluationBatch(NamedTuple):
    """A batch of plain images with labels."""

    images: Tensor
    """(batch, 3, side, side) float32, normalised."""
    labels: Tensor
    """(batch,) int64."""
    unreadable: Tensor
    """(batch,) bool: the image cannot be read, and its row is zero."""


def evaluation_batch(labels: Tensor, image_size: int, read: list[ReadImage]) -> EvaluationBatch:
    """Make a batch of images that were read by their number.

    Args:
        labels: (images,) int64, of the whole set.
        image_size: side of the images, px.
    """
    images = torch.zeros(len(read), 3, image_size, image_size)
    unreadable = torch.zeros(len(read), dtype=torch.bool)
    for row, image in enumerate(read):
        if image.problem:
            unreadable[row] = True
        else:
            images[row] = image.value
    return EvaluationBatch(images, labels[[image.key for image in read]], unreadable)


def evaluation_loader(
    labelled: Labelled,
    view: Transform,
    image_size: int,
    batch_size: int,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device = CPU,
) -> "WatchedLoader | MemoryBatches":
    """Return labelled images in order as `EvaluationBatch`, without augmentation.

    Args:
        view: from an image to a tensor (3, image_size, image_size).
        rank, world_size: every `world_size`-th image from `rank` on.
        device: the device that uses the batches.
    """
    # A tensor, because loader processes share its memory.
    labels = torch.from_numpy(labelled.labels)
    images = labelled.images
    if isinstance(images, ArrayImages) and isinstance(view, EvaluationView):
        side = view.unchanged_size
        if images.tensor.shape[1:3] == (side, side):
            own = slice(rank, None, world_size)
            return MemoryBatches(images.tensor[own], labels[own], view, batch_size, device)
    batches = BatchSampler(range(rank, len(images), world_size), batch_size, drop_last=False)
    collate = partial(evaluation_batch, labels, image_size)
    return every_image(images, view, collate, batches, num_workers, device)


@dataclass(frozen=True)
class MemoryBatches:
    """Batches of images in memory whose size is the evaluation's, without loader processes.

    The images are moved to `device` as bytes and normalised there. The results are the same bits
    as those of `every_image`.
    """

    pixels: Tensor
    """(images, side, side, 3) uint8."""
    labels: Tensor
    """(images,) int64."""
    view: EvaluationView
    """It only normalises these images."""
    batch_size: int
    device: torch.device

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[EvaluationBatch]:
        scale = self.view.normalized.scale.to(self.device)
        shift = self.view.normalized.shift.to(self.device)
        for first in range(0, len(self.labels), self.batch_size):
            rows = slice(first, first + self.batch_size)
            pixels = self.pixels[rows].to(self.device).permute(0, 3, 1, 2)
            labels = self.labels[rows]
            unreadable = torch.zeros(len(labels), dtype=torch.bool)
            yield EvaluationBatch(pixels * scale - shift, labels, unreadable)
