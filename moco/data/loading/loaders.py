"""Batches of view pairs to train on, in a reproducible order.

The samplers say which image comes when. `PairDataset` and `ResumableLoader` read images in loader
processes. `MemoryLoader` takes them from memory and augments them on the device. `choose_engine`
says which of the two suits a run.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from moco.data.augment.draws import derived_seed
from moco.data.augment.views import View, ViewPair, sizes_of
from moco.data.files.images import EncodedImage, UnreadableImage
from moco.data.loading.workers import WatchedLoader, loader_options, note_read, unchanged
from moco.data.sources.groups import KeyImages
from moco.data.sources.pixel_values import RGB_BANDS
from moco.data.sources.source import ArrayImages, Images, Labelled
from moco.errors import InputError

MOST_ATTEMPTS = 100  # images in a row that are tried in place of an unreadable one
# A loader process augments decoded images in groups: their numbers are drawn together, which is
# faster. A group ends at either limit, so that large images cannot fill the memory.
MOST_AT_ONCE = 16
MOST_BYTES_AT_ONCE = 2**25
# Values of a view. A GPU augments this many at once: its kernels are short, and starting one takes
# most of the time.
VALUES_ON_GPU = 2**25
LARGEST_ON_GPU = 4 * 2**30  # bytes; a larger dataset is not moved to the GPU
LARGEST_ON_CPU = 96  # px; larger images are augmented faster one by one, in several processes

NamedImage = tuple[int, EncodedImage, str]
"""The index of an image, on which its draws depend; the image; and its name."""


class PairBatch(NamedTuple):
    """A batch of view pairs."""

    views: tuple[Tensor, Tensor]
    """Query views and key views, (batch, bands, side, side) each.

    They are uint8, or float32 in 0..1 if images are not 8-bit RGB, when they come from a loader
    process, and normalised float32 for the method."""
    indices: Tensor
    """(batch,) number of each image in the dataset."""
    unreadable: Tensor
    """(batch,) bool: the image cannot be read, and another one stands in for it."""
    epoch: int
    """The epoch of the draws. A number, because reading a tensor would wait for the GPU."""
    groups: Tensor | None = None
    """(batch,) int64, the group of each image; -1: unknown. None: the dataset has no groups."""
    placements: Tensor | None = None
    """(2, batch, 2, 3) float32, where the views are in their images, see
    `moco.data.augment.placements`. None: nobody asked for them."""
    local_crops: tuple[Tensor, ...] = ()
    """The local crops, (batch, bands, side, side) each, in the type of the views."""


class ResumableSampler(Sampler[tuple[int, int]]):
    """Yield places of the current epoch as (epoch, number).

    The length is that of the whole epoch, also if the epoch starts in its middle.
    """

    rank: int
    """The number of this process."""
    world_size: int
    """How many processes there are."""
    epoch = 0
    resume_at = (-1, 0)
    """An epoch, and how many images of this process an earlier run trained on in it."""

    @property
    def start(self) -> int:
        """How many images of this process the current epoch skips."""
        epoch, position = self.resume_at
        if epoch != self.epoch:
            return 0  # a checkpoint speaks of its own epoch; the ones after it are complete
        return position

    def set_epoch(self, epoch: int) -> None:
        """Set the current epoch; Lightning calls this when an epoch starts."""
        self.epoch = epoch


@dataclass(eq=False)
class EpochSampler(ResumableSampler):
    """A random order of the images for each epoch, as (epoch, index).

    The order depends on (seed, epoch) alone. Every process takes its share of each batch. Images
    that do not fill a last global batch are skipped in this epoch, as in the official code
    (drop_last).
    """

    num_images: int
    batch_size: int
    """Images per optimizer step over all processes."""
    seed: int
    rank: int = 0
    world_size: int = 1

    def __len__(self) -> int:
        return self.num_images // self.batch_size * self.batch_size // self.world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for index in self.share()[self.start :].tolist():
            yield self.epoch, index

    def share(self) -> Tensor:
        """Return this process's images in the current epoch, also those before `start`."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
        order = torch.randperm(self.num_images, generator=generator)
        used = order[: len(self) * self.world_size]
        batches = used.view(-1, self.batch_size)  # (optimizer steps, images of all processes)
        # By columns, so that every process has a share of each batch.
        return batches.chunk(self.world_size, dim=1)[self.rank].flatten()


