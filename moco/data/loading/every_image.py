"""Every image of a set once, in order, from any place on. Unreadable images are marked.

`every_image` is the only way to do this. Evaluation uses it by `evaluation_loader`, `moco.embed` by
the image sets at the end of this file.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset

from moco.data.augment.views import AnyImage, EvaluationView, Transform, as_planes
from moco.data.files.images import EncodedImage, UnreadableImage
from moco.data.loading.workers import CPU, WatchedLoader, loader_options, note_read, unchanged
from moco.data.sources.own_dataset import IterableImages
from moco.data.sources.pixel_values import RGB_BANDS, PixelValues
from moco.data.sources.shards import Problem, Sample, ShardedImages, images_in, is_local, sample_key
from moco.data.sources.source import ArrayImages, Images, Labelled

Crop = Callable[[AnyImage], Any]
IMAGES_AT_ONCE = 16  # that a loader process returns together


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
    """(batch, bands, side, side) float32, normalised."""
    labels: Tensor
    """(batch,) int64."""
    unreadable: Tensor
    """(batch,) bool: the image cannot be read, and its row is zero."""


def num_images(batch: EvaluationBatch) -> int:
    """Return the number of images of a batch, with the unreadable ones."""
    return len(batch.labels)


def evaluation_batch(
    labels: Tensor, bands: int, image_size: int, read: list[ReadImage]
) -> EvaluationBatch:
    """Make a batch of images that were read by their number.

    Args:
        labels: (images,) int64, of the whole set.
        bands: of the images.
        image_size: side of the images, px.
    """
    images = torch.zeros(len(read), bands, image_size, image_size)
    unreadable = torch.zeros(len(read), dtype=torch.bool)
    for row, image in enumerate(read):
        if image.problem:
            unreadable[row] = True
        else:
            images[row] = image.value
    numbers = [image.key for image in read]
    return EvaluationBatch(images, labels[numbers], unreadable)


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
        view: from an image to a tensor (bands, image_size, image_size).
        rank, world_size: every `world_size`-th image from `rank` on.
        device: the device that uses the batches.
    """
    # A tensor, because loader processes share its memory.
    labels = torch.from_numpy(labelled.labels)
    images = labelled.images
    # Without a crop the device normalises whole batches, and processes would only copy them.
    if isinstance(images, ArrayImages) and isinstance(view, EvaluationView):
        side = view.unchanged_size
        if images.tensor.shape[1:3] == (side, side):
            own = slice(rank, None, world_size)
            return MemoryBatches(images, images.tensor[own], labels[own], view, batch_size, device)
    batches = BatchSampler(range(rank, len(images), world_size), batch_size, drop_last=False)
    bands = RGB_BANDS
    if images.values is not None:
        bands = images.values.bands
    collate = partial(evaluation_batch, labels, bands, image_size)
    return every_image(images, view, collate, batches, num_workers, device)


@dataclass(frozen=True)
class MemoryBatches:
    """Batches of images in memory whose size is the evaluation's, without loader processes.

    The images are moved to `device` as they are and normalised there. The results are the same bits
    as those of `every_image`.
    """

    images: ArrayImages
    pixels: Tensor
    """(images, side, side, bands), some of the images."""
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
            pixels = self.images.batch(self.pixels[rows].to(self.device))
            labels = self.labels[rows]
            unreadable = torch.zeros(len(labels), dtype=torch.bool)
            yield EvaluationBatch(pixels * scale - shift, labels, unreadable)


class ImageBatch(NamedTuple):
    """Neighbouring images of a set. Unreadable ones are left out, so that it may be empty."""

    images: Tensor
    """(readable images, bands, side, side), uint8 or float32; no dimension but the first if there
    are none."""
    names: list[str]
    labels: Tensor
    """(readable images,) int64; -1 without labels."""
    problems: list[Problem]
    """What cannot be read in this part of the set."""
    end: list[int]
    """The place where the next batch starts."""


class ImageKey(NamedTuple):
    """An image of a set, or what cannot be read there."""

    source: Any
    """The number of the image, or a `Sample` or `Problem` of a shard."""
    name: str
    label: int
    """-1 without labels."""
    end: list[int]
    """The place after it."""


