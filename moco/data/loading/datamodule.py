"""The loaders of a run, and which engine augments its images.

Letters: N batch.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor

from moco.data.augment.views import Transform, ViewPair, rgb_batch
from moco.data.files.bad_fraction import check_bad_fraction
from moco.data.files.decoding import EncodedImage
from moco.data.files.images import UnreadableImage
from moco.data.loading.loaders import (
    MemoryLoader,
    PairBatch,
    PairDataset,
    PairMaker,
    ResumableLoader,
    as_it_is,
    evaluation_loader,
)
from moco.data.loading.lost_workers import WatchedLoader
from moco.data.loading.memory_batches import MemoryBatches, memory_batches
from moco.data.loading.samplers import EpochSampler
from moco.data.loading.streams import (
    OpenStream,
    StreamDataset,
    StreamLoader,
    Streams,
    build_streams,
)
from moco.data.loading.waiting import remedies
from moco.data.loading.workers import device_of, loader_options
from moco.data.sources.shards import ShardedImages
from moco.data.sources.source import ArrayImages, DataSource, Images, Labelled
from moco.errors import InputError, printable

LARGEST_ON_GPU = 4 * 2**30  # bytes of images; more stay where they are
LARGEST_ON_CPU = 96  # px; larger images are augmented faster one by one, in several processes

log = logging.getLogger(__name__)


class PretrainingData(pl.LightningDataModule):
    """The loaders of a run.

    Args:
        source: the images.
        augment: makes the view pairs.
        evaluation_view: makes plain images for bank and queries, (3, image_size, image_size).
        batch_size: images per optimizer step over all devices and accumulated batches.
        batches_per_step: devices x accumulated batches; each gets batch_size / this many images at once.
        evaluation_batch_size: images per batch of the bank and query loaders.
        num_workers: loader processes; 0 loads in this process.
        engine: what `choose_engine` chose; left out, the engine of `augment`, with the images where they are.
        max_bad_fraction: share of unreadable images beyond which `on_before_batch_transfer` raises.

    Raises:
        InputError: the batch does not divide evenly, or there are fewer images than one batch.
    """

    def __init__(
        self,
        source: DataSource,
        augment: ViewPair,
        evaluation_view: Transform,
        *,
        image_size: int,
        batch_size: int,
        batches_per_step: int = 1,
        evaluation_batch_size: int = 256,
        num_workers: int = 0,
        max_bad_fraction: float = 0.01,
        seed: int = 0,
        engine: "Engine | None" = None,
    ) -> None:
        super().__init__()
        self.engine = engine or Engine(augment.engine, False, "")
        check_batch_size(batch_size, batches_per_step, len(source.train))
        self.source = source
        self.augment = augment
        self.evaluation_view = evaluation_view
        self.image_size = image_size
        self.batch_size = batch_size
        self.batches_per_step = batches_per_step
        self.evaluation_batch_size = evaluation_batch_size
        self.num_workers = num_workers
        self.max_bad_fraction = max_bad_fraction
        self.seed = seed
        self.unreadable: set[str] = set()
        self._streams: Streams | None = None

    def first_images(self, number: int) -> list[tuple[int, EncodedImage, str]]:
        """The first readable images of the first epoch: for each the index that its draws depend on, itself, its name.

        Of shards no more than one batch.

        Raises:
            InputError: too many before them are unreadable.
        """
        images = self.source.train
        if isinstance(images, ShardedImages):
            number = min(number, self.batch_size // self.batches_per_step)
            samples, _ = OpenStream(0, self.streams(images).samples(0, 0)).take(number)
            return [(row, sample.image, sample.name) for row, sample in enumerate(samples)]
        found: list[tuple[int, EncodedImage, str]] = []
        unreadable: list[str] = []
        for _, index in self.sampler():
            try:
                image = images.opened(index)
                image.pixels()
                found.append((index, image, images.name(index)))
            except UnreadableImage:
                unreadable.append(images.name(index))
                check_bad_fraction(unreadable, len(images), self.max_bad_fraction)
            if len(found) == number:
                break
        return found

    def pairs(self, images: Sequence[tuple[int, EncodedImage, str]]) -> tuple[Tensor, Tensor]:
        """Those images' views in the first epoch as the model will see them, (N, 3, S, S) each, by the run's engine."""
        indices = torch.tensor([index for index, _, _ in images], dtype=torch.int64)
        if self.engine.in_memory:
            pixels = rgb_batch(self.source.train.tensor[indices])  # type: ignore[attr-defined]
            return self.augment.on_batch(pixels, 0, indices)
        return self.augment.finished(PairMaker(self.augment)(images, 0).views, 0, indices)

    def sampler(self) -> EpochSampler:
        """This process's order of the training images."""
        return EpochSampler(len(self.source.train), self.batch_size, self.seed, *self.place)

    @property
    def place(self) -> tuple[int, int]:
        """This process's rank, and how many train together."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def remedies_for_waiting(self, share: float, num_cores: int, has_gpu: bool) -> list[str]:
        """See `remedies`; none where the device makes its data itself."""
        if self.engine.in_memory:
            return []
        return remedies(
            self.source.train,
            share,
            num_workers=self.num_workers,
            num_cores=num_cores,
            image_size=self.image_size,
            engine=self.engine.name,
            has_gpu=has_gpu,
            streams=self._streams,
        )

    def state_dict(self) -> dict[str, Any]:
        """Which images could not be read so far."""
        return {"unreadable": sorted(self.unreadable)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.unreadable.update(state_dict["unreadable"])

    def train_dataloader(self) -> ResumableLoader | MemoryLoader | StreamLoader:
        batch_size = self.batch_size // self.batches_per_step
        if isinstance(self.source.train, ShardedImages):
            return self._stream_loader(self.source.train, batch_size)
        if self.engine.in_memory:
            assert isinstance(self.source.train, ArrayImages)
            return MemoryLoader(
                self.source.train, self.augment, self.sampler(), batch_size, device_of(self)
            )
        dataset = PairDataset(self.source.train, self.augment, self.num_workers)
        options = loader_options(self.num_workers, device_of(self)) | {"collate_fn": as_it_is}
        return ResumableLoader(dataset, self.sampler(), batch_size, **options)

    def streams(self, shards: ShardedImages) -> Streams:
        """This process's streams over the shards."""
        if self._streams is None:
            self._streams = build_streams(shards, self.seed, *self.place)
        return self._streams

    def _stream_loader(self, shards: ShardedImages, batch_size: int) -> StreamLoader:
        streams = self.streams(shards)
        dataset = StreamDataset(streams, batch_size, PairMaker(self.augment), self.num_workers)
        batches = len(shards) // self.batch_size * (self.batches_per_step // streams.world_size)
        return StreamLoader(
            dataset,
            batches,
            num_images=len(shards),
            max_bad_fraction=self.max_bad_fraction,
            unreadable=self.unreadable,
            **loader_options(self.num_workers, device_of(self)),
        )

    def evaluation_dataloader(self, labelled: Labelled) -> WatchedLoader | MemoryBatches:
        """Plain images in order, for the bank or the queries; of several processes each gets every n-th image."""
        rank, world_size = self.place
        size = self.evaluation_batch_size
        in_memory = memory_batches(
            labelled, self.evaluation_view, size, rank, world_size, device_of(self)
        )
        if in_memory is not None:
            return in_memory
        return evaluation_loader(
            labelled,
            self.evaluation_view,
            self.image_size,
            size,
            self.num_workers,
            rank,
            world_size,
            device_of(self),
        )

    def on_before_batch_transfer(self, batch: PairBatch, dataloader_idx: int) -> PairBatch:
        """Count unreadable images.

        Raises:
            InputError: they are more than `max_bad_fraction` of the training set; it names the first ten.
        """
        images = self.source.train
        if self.engine.in_memory or isinstance(images, ShardedImages):
            return batch  # nothing to read, or its loader has counted already
        for index in batch.indices[batch.unreadable].tolist():
            if (name := images.name(index)) not in self.unreadable:
                self.unreadable.add(name)
                log.warning("skipped an unreadable image: %s", printable(name))
        check_bad_fraction(self.unreadable, len(images), self.max_bad_fraction)
        return batch

    def on_after_batch_transfer(self, batch: PairBatch, dataloader_idx: int) -> PairBatch:
        """Finish, on the device, what workers began."""
        if self.engine.in_memory:
            return batch
        return batch._replace(views=self.augment.finished(batch.views, batch.epoch, batch.indices))


