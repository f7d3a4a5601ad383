"""Training from an iterable dataset: its images in its own order, and their loader.

The training process reads the dataset and hands the images to the loader processes, which augment
them. So no image is read twice, and the order is the same for any number of loader processes.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from moco.data.augment.views import ViewPair
from moco.data.files.images import EncodedImage, UnreadableImage, check_bad_fraction
from moco.data.loading.loaders import PairBatch, PairMaker, ResumableLoader, ResumableSampler
from moco.data.loading.workers import loader_options, unchanged
from moco.data.sources.own_dataset import IterableImages

log = logging.getLogger(__name__)


class PlacedImage(NamedTuple):
    """An image of an epoch."""

    epoch: int
    place: int
    """Its place in the epoch, on which its draws depend."""
    image: EncodedImage
    name: str


UINT8 = np.dtype(np.uint8)


@dataclass(frozen=True)
class DamagedImage:
    """Stands for an image that cannot be read."""

    reason: str
    size: tuple[int, int] = (1, 1)
    bands: int = 3
    dtype: np.dtype[Any] = UINT8
    no_data: float | None = None
    band_names: tuple[str, ...] | None = None

    def pixels(self) -> np.ndarray:
        """Raise UnreadableImage."""
        raise UnreadableImage(self.reason)


@dataclass(eq=False)
class IterableSampler(ResumableSampler):
    """The images of this process in the current epoch, as `PlacedImage`.

    Every process reads the whole dataset, and takes its share of each batch. Images that do not
    fill a last global batch are skipped. A resumed epoch reads what it skips, without using it.

    Raises:
        InputError: while iterating, the dataset fails or ends too early, an item is no image, or
            more than `max_bad_fraction` of an epoch's images are unreadable.
    """

    images: IterableImages
    batch_size: int
    """Images per optimizer step over all processes."""
    rank: int
    world_size: int
    max_bad_fraction: float
    unreadable: set[str]
    """Gets the names of unreadable images."""

    def __len__(self) -> int:
        return self.images.num_images // self.batch_size * self.batch_size // self.world_size

    def __iter__(self) -> Iterator[PlacedImage]:  # type: ignore[override]
        epoch = self.epoch
        share = self.batch_size // self.world_size
        num_left_out = self.start
        damaged: list[str] = []
        num_used = len(self) * self.world_size
        for place, item in enumerate(itertools.islice(self.images.items(epoch), num_used)):
            if place % self.batch_size // share != self.rank:
                continue
            if num_left_out > 0:
                num_left_out -= 1
                continue
            name = self.images.name(place)
            try:
                image: EncodedImage = self.images.prepared_item(place, item)
            except UnreadableImage as error:
                image = DamagedImage(str(error))
                damaged.append(name)
                if name not in self.unreadable:
                    self.unreadable.add(name)
                    log.warning("skipped an unreadable image: %s", error)
                check_bad_fraction(damaged, len(self), self.max_bad_fraction)
            yield PlacedImage(epoch, place, image, name)


@dataclass(frozen=True)
class PlacedPairs(Dataset[PairBatch]):
    """View pairs of images that the training process has read."""

    make_pairs: PairMaker

    def __getitems__(self, images: Sequence[PlacedImage]) -> PairBatch:
        rows = [(image.place, image.image, image.name) for image in images]
        return self.make_pairs(rows, images[0].epoch)


def iterable_loader(
    sampler: IterableSampler,
    augment: ViewPair,
    batch_size: int,
    num_workers: int,
    device: torch.device,
) -> ResumableLoader:
    """Return batches of view pairs.

    Args:
        sampler: reads the images.
        augment: makes the pairs.
        batch_size: images of a batch of this process.
        num_workers: loader processes, which augment.
        device: the device that uses the batches.
    """
    options: dict[str, Any] = loader_options(num_workers, device)
    dataset = PlacedPairs(PairMaker(augment))
    return ResumableLoader(dataset, sampler, batch_size, collate_fn=unchanged, **options)