@dataclass(eq=False)
class StreamSampler(ResumableSampler):
    """The batches of an epoch as (epoch, batch)."""

    num_batches: int
    """Of this process in an epoch."""
    batch_size: int
    rank: int
    world_size: int

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for number in range(self.start // self.batch_size, self.num_batches):
            yield self.epoch, number


class DecodedPair(NamedTuple):
    """What the two views of a row are made of."""

    query: np.ndarray
    """(height, width, bands) of the pair's kind."""
    key: np.ndarray
    """The same array, or another image of the query's group."""
    is_readable: bool
    """Whether the query is the image itself, and not one that stands in for it."""


def make_pairs(
    augment: ViewPair, epoch: int, indices: Tensor, images: Iterable[DecodedPair]
) -> PairBatch:
    """Augment images in a loader process.

    Args:
        indices: (batch,) number of each image in the dataset, on which the draws depend.
        images: the decoded images of each row.
    """
    # All views of the batch lie in one piece of memory, which goes to the training process.
    views = augment.empty_views(len(indices), epoch)
    unreadable = torch.zeros(len(indices), dtype=torch.bool)
    queries: list[np.ndarray] = []
    keys: list[np.ndarray] = []
    num_bytes = 0  # of queries and keys; they are the same arrays if there are no groups
    first = 0
    sizes = []
    local_crops = None
    if augment.local is not None:
        local_crops = augment.empty_local_crops(len(indices), epoch)
    for row, pair in enumerate(images):
        unreadable[row] = not pair.is_readable
        queries.append(pair.query)
        keys.append(pair.key)
        num_bytes += pair.query.nbytes + pair.key.nbytes
        sizes.append(pair.query.shape[:2])
        is_last = row == len(indices) - 1
        if is_last or len(queries) == MOST_AT_ONCE or num_bytes // 2 >= MOST_BYTES_AT_ONCE:
            rows = slice(first, row + 1)
            augment.on_images(queries, epoch, indices[rows], views[:, rows], keys)
            if local_crops is not None:
                augment.local_crops_on_images(queries, epoch, indices[rows], local_crops[:, rows])
            queries, keys = [], []
            num_bytes = 0
            first = row + 1
    batch = PairBatch((views[0], views[-1]), indices, unreadable, epoch)
    if augment.with_placements:
        placements = augment.placements(epoch, indices, torch.tensor(sizes))
        batch = batch._replace(placements=placements)
    if local_crops is not None:
        batch = batch._replace(local_crops=tuple(local_crops))
    return batch


def first_decoded(
    candidates: Iterable[np.ndarray | None], black: np.ndarray
) -> tuple[np.ndarray, bool]:
    """Return the pixels of the first decoded image, and whether it is the first of all.

    If none could, return the black image.
    """
    for number, pixels in enumerate(candidates):
        if pixels is not None:
            return pixels, number == 0
    return black, False


def decoded(name: str, read: Callable[[], np.ndarray]) -> np.ndarray | None:
    """Return the pixels that `read` returns, or None if the image cannot be read."""
    note_read(name)
    try:
        return read()
    except UnreadableImage:
        return None


@dataclass(frozen=True)
class PairDataset(Dataset[PairBatch]):
    """View pairs of images by index, asked for by a batch of (epoch, index).

    The next readable image stands in for an unreadable one. After a hundred unreadable images in a
    row, a black one does.
    """

    images: Images
    augment: ViewPair
    key_images: KeyImages | None = None
    """Says which images the key views come from; None: from the queries' own."""

    def __getitems__(self, places: Sequence[tuple[int, int]]) -> PairBatch:
        epoch = places[0][0]
        indices = torch.tensor([index for _, index in places])
        keys = indices
        if self.key_images is not None:
            keys = self.key_images.of(epoch, indices)
        pairs = map(self._read, indices.tolist(), keys.tolist())
        return make_pairs(self.augment, epoch, indices, pairs)

    def _read(self, index: int, key: int) -> DecodedPair:
        candidates = map(self._decoded, range(index, index + MOST_ATTEMPTS))
        pixels, is_readable = first_decoded(candidates, self.augment.black_image())
        # An image that stands in for the query may be of another group.
        if self.key_images is None or key == index or not is_readable:
            return DecodedPair(pixels, pixels, is_readable)
        candidates_of_key = [key, *self.key_images.others_of_group(index, key)]
        for number in candidates_of_key[:MOST_ATTEMPTS]:
            key_pixels: np.ndarray | None = pixels
            if number != index:
                key_pixels = self._decoded(number)
            if key_pixels is not None:
                return DecodedPair(pixels, key_pixels, is_readable)
        return DecodedPair(pixels, pixels, is_readable)

    def _decoded(self, number: int) -> np.ndarray | None:
        index = number % len(self.images)  # after the last image comes the first one
        return decoded(self.images.name(index), lambda: self.images.prepared(index).pixels())


@dataclass(frozen=True)
class PairMaker:
    """Make view pairs of images that are given with their index and name.

    The next readable image of the batch stands in for an unreadable one, or a black one if the
    whole batch is unreadable.
    """

    augment: ViewPair

    def __call__(self, images: Sequence[NamedImage], epoch: int) -> PairBatch:
        indices = torch.tensor([index for index, _, _ in images])
        return make_pairs(self.augment, epoch, indices, self._read(images))

    def _read(self, images: Sequence[NamedImage]) -> Iterator[DecodedPair]:
        for row in range(len(images)):
            in_order = [*images[row:], *images[:row]]
            candidates = (decoded(name, image.pixels) for _, image, name in in_order)
            pixels, is_readable = first_decoded(candidates, self.augment.black_image())
            yield DecodedPair(pixels, pixels, is_readable)


class Resumable:
    """A loader whose position Lightning keeps in the checkpoint.

    A resumed epoch goes on with its next batch.
    """

    sampler: Any
    """A `ResumableSampler`."""
    num_at_once: int
    """Images of a batch."""
    batches_done = 0

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, and how many images all processes together trained on in it."""
        num_images = self.batches_done * self.num_at_once * self.sampler.world_size
        return {"epoch": self.sampler.epoch, "images": num_images}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a state in its epoch, also with another number of processes."""
        if "images" in state:
            num_images = state["images"]
        else:
            num_images = state["pictures"]  # a checkpoint of an earlier version
        self.sampler.resume_at = (state["epoch"], num_images // self.sampler.world_size)


class ResumableLoader(Resumable, WatchedLoader):
    """Batches from loader processes.

    Args:
        num_at_once: images of a batch.
        options: arguments of `WatchedLoader`.
    """

    def __init__(
        self, dataset: Dataset[Any], sampler: ResumableSampler, num_at_once: int, **options: Any
    ) -> None:
        options.setdefault("batch_size", num_at_once)
        super().__init__(dataset, sampler=sampler, **options)
        self.num_at_once = num_at_once

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.batches_done = self.sampler.start // self.num_at_once
        for batch in super().__iter__():
            self.batches_done += 1
            yield batch


class MemoryLoader(Resumable):
    """Batches of images in memory, augmented on the device, without loader processes.

    Args:
        images: they are moved to `device`.
        key_images: see `PairDataset`.
    """

    def __init__(
        self,
        images: ArrayImages,
        augment: ViewPair,
        sampler: EpochSampler,
        batch_size: int,
        device: torch.device,
        key_images: KeyImages | None = None,
    ) -> None:
        self.images = images
        self.pixels = images.tensor.to(device)  # (images, height, width, bands)
        self.key_images = key_images
        if key_images is not None:
            self.key_images = key_images.to(device)
        self.augment = augment
        self.sampler = sampler
        self.num_at_once = batch_size

    def __len__(self) -> int:
        return len(self.sampler) // self.num_at_once

    def __iter__(self) -> Iterator[PairBatch]:
        # Several batches are augmented as one block. A resumed epoch starts with the same blocks
        # and skips batches, because the last bits of a product can depend on its size.
        epoch = self.sampler.epoch
        num_done = self.sampler.start
        block_size = self._block_size()
        num_skipped = num_done - num_done % block_size
        self.batches_done = num_skipped // self.num_at_once
        order = self.sampler.share()[num_skipped:].to(self.pixels.device)
        for block in order.split(block_size):
            key_pixels = None
            if self.key_images is not None:
                key_pixels = self._planes(self.key_images.of(epoch, block))
            pixels = self._planes(block)
            views = self.augment.on_batch(pixels, epoch, block, key_pixels)
            placements = None
            if self.augment.with_placements:
                placements = self.augment.placements(epoch, block, sizes_of(pixels, block))
            local_crops: tuple[Tensor, ...] = ()
            if self.augment.local is not None:
                local_crops = self.augment.local_crops_on_batch(pixels, epoch, block)
            for first in range(0, len(block), self.num_at_once):
                self.batches_done += 1
                if self.batches_done * self.num_at_once <= num_done:
                    continue
                rows = slice(first, first + self.num_at_once)
                indices = block[rows]
                unreadable = torch.zeros_like(indices, dtype=torch.bool)
                batch = PairBatch((views[0][rows], views[1][rows]), indices, unreadable, epoch)
                if placements is not None:
                    batch = batch._replace(placements=placements[:, rows])
                yield batch._replace(local_crops=tuple(crops[rows] for crops in local_crops))

    def _planes(self, indices: Tensor) -> Tensor:
        """Return these images as the model gets them, (batch, bands, height, width)."""
        return self.images.batch(self.images.chosen(self.pixels, indices))

    def _block_size(self) -> int:
        """Return how many images are augmented at once, a multiple of the batch."""
        if self.pixels.device.type == "cpu":
            return self.num_at_once
        values_of_view = self.augment.kind.bands * self.augment.image_size**2
        most_images = max(1, VALUES_ON_GPU // values_of_view)
        return max(1, most_images // self.num_at_once) * self.num_at_once


def pair_loader(
    images: Images,
    augment: ViewPair,
    sampler: EpochSampler,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    *,
    in_memory: bool,
    key_images: KeyImages | None = None,
) -> MemoryLoader | ResumableLoader:
    """Return batches of view pairs, from memory (see `Engine`) or from loader processes."""
    if in_memory and isinstance(images, ArrayImages):
        return MemoryLoader(images, augment, sampler, batch_size, device, key_images)
    # The dataset hands out whole batches, which need no collating.
    dataset = PairDataset(images, augment, key_images)
    options = loader_options(num_workers, device)
    return ResumableLoader(dataset, sampler, batch_size, collate_fn=unchanged, **options)


class Engine(NamedTuple):
    """What augments the images of a run."""

    name: str
    """worker: loader processes, image by image; batch: the device, batch by batch."""
    in_memory: bool
    """The images are on the device, and there are no loader processes."""
    reason: str
    """For the log."""


def choose_engine(
    engine: str, images: Images, image_size: int, device_type: str, views: Sequence[View] = ()
) -> Engine:
    """Choose by rule and never by timing, so that a resumed run chooses the same.

    Args:
        engine: worker, batch, or auto.
        image_size: side of the views, px.
        device_type: cpu, cuda, ...
        views: of the run. Pipelines, and operations without `on_batch`, work on one image at a
            time, and loader processes can do that side by side.

    Raises:
        InputError: a view is a pipeline, which cannot work on batches.
    """
    for view in views:
        if engine == "batch" and view.pipeline is not None:
            raise InputError(
                f"data.engine=batch: {view.pipeline.where} takes one image at a time; "
                "data.engine=worker does that in loader processes"
            )
        step = view.single_image_step
        if engine == "auto" and step is not None:
            return Engine("worker", False, f"{step.where} takes one image at a time")
    is_cpu = device_type == "cpu"
    fits_on_device = isinstance(images, ArrayImages) and (
        is_cpu or images.tensor.nbytes <= LARGEST_ON_GPU
    )
    if engine != "auto":
        in_memory = engine == "batch" and fits_on_device
        return Engine(engine, in_memory, f"as data.engine={engine} says")
    if not is_cpu and fits_on_device:
        return Engine("batch", True, "the images are in memory and fit on the device")
    if not is_cpu:
        reason = "there is a GPU; loader processes decode and crop, it does the rest"
        return Engine("batch", False, reason)
    if not isinstance(images, ArrayImages):
        return Engine("worker", False, "the images are not in memory, and there is no GPU")
    if max(image_size, *images.tensor.shape[1:3]) <= LARGEST_ON_CPU:
        reason = f"the images are in memory and at most {LARGEST_ON_CPU} px"
        return Engine("batch", True, reason)
    reason = f"on a CPU images above {LARGEST_ON_CPU} px are augmented faster one by one"
    return Engine("worker", False, reason)


class LabelledViews:
    """Batches of views with labels. Order and draws of an epoch depend on (seed, epoch) alone.

    The last batch of an epoch can be smaller.

    Args:
        operations: settings of the view's operations by name.
        where: their key in the config, for error messages.
        mean, std: see `ViewPair`.
    """

    def __init__(
        self,
        labelled: Labelled,
        operations: Mapping[str, Any],
        where: str,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: int,
        batch_size: int,
        seed: int,
        num_workers: int,
        device: torch.device,
    ) -> None:
        images = labelled.images
        self.labels = torch.from_numpy(labelled.labels)
        self.device = device
        # A pair of one view. It is built first, because its errors name the right key.
        bands, is_float = RGB_BANDS, False  # of images that stay as they are in the files
        if images.values is not None:
            bands, is_float = images.values.bands, images.values.is_float
        view = View(operations, image_size, where, bands, is_float)
        self.engine = choose_engine("auto", images, image_size, device.type, [view])
        self.views = ViewPair(
            operations,
            operations,
            mean,
            std,
            image_size,
            seed,
            self.engine.name,
            bands=bands,
            is_float=is_float,
        )
        self.views.views_of_size = {image_size: [view]}
        # With a batch size of 1 the sampler leaves no image out.
        self.sampler = EpochSampler(len(images), batch_size=1, seed=seed)
        self.loader = pair_loader(
            images,
            self.views,
            self.sampler,
            batch_size,
            num_workers,
            device,
            in_memory=self.engine.in_memory,
        )

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the batches of an epoch.

        Yields:
            Views (batch, 3, side, side) float32, normalised, and labels (batch,), on the device;
            and indices (batch,) on the CPU. If an image cannot be read, its label is -1, and
            another image stands in for it.
        """
        self.sampler.set_epoch(number)
        for batch in self.loader:
            indices = batch.indices.cpu()
            labels = self.labels[indices].masked_fill(batch.unreadable.cpu(), -1)
            views = batch.views[0]
            if not self.engine.in_memory:
                views = views.to(self.device)
                views, _ = self.views.finished([views], number, batch.indices.to(self.device))
            yield views, labels.to(self.device), indices