class Engine(NamedTuple):
    """Who augments."""

    name: str
    """worker: the loader's processes, image by image; batch: the device, batch by batch."""
    in_memory: bool
    """The images are on the device, and there are no loader processes."""
    reason: str


def choose_engine(engine: str, images: Images, image_size: int, device_type: str) -> Engine:
    """The engine of a run, by rule and never by timing, so that a run that goes on chooses the same.

    Args:
        engine: worker, batch, or auto.
        image_size: side of the views, px.
        device_type: cpu, cuda, ...
    """
    is_cpu = device_type == "cpu"
    in_memory = isinstance(images, ArrayImages)
    if isinstance(images, ArrayImages):
        in_memory = images.tensor.numel() <= LARGEST_ON_GPU or is_cpu
    if engine == "worker":
        return Engine("worker", False, "as data.engine=worker says")
    if engine == "batch":
        return Engine("batch", in_memory, "as data.engine=batch says")
    if in_memory and not is_cpu:
        return Engine("batch", True, "the images are in memory and fit on the device")
    if isinstance(images, ArrayImages) and is_cpu:
        largest = max(image_size, *images.tensor.shape[1:3])
        if largest <= LARGEST_ON_CPU:
            return Engine(
                "batch", True, f"the images are in memory and at most {LARGEST_ON_CPU} px"
            )
        return Engine(
            "worker",
            False,
            f"on a CPU images above {LARGEST_ON_CPU} px are augmented faster one by one",
        )
    if is_cpu:
        return Engine("worker", False, "the images are files, and there is no GPU")
    return Engine(
        "batch", False, "there is a GPU; loader processes decode and crop, it does the rest"
    )


def check_batch_size(batch_size: int, batches_per_step: int, num_images: int) -> None:
    """Raises InputError if the batch does not divide evenly, or there are fewer images than one batch."""
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
    """`check_bad_fraction` of images by index."""
    check_bad_fraction([images.name(index) for index in unreadable], len(images), max_bad_fraction)
