"""The loaders of a pretraining run."""

import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from moco.data.augment.views import Transform, ViewPair
from moco.data.files.images import UnreadableImage, check_bad_fraction
from moco.data.loading.every_image import MemoryBatches, evaluation_loader
from moco.data.loading.iterables import DamagedImage, IterableSampler, iterable_loader
from moco.data.loading.loaders import (
    EpochSampler,
    MemoryLoader,
    NamedImage,
    PairBatch,
    PairDataset,
    PairMaker,
    ResumableLoader,
    pair_loader,
)
from moco.data.loading.streams import OpenStream, StreamDataset, StreamLoader, build_streams
from moco.data.loading.workers import WatchedLoader, device_of, loader_options
from moco.data.sources.groups import UNKNOWN, KeyImages
from moco.data.sources.own_dataset import IterableImages
from moco.data.sources.shards import ShardedImages
from moco.data.sources.source import ArrayImages, DataSource, Images, Labelled
from moco.errors import InputError, printable

log = logging.getLogger(__name__)


@dataclass(eq=False, repr=False)
class PretrainingData(pl.LightningDataModule):
    """The loaders of a pretraining run.

    Raises:
        InputError: the batch does not divide evenly, or there are fewer images than one batch.
    """

    source: DataSource
    augment: ViewPair
    """Makes the view pairs."""
    evaluation_view: Transform
    """Makes the plain images of bank and queries, (3, image_size, image_size)."""
    _: KW_ONLY
    image_size: int
    """Side of the views and of the plain images, px."""
    batch_size: int
    """Images per optimizer step over all devices and accumulated batches."""
    batches_per_step: int = 1
    """Devices times accumulated batches. Each gets batch_size / batches_per_step images at once."""
    evaluation_batch_size: int = 256
    """Images per batch of the bank and query loaders."""
    num_workers: int = 0
    """Loader processes; 0 loads in this process."""
    max_bad_fraction: float = 0.01
    """Fraction of unreadable images above which training stops."""
    seed: int = 0
    in_memory: bool = False
    """See `Engine`."""
    pair: str = "same"
    """Where the key view comes from: ``same``, the query's own image; ``group`` or ``mixed``, see
    `KeyImages`."""

    def __post_init__(self) -> None:
        super().__init__()
        check_batch_size(self.batch_size, self.batches_per_step, len(self.source.train))
        self.unreadable: set[str] = set()
        self.key_images = None
        self.groups = None  # (images,) int64
        if self.source.groups is not None:
            self.groups = torch.from_numpy(self.source.groups)
            if self.pair != "same":
                self.key_images = KeyImages(self.source.groups, self.pair, self.seed)
        elif self.pair != "same":
            raise InputError(
                f"data.pair={self.pair}: needs data.group, which says what belongs together"
            )
        if self.key_images is not None:
            check_one_image(self.augment, self.pair)

    def first_images(self, number: int) -> list[NamedImage]:
        """Return the first readable images of the first epoch, each as (index, image, name).

        The draws of an image depend on its index. Of shards, this is at most one batch.

        Raises:
            InputError: too many images before them are unreadable.
        """
        images = self.source.train
        if isinstance(images, ShardedImages):
            streams = build_streams(images, self.seed, *self.place)
            num_samples = min(number, self.batch_size // self.batches_per_step)
            samples, _ = OpenStream(0, streams.samples(0, 0)).take(num_samples)
            return [(row, sample.image, sample.name) for row, sample in enumerate(samples)]
        if isinstance(images, IterableImages):
            # The run itself counts and names what is unreadable.
            rows = self.iterable_sampler(images, unreadable=set())
            readable = (row for row in rows if not isinstance(row.image, DamagedImage))
            first = itertools.islice(readable, number)
            return [(row.place, row.image, row.name) for row in first]
        found: list[NamedImage] = []
        unreadable: list[str] = []
        for _, index in self.sampler():
            name = images.name(index)
            try:
                # An image can have a good header and damaged pixels.
                image = images.prepared(index)
                image.pixels()
            except UnreadableImage as error:
                unreadable.append(name)
                number, most = len(images), self.max_bad_fraction
                check_bad_fraction(unreadable, number, most, str(error))
            else:
                found.append((index, image, name))
            if len(found) == number:
                break
        return found

    def pairs(self, images: Sequence[NamedImage]) -> tuple[Tensor, Tensor]:
        """Return the views of images in the first epoch, made by the engine of the run.

        Args:
            images: the result of `first_images`.

        Returns:
            Two views, (images, 3, side, side) float32 each, normalised.
        """
        indices = torch.tensor([index for index, _, _ in images], dtype=torch.int64)
        train = self.source.train
        if self.in_memory and isinstance(train, ArrayImages):
            pixels = train.batch(train.tensor[indices])
            key_pixels = None
            if self.key_images is not None:
                keys = self.key_images.of(0, indices)
                key_pixels = train.batch(train.tensor[keys])
            return self.augment.on_batch(pixels, 0, indices, key_pixels)
        if self.key_images is not None:
            dataset = PairDataset(train, self.augment, self.key_images)
            places = [(0, index) for index in indices.tolist()]  # of the first epoch
            batch = dataset.__getitems__(places)
        else:
            batch = PairMaker(self.augment)(images, 0)
        return self.augment.finished(batch.views, 0, indices)

    def local_crops(self, images: Sequence[NamedImage]) -> tuple[Tensor, ...]:
        """Return the local crops of images in the first epoch; none if the run has none.

        Args:
            images: the result of `first_images`.

        Returns:
            The first local crop of each image, the second one, and so on: (images, bands, side,
            side) float32 each, normalised.
        """
        if self.augment.local is None:
            return ()
        batch = PairMaker(self.augment)(images, 0)
        return self.augment.finished_local_crops(batch.local_crops, 0, batch.indices)

    def key_image_of(self, index: int) -> int:
        """Return the number of the image that a key view comes from in the first epoch."""
        if self.key_images is None:
            return index
        return int(self.key_images.of(0, torch.tensor([index])))

    def sampler(self) -> EpochSampler:
        """Return this process's order of the training images."""
        return EpochSampler(len(self.source.train), self.batch_size, self.seed, *self.place)

    def iterable_sampler(self, images: IterableImages, unreadable: set[str]) -> IterableSampler:
        """Return this process's images of an iterable dataset, in its order."""
        return IterableSampler(
            images, self.batch_size, *self.place, self.max_bad_fraction, unreadable
        )

    @property
    def place(self) -> tuple[int, int]:
        """The rank of this process, and how many processes train together."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def state_dict(self) -> dict[str, Any]:
        """Return which images could not be read so far."""
        return {"unreadable": sorted(self.unreadable)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what `state_dict` returned."""
        self.unreadable.update(state_dict["unreadable"])

    def train_dataloader(self) -> ResumableLoader | MemoryLoader | StreamLoader:
        """Return the loader of view pairs."""
        images = self.source.train
        batch_size = self.batch_size // self.batches_per_step
        device = device_of(self)
        if isinstance(images, ShardedImages):
            return self._stream_loader(images, batch_size)
        if isinstance(images, IterableImages):
            sampler = self.iterable_sampler(images, self.unreadable)
            return iterable_loader(sampler, self.augment, batch_size, self.num_workers, device)
        return pair_loader(
            images,
            self.augment,
            self.sampler(),
            batch_size,
            self.num_workers,
            device,
            in_memory=self.in_memory,
            key_images=self.key_images,
        )

    def _stream_loader(self, images: ShardedImages, batch_size: int) -> StreamLoader:
        streams = build_streams(images, self.seed, *self.place)
        # As with other images, the last batch that is not full is skipped.
        num_steps = len(images) // self.batch_size
        batches_of_process = self.batches_per_step // streams.world_size
        return StreamLoader(
            StreamDataset(streams, batch_size, PairMaker(self.augment)),
            num_steps * batches_of_process,
            max_bad_fraction=self.max_bad_fraction,
            unreadable=self.unreadable,
            **loader_options(self.num_workers, device_of(self)),
        )

    def evaluation_dataloader(self, labelled: Labelled) -> WatchedLoader | MemoryBatches:
        """Return plain images in order, for the bank or the queries.

        Of several processes, each gets every n-th image.
        """
        return evaluation_loader(
            labelled,
            self.evaluation_view,
            self.image_size,
            self.evaluation_batch_size,
            self.num_workers,
            *self.place,
            device_of(self),
        )

    def on_before_batch_transfer(self, batch: PairBatch, dataloader_idx: int) -> PairBatch:
        """Count unreadable images, and add the groups.

        Raises:
            InputError: more than `max_bad_fraction` of the training images are unreadable. The
                message names the first ten.
        """
        images = self.source.train
        if self.groups is not None:
            # Images in memory may be on a GPU.
            self.groups = self.groups.to(batch.indices.device)
            groups = self.groups[batch.indices].masked_fill(batch.unreadable, UNKNOWN)
            batch = batch._replace(groups=groups)
        if self.in_memory or isinstance(images, (ShardedImages, IterableImages)):
            # Images in memory are always readable, and the loaders of streams count by themselves.
            return batch
        reason = ""
        for index in batch.indices[batch.unreadable].tolist():
            name = images.name(index)
            if name not in self.unreadable:
                self.unreadable.add(name)
                reason = problem_of(images, index)
                log.warning("skipped an unreadable image: %s", reason)
        check_bad_fraction(self.unreadable, len(images), self.max_bad_fraction, reason)
        return batch

    def on_after_batch_transfer(self, batch: PairBatch, dataloader_idx: int) -> PairBatch:
        """Apply the device's part of the augmentation."""
        if self.in_memory:
            return batch
        views = self.augment.finished(batch.views, batch.epoch, batch.indices)
        batch = batch._replace(views=views)
        if self.augment.local is not None:
            crops = self.augment.finished_local_crops(batch.local_crops, batch.epoch, batch.indices)
            batch = batch._replace(local_crops=crops)
        return batch


def check_one_image(augment: ViewPair, pair: str) -> None:
    """Raise InputError if views of two images would need a common place."""
    if augment.with_placements:
        key = "method.dense_match=location"
    elif augment.local is not None:
        key = f"method.local_crops={augment.local.count}"
    else:
        return
    raise InputError(
        f"{key}: with data.pair={pair} the two views can be of two images, which have no place in "
        "common; expected data.pair=same"
    )


def problem_of(images: Images, index: int) -> str:
    """Return what is wrong with an image that a loader process could not read, with its name."""
    try:
        images.prepared(index).pixels()
    except UnreadableImage as error:
        return str(error)
    return printable(images.name(index))


def check_batch_size(batch_size: int, batches_per_step: int, num_images: int) -> None:
    """Check the batch size against the devices and the dataset.

    Raises:
        InputError: the batch does not divide evenly, or there are fewer images than one batch.
    """
    if batch_size % batches_per_step:
        raise InputError(
            f"data.batch_size={batch_size}: expected a multiple of {batches_per_step}, "
            "the devices times trainer.accumulate_grad_batches"
        )
    if batch_size > num_images:
        raise InputError(
            f"data.batch_size={batch_size}: there are only {num_images} images to train on"
        )


def check_unreadable(unreadable: Iterable[int], images: Images, max_bad_fraction: float) -> None:
    """Call `check_bad_fraction` for images by index."""
    names = list(map(images.name, unreadable))
    check_bad_fraction(names, len(images), max_bad_fraction)
