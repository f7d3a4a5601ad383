"""From images to batches: view pairs in a reproducible order to train on, plain images to evaluate.

Letters: M images, N batch, H W pixels, S side of a view.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from moco.data.augment.views import Transform, ViewPair, picked, rgb_batch
from moco.data.files.decoding import EncodedImage
from moco.data.files.images import UnreadableImage
from moco.data.loading.lost_workers import LastRead, WatchedImage, WatchedLoader
from moco.data.loading.samplers import EpochSampler, images_handed_out
from moco.data.loading.workers import CPU, loader_options
from moco.data.sources.source import ArrayImages, Images, Labelled

MOST_STAND_INS = 100
AT_ONCE = 16  # files that a worker holds in memory, encoded
BLOCK = (
    2**25
)  # values of a view; as many batches as that are augmented at once on a GPU, whose small kernels cost their start


class PairBatch(NamedTuple):
    """A batch of view pairs."""

    views: tuple[Tensor, Tensor]
    """Query views and key views, (N, 3, S, S) each: uint8 from a worker, normalised float32 for the method."""
    indices: Tensor
    """(N,) which image of the training set each row was asked to be."""
    unreadable: Tensor
    """(N,) bool: that image could not be read, and the next readable one stands in for it."""
    epoch: int
    """Of the draws; no tensor, which a GPU would have to be asked for."""


class EvaluationBatch(NamedTuple):
    """A batch of plain images."""

    images: Tensor
    """(N, 3, H, W)."""
    labels: Tensor
    """(N,)."""
    unreadable: Tensor
    """(N,) bool: the row is black and stands for nothing."""


class PairDataset(Dataset[PairBatch]):
    """The worker's part of view pairs, asked for by a batch of (epoch, index).

    An image that cannot be read is replaced by the next one that can, or by a black one where a hundred in a row cannot.

    Args:
        num_workers: processes that will read from this object at the same time.
    """

    def __init__(self, images: Images, augment: ViewPair, num_workers: int = 0) -> None:
        self.images = images
        self.augment = augment
        self.last_read = LastRead(num_workers)

    def __getitems__(self, places: Sequence[tuple[int, int]]) -> PairBatch:
        epoch = places[0][0]
        indices = torch.tensor([index for _, index in places])
        views = self.augment.empty_views(len(places), epoch)
        failed = []
        for first in range(0, len(places), AT_ONCE):
            rows = slice(first, first + AT_ONCE)
            images = [self._watched(index) for _, index in places[rows]]
            unreadable_here = self.augment.on_images(images, epoch, indices[rows], views[:, rows])
            failed += [first + row for row in unreadable_here]
        for row in failed:
            self._stand_in(views[:, row : row + 1], epoch, indices[row])
        unreadable = torch.zeros(len(places), dtype=torch.bool)
        unreadable[failed] = True
        return PairBatch((views[0], views[-1]), indices, unreadable, epoch)

    def _stand_in(self, views: Tensor, epoch: int, index: Tensor) -> None:
        """Fill the two views, (2, 1, 3, S, S), of an image that cannot be read."""
        for attempt in range(1, MOST_STAND_INS):
            other = self._watched((int(index) + attempt) % len(self.images))
            if not self.augment.on_images([other], epoch, index[None], views):
                return
        views.zero_()

    def _watched(self, index: int) -> WatchedImage:
        name, note = self.images.name(index), self.last_read.note
        note(name)
        try:
            return WatchedImage(self.images.opened(index), name, note)
        except UnreadableImage:
            return WatchedImage(None, name, note)


@dataclass(frozen=True)
class PairMaker:
    """The worker's part of view pairs, of images that it is handed.

    An image that cannot be decoded is replaced by the next one of the batch that can, and by a black one if none can.
    """

    augment: ViewPair

    def __call__(self, images: Sequence[tuple[int, EncodedImage, str]], epoch: int) -> PairBatch:
        """The pairs of images given as index, on which the draws depend, image and name."""
        indices = torch.tensor([index for index, _, _ in images])
        views = self.augment.empty_views(len(images), epoch)
        failed = self.augment.on_images([image for _, image, _ in images], epoch, indices, views)
        readable = [row for row in range(len(images)) if row not in failed]
        for row in failed:
            other = next((one for one in readable if one > row), readable[0] if readable else None)
            own = slice(row, row + 1)
            views[:, own] = 0
            if other is not None:
                self.augment.on_images([images[other][1]], epoch, indices[own], views[:, own])
        unreadable = torch.zeros(len(images), dtype=torch.bool)
        unreadable[failed] = True
        return PairBatch((views[0], views[1]), indices, unreadable, epoch)


def as_it_is(batch: PairBatch) -> PairBatch:
    """Instead of collating: the data set hands out whole batches."""
    return batch


class EvaluationDataset(Dataset[EvaluationBatch]):
    """Labelled images without augmentation, by index.

    Args:
        num_workers: processes that will read from this object at the same time.
    """

    def __init__(
        self, labelled: Labelled, view: Transform, image_size: int, num_workers: int = 0
    ) -> None:
        self.last_read = LastRead(num_workers)
        self.labelled = labelled
        self.view = view
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.labelled.images)

    def __getitem__(self, index: int) -> EvaluationBatch:
        self.last_read.note(self.labelled.images.name(index))
        label = torch.tensor(int(self.labelled.labels[index]))
        try:
            return EvaluationBatch(
                self.view(self.labelled.images[index]), label, torch.tensor(False)
            )
        except UnreadableImage:
            return EvaluationBatch(
                torch.zeros(3, self.image_size, self.image_size), label, torch.tensor(True)
            )


class ResumableLoader(WatchedLoader):
    """A loader whose position Lightning keeps in the checkpoint, so that a resumed epoch goes on with its next batch."""

    sampler: EpochSampler
    batch_size: int

    def __init__(
        self, dataset: Dataset[Any], sampler: EpochSampler, batch_size: int, **kwargs: Any
    ) -> None:
        super().__init__(dataset, batch_size=batch_size, sampler=sampler, **kwargs)
        self.batches_done = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.batches_done = self.sampler.start // self.batch_size
        for batch in super().__iter__():
            self.batches_done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its images were handed out, by all processes together."""
        images = self.batches_done * self.batch_size * self.sampler.world_size
        return {"epoch": self.sampler.epoch, "images": images}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there when that epoch is iterated next, also with another number of processes."""
        self.sampler.resume_at = (
            state["epoch"],
            images_handed_out(state) // self.sampler.world_size,
        )


class MemoryLoader:
    """Images that are in memory all at once, augmented on the device in whole batches: no workers, nothing to copy.

    Args:
        images: moved to `device`.
        sampler: the order; it has the same role as in `ResumableLoader`, and so has the state.
        batch_size: images at once.
    """

    def __init__(
        self,
        images: ArrayImages,
        augment: ViewPair,
        sampler: EpochSampler,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.pixels = rgb_batch(images.tensor.to(device))
        self.augment = augment
        self.sampler = sampler
        self.batch_size = batch_size
        self.batches_done = 0

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size

    def __iter__(self) -> Iterator[PairBatch]:
        # The blocks are the same wherever an epoch goes on, since a product's last bits can depend on its size.
        block, done = self._block(), self.sampler.start
        self.batches_done = (done - done % block) // self.batch_size
        for indices in (
            self.sampler.share()[done - done % block :].to(self.pixels.device).split(block)
        ):
            pair = self.augment.on_batch(picked(self.pixels, indices), self.sampler.epoch, indices)
            parts = zip(
                *(values.split(self.batch_size) for values in (*pair, indices)), strict=True
            )
            for query, key, own in parts:
                self.batches_done += 1
                if self.batches_done * self.batch_size <= done:
                    continue
                unreadable = torch.zeros_like(own, dtype=torch.bool)
                yield PairBatch((query, key), own, unreadable, self.sampler.epoch)

    def _block(self) -> int:
        """Images to augment at once."""
        if self.pixels.device.type == "cpu":
            return self.batch_size
        return (
            max(1, BLOCK // (3 * self.augment.image_size**2) // self.batch_size) * self.batch_size
        )

    state_dict = ResumableLoader.state_dict
    load_state_dict = ResumableLoader.load_state_dict


def evaluation_loader(
    labelled: Labelled,
    view: Transform,
    image_size: int,
    batch_size: int,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device = CPU,
) -> WatchedLoader:
    """Labelled images in order for `device`, without augmentation: every `world_size`-th from `rank` on."""
    dataset = EvaluationDataset(labelled, view, image_size, num_workers)
    rows = range(rank, len(labelled.images), world_size)
    options = loader_options(num_workers, device) | {"persistent_workers": False}
    return WatchedLoader(dataset, batch_size=batch_size, sampler=rows, **options)