class ImageSet(ABC):
    """Images in a fixed order. A place is a list of numbers."""

    start: ClassVar[list[int]]
    """The place of the first image."""
    has_labels: bool
    values: PixelValues | None = None
    """Makes the pixels that the model gets."""
    class_names: tuple[str, ...] | None = None
    """The name of each class by its number, if they are known."""
    label_sets: np.ndarray | None = None
    """See `Labelled`."""
    images: Any = None
    """Images by number, of keys whose source is a number."""

    @property
    def is_in_memory(self) -> bool:
        """Whether the images are in memory, so that loader processes would not help."""
        return isinstance(self.images, ArrayImages)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of the names, labels and order. The content of files does not count."""

    @abstractmethod
    def keys_from(self, place: list[int]) -> Iterator[ImageKey]:
        """Yield the images from `place` on."""

    def batches(
        self,
        place: list[int],
        crop: Crop,
        batch_size: int,
        num_workers: int,
        device: torch.device = CPU,
    ) -> WatchedLoader:
        """Return a loader of all images from `place` on, as `ImageBatch`, for one pass.

        Args:
            place: `start`, or the end of a batch. With the same `batch_size`, the batches are then
                the same as in one pass.
            crop: cuts an image to a square.
            device: the device that uses the batches.

        Raises:
            InputError: while iterating, a shard is refused.
        """
        keys: Iterator[Any] = self.keys_from(place)
        batches = BatchSampler(keys, batch_size, drop_last=False)
        make = partial(cropped, crop)
        reader = KeyReader(self.images, self.values)
        return every_image(reader, make, image_batch, batches, num_workers, device)

    def each(self, make: Callable[[EncodedImage], Any], num_workers: int) -> Iterator[ReadImage]:
        """Yield what `make` returns of each image, as it is in the file.

        Args:
            make: runs in the loader processes; may raise `UnreadableImage`.
        """
        keys: Iterator[Any] = self.keys_from(self.start)
        batches = BatchSampler(keys, IMAGES_AT_ONCE, drop_last=False)
        reader = KeyReader(self.images, values=None)
        for read in every_image(reader, make, unchanged, batches, num_workers):
            yield from read


@dataclass(frozen=True)
class KeyReader:
    """Read the images of an `ImageSet` by `ImageKey`, in a loader process."""

    images: Any
    values: PixelValues | None
    """Makes the pixels that the model gets; None leaves them as they are in the file."""

    def name(self, key: ImageKey) -> str:
        """Return the name for messages."""
        if isinstance(key.source, int):
            return key.name
        return key.source.name

    def __getitem__(self, key: ImageKey) -> EncodedImage:
        # The calling process has read the shard; here its images are decoded.
        if isinstance(key.source, Problem):
            raise UnreadableImage(key.source.reason)
        if isinstance(key.source, Sample):
            image = key.source.image
        else:
            image = self.images.opened(key.source)
        if self.values is None:
            return image
        return self.values.of(image, self.name(key))


def cropped(crop: Crop, image: EncodedImage) -> Tensor:
    """Return a square of an image, (bands, side, side), uint8 or float32."""
    return as_planes(crop(image.pixels()))


def image_batch(read: list[ReadImage]) -> ImageBatch:
    """Make a batch of the images of an `ImageSet`."""
    images, names, labels, problems = [], [], [], []
    for image in read:
        source = image.key.source
        if image.problem:
            is_shard = isinstance(source, Problem) and source.is_shard
            problems.append(Problem(image.name, image.problem, is_shard))
        else:
            images.append(image.value)
            names.append(image.key.name)
            labels.append(image.key.label)
    pixels = torch.empty(0, dtype=torch.uint8)
    if images:
        pixels = torch.stack(images)
    all_labels = torch.tensor(labels, dtype=torch.int64)
    return ImageBatch(pixels, names, all_labels, problems, read[-1].key.end)


class IndexedSet(ImageSet):
    """An `ImageSet` of images by number; a place is [number].

    Args:
        has_labels: if not, all labels are -1.
    """

    start: ClassVar = [0]

    def __init__(self, labelled: Labelled, has_labels: bool) -> None:
        self.images = labelled.images
        self.values = labelled.images.values
        self.labels = labelled.labels
        self.class_names = labelled.class_names
        self.label_sets = labelled.label_sets
        self.has_labels = has_labels

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        """See `ImageSet`. The pixels of images in memory count, because they have no names."""
        digest = hashlib.blake2b(self.labels.tobytes(), digest_size=16)
        if isinstance(self.images, ArrayImages):
            for image in self.images.tensor:
                digest.update(image.numpy().tobytes())
        for index in range(len(self)):
            name = self.images.name(index)
            # Names that are not UTF-8 hold surrogates. The zero keeps a, bc apart from ab, c.
            digest.update(name.encode(errors="surrogatepass") + b"\0")
        return digest.hexdigest()

    def keys_from(self, place: list[int]) -> Iterator[ImageKey]:
        for index in range(place[0], len(self)):
            name = self.images.name(index)
            label = int(self.labels[index])
            yield ImageKey(index, name, label, [index + 1])


class ShardedSet(ImageSet):
    """An `ImageSet` of tar shards, one after the other.

    A place is [number of the shard, members of it that are done]. The calling process reads the
    shards and hands the encoded images to the loader processes. So the order is that of the shards
    for any number of loader processes.
    """

    start: ClassVar = [0, 0]
    has_labels = False

    def __init__(self, sharded: ShardedImages) -> None:
        self.sharded = sharded
        self.values = sharded.values

    def __len__(self) -> int:
        return len(self.sharded)

    def fingerprint(self) -> str:
        """See `ImageSet`: a hash of the names of the shards, and of the sizes of local ones."""
        digest = hashlib.blake2b(digest_size=16)
        for shard in self.sharded.shards:
            size = ""
            if is_local(shard):
                size = str(os.path.getsize(shard))
            digest.update(f"{shard}\0{size}\0".encode(errors="surrogatepass"))
        return digest.hexdigest()

    def keys_from(self, place: list[int]) -> Iterator[ImageKey]:
        first_shard, num_done = place
        for number, shard in enumerate(self.sharded.shards[first_shard:], start=first_shard):
            sharded = self.sharded
            samples = images_in(shard, sharded.max_image_pixels, raw=sharded.reading.raw)
            for member, found in enumerate(samples, start=1):
                # What an earlier pass has done is read again, but not decoded.
                if number == first_shard and member <= num_done:
                    continue
                # A key alone can be in several shards.
                key = sample_key(found.name.removeprefix(f"{shard}/"))
                name = f"{os.path.basename(shard)}/{key}"
                yield ImageKey(found, name, -1, [number, member])


class IterableSet(ImageSet):
    """An `ImageSet` of an iterable dataset, in the order of its first epoch; a place is [number].

    The calling process reads the dataset and hands the images to the loader processes.
    """

    start: ClassVar = [0]
    has_labels = False

    def __init__(self, images: IterableImages) -> None:
        self.iterable = images
        self.values = images.values

    def __len__(self) -> int:
        return len(self.iterable)

    def fingerprint(self) -> str:
        """See `ImageSet`: the number of images alone, because they have no names."""
        return f"{self.iterable.what} {len(self.iterable)}"

    def keys_from(self, place: list[int]) -> Iterator[ImageKey]:
        for number, item in enumerate(self.iterable.items(epoch=0)):
            # What an earlier pass has done is read again, but not used.
            if number < place[0]:
                continue
            name = self.iterable.name(number)
            source: Sample | Problem
            try:
                source = Sample(self.iterable.opened_item(number, item), name)
            except UnreadableImage as error:
                source = Problem(name, str(error), is_shard=False)
            yield ImageKey(source, name, -1, [number + 1])


def image_set(images: Images, labels: np.ndarray | None = None) -> ImageSet:
    """Return the images of a dataset as an `ImageSet`.

    Args:
        labels: (images,) int64, -1 for those without; None: no image has one.
    """
    if isinstance(images, ShardedImages):
        return ShardedSet(images)
    if isinstance(images, IterableImages):
        return IterableSet(images)
    if labels is None:
        labels = np.full(len(images), -1)
    has_labels = bool((labels >= 0).any())
    return IndexedSet(Labelled(images, labels), has_labels)
