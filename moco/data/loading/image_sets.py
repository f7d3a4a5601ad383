"""All images of a set once, as evaluation sees them, in the set's own order and from any place of it on.

Letters: M images, N batch, S side of an image, px.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from moco.data.files.decoding import EncodedImage
from moco.data.files.images import UnreadableImage
from moco.data.loading.lost_workers import LastRead, WatchedImage, WatchedLoader
from moco.data.loading.workers import CPU, loader_options
from moco.data.sources.shards import Problem, Sample, ShardedImages, images_in, is_local, sample_key
from moco.data.sources.source import ArrayImages, Labelled

Crop = Callable[[Image.Image], Image.Image]


class ImageBatch(NamedTuple):
    """Images that are neighbours in the set. Those that cannot be read are left out, so that N may even be 0."""

    images: Tensor
    """(N, 3, S, S) uint8."""
    names: list[str]
    labels: Tensor
    """(N,) int64, -1 where there is none."""
    problems: list[Problem]
    """What cannot be read here."""
    end: list[int]
    """The place where the next batch starts."""


class ImageSet(Protocol):
    """Images with a first and a last one."""

    @property
    def start(self) -> list[int]:
        """The place of the first image."""
        ...

    @property
    def has_labels(self) -> bool: ...

    @property
    def is_in_memory(self) -> bool: ...

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """Differs where the names, the labels or the order differ; the content of files is not looked at."""
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
        """Every image from `place` on.

        Args:
            place: `start`, or the end of a batch of the same `batch_size`; then the batches are the same as without a break.
            crop: makes a square of `image_size` px of any image.
            device: what the batches are for.
        """
        ...


@dataclass(frozen=True)
class IndexedSet:
    """A `ImageSet` of images by number; a place is [number]."""

    labelled: Labelled
    has_labels: bool
    """If not, the labels are all -1."""

    @property
    def start(self) -> list[int]:
        return [0]

    @property
    def is_in_memory(self) -> bool:
        return isinstance(self.labelled.images, ArrayImages)

    def __len__(self) -> int:
        return len(self.labelled.images)

    def fingerprint(self) -> str:
        """See `ImageSet`; images in memory have no names of their own, and their pixels count."""
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
        starts = range(place[0], len(self), batch_size)
        places = [(start, min(start + batch_size, len(self))) for start in starts]
        dataset = IndexedBatches(self.labelled, crop, image_size, num_workers)
        return in_order(dataset, places, num_workers, device)


class IndexedBatches(Dataset[ImageBatch]):
    """The worker's part of `IndexedSet`, asked for by (start, stop).

    Args:
        num_workers: processes that will read from this object at the same time.
    """

    def __init__(
        self, labelled: Labelled, crop: Crop, image_size: int, num_workers: int = 0
    ) -> None:
        self.last_read = LastRead(num_workers)
        self.images = labelled.images
        self.labels = torch.from_numpy(labelled.labels)  # a tensor, which loader processes share
        self.crop = crop
        self.image_size = image_size

    def __getitem__(self, place: tuple[int, int]) -> ImageBatch:
        numbers = range(*place)
        names = [self.images.name(number) for number in numbers]
        decode = [partial(self._decoded, number) for number in numbers]
        images, rows, reasons = cropped(decode, self.crop, self.image_size)
        problems = [Problem(names[row], reason, is_shard=False) for row, reason in reasons.items()]
        labels = self.labels[torch.tensor(rows, dtype=torch.int64) + place[0]]
        return ImageBatch(images, [names[row] for row in rows], labels, problems, [place[1]])

    def _decoded(self, number: int) -> Image.Image:
        """Raises UnreadableImage."""
        self.last_read.note(self.images.name(number))
        return self.images[number]


@dataclass(frozen=True)
class ShardedSet:
    """A `ImageSet` of tar shards, one after the other; a place is [number of the shard, members of it that are done].

    The calling process reads the shards and hands the encoded images to the workers: so the order is that of the shards,
    and a place is found again, whatever the number of workers.
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
        """See `ImageSet`: the shards' names and, where they are files, sizes."""
        digest = hashlib.blake2b(digest_size=16)
        for shard in self.sharded.shards:
            size = os.path.getsize(shard) if is_local(shard) else ""
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
        """See `ImageSet`.

        Raises:
            InputError: while iterating, a shard is refused.
        """
        dataset = ShardedBatches(crop, image_size, num_workers)
        return in_order(dataset, Chunks(self.sharded, place, batch_size), num_workers, device)


