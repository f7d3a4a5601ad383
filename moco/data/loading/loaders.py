"""Batches of view pairs to train on, in a reproducible order.

`PairDataset` and `ResumableLoader` read images in loader processes. `MemoryLoader` takes them from
memory and augments them on the device.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from moco.data.augment.views import ViewPair, picked, rgb_batch
from moco.data.files.decoding import EncodedImage
from moco.data.files.images import UnreadableImage
from moco.data.loading.lost_workers import WatchedLoader, note_read
from moco.data.loading.samplers import EpochSampler, ResumableSampler
from moco.data.sources.source import ArrayImages, Images

MOST_ATTEMPTS = 100  # images in a row that are tried in place of an unreadable one
# A loader process augments decoded images in groups: their numbers are drawn together, which is
# faster. A group ends at either limit, so that large images cannot fill the memory.
MOST_AT_ONCE = 16
MOST_BYTES_AT_ONCE = 2**25
# Values of a view. A GPU augments this many at once: its kernels are short, and starting one takes
# most of the time.
VALUES_ON_GPU = 2**25
BLACK = np.zeros((1, 1, 3), dtype=np.uint8)


class PairBatch(NamedTuple):
    """A batch of view pairs."""

    views: tuple[Tensor, Tensor]
    """Query views and key views, (batch, 3, side, side) each.

    They are uint8 when they come from a loader process, and normalised float32 for the method."""
    indices: Tensor
    """(batch,) number of each image in the dataset."""
    unreadable: Tensor
    """(batch,) bool: the image cannot be read, and another one stands in for it."""
    epoch: int
    """The epoch of the draws. A number, because reading a tensor would wait for the GPU."""


def make_pairs(
    augment: ViewPair,
    epoch: int,
    indices: Tensor,
    images: Iterable[tuple[np.ndarray, bool]],
) -> PairBatch:
    """Augment images in a loader process.

    Args:
        indices: (batch,) number of each image in the dataset, on which the draws depend.
        images: pixels (height, width, 3) uint8, and whether this is the image itself or one that
            stands in for it.
    """
    # All views of the batch lie in one piece of memory, which goes to the training process.
    views = augment.empty_views(len(indices), epoch)
    unreadable = torch.zeros(len(indices), dtype=torch.bool)
    group: list[np.ndarray] = []
    first = 0
    for row, (pixels, is_readable) in enumerate(images):
        unreadable[row] = not is_readable
        group.append(pixels)
        num_bytes = sum(image.nbytes for image in group)
        is_last = row == len(indices) - 1
        if is_last or len(group) == MOST_AT_ONCE or num_bytes >= MOST_BYTES_AT_ONCE:
            rows = slice(first, row + 1)
            augment.on_images(group, epoch, indices[rows], views[:, rows])
            group = []
            first = row + 1
    return PairBatch((views[0], views[-1]), indices, unreadable, epoch)


def first_decoded(candidates: Iterable[np.ndarray | None]) -> tuple[np.ndarray, bool]:
    """Return the pixels of the first decoded image, and whether it is the first of all.

    If none could, return a black image.
    """
    for number, pixels in enumerate(candidates):
        if pixels is not None:
            return pixels, number == 0
    return BLACK, False


def decoded(image: EncodedImage, name: str) -> np.ndarray | None:
    """Return the pixels of an image, or None if it cannot be decoded."""
    note_read(name)
    try:
        return image.pixels()
    except UnreadableImage:
        return None


class PairDataset(Dataset[PairBatch]):
    """View pairs of images by index, asked for by a batch of (epoch, index).

    The next readable image stands in for an unreadable one. After a hundred unreadable images in a
    row, a black one does.
    """

    def __init__(self, images: Images, augment: ViewPair) -> None:
        self.images = images
        self.augment = augment

    def __getitems__(self, places: Sequence[tuple[int, int]]) -> PairBatch:
        epoch = places[0][0]
        indices = [index for _, index in places]
        return make_pairs(self.augment, epoch, torch.tensor(indices), map(self._pixels, indices))

    def _pixels(self, index: int) -> tuple[np.ndarray, bool]:
        candidates = range(index, index + MOST_ATTEMPTS)
        return first_decoded(map(self._decoded, candidates))

    def _decoded(self, number: int) -> np.ndarray | None:
        index = number % len(self.images)  # after the last image comes the first one
        name = self.images.name(index)
        # Opening an image reads its header, which can fail as well.
        note_read(name)
        try:
            image = self.images.opened(index)
        except UnreadableImage:
            return None
        return decoded(image, name)


@dataclass(frozen=True)
class PairMaker:
    """Make view pairs of images that are given with their index and name.

    The next readable image of the batch stands in for an unreadable one, or a black one if the
    whole batch is unreadable.
    """

    augment: ViewPair

    def __call__(self, images: Sequence[tuple[int, EncodedImage, str]], epoch: int) -> PairBatch:
        indices = torch.tensor([index for index, _, _ in images])
        return make_pairs(self.augment, epoch, indices, self._read(images))

    def _read(
        self, images: Sequence[tuple[int, EncodedImage, str]]
    ) -> Iterator[tuple[np.ndarray, bool]]:
        for row in range(len(images)):
            candidates = [*images[row:], *images[:row]]
            yield first_decoded(decoded(image, name) for _, image, name in candidates)


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
        """See `ResumableSampler.state_after`."""
        return self.sampler.state_after(self.batches_done * self.num_at_once)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """See `ResumableSampler.resume`."""
        self.sampler.resume(state)


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
    """

    def __init__(
        self,
        images: ArrayImages,
        augment: ViewPair,
        sampler: EpochSampler,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.pixels = rgb_batch(images.tensor.to(device))  # (images, 3, height, width)
        self.augment = augment
        self.sampler: EpochSampler = sampler
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
            views = self.augment.on_batch(picked(self.pixels, block), epoch, block)
            for first in range(0, len(block), self.num_at_once):
                self.batches_done += 1
                if self.batches_done * self.num_at_once <= num_done:
                    continue
                rows = slice(first, first + self.num_at_once)
                indices = block[rows]
                unreadable = torch.zeros_like(indices, dtype=torch.bool)
                yield PairBatch((views[0][rows], views[1][rows]), indices, unreadable, epoch)

    def _block_size(self) -> int:
        """Return how many images are augmented at once, a multiple of the batch."""
        if self.pixels.device.type == "cpu":
            return self.num_at_once
        most_images = max(1, VALUES_ON_GPU // (3 * self.augment.image_size**2))
        return max(1, most_images // self.num_at_once) * self.num_at_once
