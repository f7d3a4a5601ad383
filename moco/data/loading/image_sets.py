"""The image sets of `moco.embed`: every image once, from the place where an earlier pass stopped."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from moco.data.files.images import UnreadableImage
from moco.data.loading.every_image import ReadImage, every_image, in_batches
from moco.data.loading.lost_workers import WatchedLoader
from moco.data.loading.workers import CPU
from moco.data.sources.shards import (
    Problem,
    Sample,
    ShardedImages,
    images_in,
    is_local,
    sample_key,
)
from moco.data.sources.source import ArrayImages, Labelled

Crop = Callable[[Image.Image], Image.Image]


class ImageBatch(NamedTuple):
    """Neighbouring images of a set. Unreadable ones are left out, so that it may be empty."""

    images: Tensor
    """(readable images, 3, side, side) uint8."""
    names: list[str]
    labels: Tensor
    """(readable images,) int64; -1 without labels."""
    problems: list[Problem]
    """What cannot be read in this part of the set."""
    end: list[int]
    """The place where the next batch starts."""


class ImageSet(Protocol):
    """Images in a fixed order. A place is a list of numbers."""

    @property
    def start(self) -> list[int]:
        """The place of the first image."""
        ...

    @property
    def has_labels(self) -> bool:
        """Whether every image has a label."""
        ...

    @property
    def is_in_memory(self) -> bool:
        """Whether the images are in memory, so that loader processes would not help."""
        ...

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """Return a hash of the names, labels and order. The content of files does not count."""
        ...

    def batches(
        self,
        place: list[int],
        crop: Crop,
        image_size: int,
        batch_size: int,
        num_workers: int,
        device: torch.device = CPU,
    ) -> WatchedLoader:
        """Return a loader of all images from `place` on, as `ImageBatch`.

        Args:
            place: `start`, or the end of a batch. With the same `batch_size`, the batches are then
                the same as in one pass.
            crop: cuts an image to a square of `image_size` px.
            device: the device that uses the batches.
        """
        ...


@dataclass(frozen=True)
class IndexedSet:
    """An `ImageSet` of images by number; a place is [number]."""

    labelled: Labelled
    has_labels: bool
    """If not, all labels are -1."""

    @property
    def start(self) -> list[int]:
        return [0]

    @property
    def is_in_memory(self) -> bool:
        return isinstance(self.labelled.images, ArrayImages)

    def __len__(self) -> int:
        return len(self.labelled.images)

    def fingerprint(self) -> str:
        """See `ImageSet`. The pixels of images in memory count, because they have no names."""
        images = self.labelled.images
        digest = hashlib.blake2b(self.labelled.labels.tobytes(), digest_size=16)
        if isinstance(images, ArrayImages):
            digest.update(images.tensor.numpy().data)
        for index in range(len(images)):
            digest.update(images.name(index).encode(errors="surrogatepass") + b"\0")
        return digest.hexdigest()

    def batches(
        self,
        place: list[int],
        crop: Crop,
        image_size: int,
        batch_size: int,
        num_workers: int,
        device: torch.device = CPU,
    ) -> WatchedLoader:
        """See `ImageSet`."""
        keys = in_batches(range(place[0], len(self)), batch_size)
        # A tensor, because loader processes share its memory.
        labels = torch.from_numpy(self.labelled.labels)
        collate = IndexedCollate(labels, image_size)
        images = self.labelled.images
        return every_image(images, CropToTensor(crop), collate, keys, num_workers, device)


@dataclass(frozen=True)
class CropToTensor:
    """From a Pillow image to a square tensor (3, side, side) uint8."""

    crop: Crop

    def __call__(self, image: Image.Image) -> Tensor:
        return pil_to_tensor(self.crop(image))


@dataclass(frozen=True)
class IndexedCollate:
    """Make an `ImageBatch` of images that were read by their number.

    Args:
        labels: (images,) int64, of the whole set.
    """

    labels: Tensor
    image_size: int

    def __call__(self, read: list[ReadImage]) -> ImageBatch:
        readable = [image for image in read if not image.problem]
        problems = []
        for image in read:
            if image.problem:
                problems.append(Problem(image.name, image.problem, is_shard=False))
        names = [image.name for image in readable]
        keys = torch.tensor([image.key for image in readable], dtype=torch.int64)
        end = [read[-1].key + 1]
        images = stack_images(readable, self.image_size)
        return ImageBatch(images, names, self.labels[keys], problems, end)


def stack_images(readable: list[ReadImage], image_size: int) -> Tensor:
    """Return images as (images, 3, image_size, image_size) uint8, also if there are none."""
    images = torch.empty(len(readable), 3, image_size, image_size, dtype=torch.uint8)
    for row, image in enumerate(readable):
        images[row] = image.value
    return images


@dataclass(frozen=True)
class ShardedSet:
    """An `ImageSet` of tar shards, one after the other.

    A place is [number of the shard, members of it that are done]. The calling process reads the
    shards and hands the encoded images to the loader processes. So the order is that of the shards
    for any number of loader processes.
    """

    sharded: ShardedImages

    has_labels = False
    is_in_memory = False

    @property
    def start(self) -> list[int]:
        return [0, 0]

    def __len__(self) -> int:
        return len(self.sharded)

    def fingerprint(self) -> str:
        """See `ImageSet`: a hash of the names of the shards, and of the sizes of local ones."""
        digest = hashlib.blake2b(digest_size=16)
        for shard in self.sharded.shards:
            size = str(os.path.getsize(shard)) if is_local(shard) else ""
            digest.update(f"{shard}\0{size}\0".encode(errors="surrogatepass"))
        return digest.hexdigest()

    def batches(
        self,
        place: list[int],
        crop: Crop,
        image_size: int,
        batch_size: int,
        num_workers: int,
        device: torch.device = CPU,
    ) -> WatchedLoader:
        """See `ImageSet`."""
        keys = in_batches(ShardedSamples(self.sharded, place), batch_size)
        collate = ShardedCollate(image_size)
        make = CropToTensor(crop)
        return every_image(DecodedSamples(), make, collate, keys, num_workers, device)


class FoundSample(NamedTuple):
    """A sample of a shard, or what cannot be read there."""

    found: Sample | Problem
    name: str
    """SHARD/KEY without the folders of the shard. A key alone can be in several shards."""
    end: list[int]
    """The place after it."""


@dataclass(frozen=True)
class ShardedSamples:
    """All samples of the shards from a place on, as `FoundSample`."""

    sharded: ShardedImages
    place: list[int]

    def __iter__(self) -> Iterator[FoundSample]:
        first_shard, num_done = self.place
        for number in range(first_shard, len(self.sharded.shards)):
            shard = self.sharded.shards[number]
            samples = images_in(shard, self.sharded.max_image_pixels)
            for member, found in enumerate(samples, start=1):
                # What an earlier pass has done is read again, but not decoded.
                if number == first_shard and member <= num_done:
                    continue
                key = sample_key(found.name.removeprefix(f"{shard}/"))
                yield FoundSample(found, f"{os.path.basename(shard)}/{key}", [number, member])


class DecodedSamples:
    """The images of `FoundSample` keys."""

    def name(self, key: FoundSample) -> str:
        """Return the name for messages."""
        return key.found.name

    def __getitem__(self, key: FoundSample) -> Image.Image:
        if isinstance(key.found, Problem):
            raise UnreadableImage(key.found.reason)
        return Image.fromarray(key.found.image.pixels())


@dataclass(frozen=True)
class ShardedCollate:
    """Make an `ImageBatch` of samples that were read."""

    image_size: int

    def __call__(self, read: list[ReadImage]) -> ImageBatch:
        readable = [image for image in read if not image.problem]
        problems = []
        for image in read:
            if image.problem:
                found = image.key.found
                is_shard = isinstance(found, Problem) and found.is_shard
                problems.append(Problem(image.name, image.problem, is_shard))
        names = [image.key.name for image in readable]
        labels = torch.full((len(readable),), -1)
        images = stack_images(readable, self.image_size)
        return ImageBatch(images, names, labels, problems, read[-1].key.end)