class Chunk(NamedTuple):
    """What a worker makes a batch of."""

    samples: list[Sample]
    names: list[str]
    """SHARD/KEY, the shard's file without its folders: keys alone often start anew in every shard."""
    problems: list[Problem]
    end: list[int]


@dataclass(frozen=True)
class Chunks:
    """All samples from a place on, so many at a time."""

    sharded: ShardedImages
    place: list[int]
    batch_size: int

    def __iter__(self) -> Iterator[Chunk]:
        samples: list[Sample] = []
        problems: list[Problem] = []
        names: list[str] = []
        end = self.place
        for shard, end, found in self._found():
            if isinstance(found, Problem):
                problems.append(found)
            else:
                samples.append(found)
                key = sample_key(found.name.removeprefix(f"{shard}/"))
                names.append(f"{os.path.basename(shard)}/{key}")
            if len(samples) == self.batch_size:
                yield Chunk(samples, names, problems, end)
                samples, names, problems = [], [], []
        if samples or problems:
            yield Chunk(samples, names, problems, end)

    def _found(self) -> Iterator[tuple[str, list[int], Sample | Problem]]:
        """For each sample its shard, the place behind it, and itself; so too for what cannot be read."""
        first, done = self.place
        for number in range(first, len(self.sharded.shards)):
            shard = self.sharded.shards[number]
            for member, found in enumerate(
                images_in(shard, self.sharded.max_image_pixels), start=1
            ):
                if number > first or member > done:
                    yield shard, [number, member], found


class ShardedBatches(Dataset[ImageBatch]):
    """The worker's part of `ShardedSet`.

    Args:
        num_workers: processes that will read from this object at the same time.
    """

    def __init__(self, crop: Crop, image_size: int, num_workers: int = 0) -> None:
        self.last_read = LastRead(num_workers)
        self.crop = crop
        self.image_size = image_size

    def __getitem__(self, chunk: Chunk) -> ImageBatch:
        note = self.last_read.note
        watched = [WatchedImage(sample.image, sample.name, note) for sample in chunk.samples]
        decode = [partial(decoded, image) for image in watched]
        images, rows, reasons = cropped(decode, self.crop, self.image_size)
        problems = chunk.problems + [
            Problem(chunk.samples[row].name, reason, is_shard=False)
            for row, reason in reasons.items()
        ]
        labels = torch.full((len(rows),), -1)
        return ImageBatch(images, [chunk.names[row] for row in rows], labels, problems, chunk.end)


def decoded(image: EncodedImage) -> Image.Image:
    """Raises UnreadableImage."""
    return Image.fromarray(image.pixels())


def cropped(
    decode: Sequence[Callable[[], Image.Image]], crop: Crop, image_size: int
) -> tuple[Tensor, list[int], dict[int, str]]:
    """Images as (N, 3, S, S) uint8, which of the given ones they are, and of each of the others what is wrong with it."""
    images = torch.empty(len(decode), 3, image_size, image_size, dtype=torch.uint8)
    rows: list[int] = []
    reasons: dict[int, str] = {}
    for row, image in enumerate(decode):
        try:
            images[len(rows)] = pil_to_tensor(crop(image()))
        except UnreadableImage as error:
            reasons[row] = str(error)
        else:
            rows.append(row)
    return images[: len(rows)], rows, reasons


def in_order(
    dataset: Dataset[ImageBatch], places: Any, num_workers: int, device: torch.device = CPU
) -> WatchedLoader:
    """Loads the batches at `places` for `device`, in their order."""
    options = loader_options(num_workers, device) | {"persistent_workers": False}
    return WatchedLoader(dataset, batch_size=None, sampler=places, collate_fn=as_it_is, **options)


def as_it_is(batch: Any) -> Any:
    """Instead of collating: the data sets hand out whole batches."""
    return batch
