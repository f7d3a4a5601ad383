"""From a `DataSource` to batches: view pairs in a reproducible order to train on, plain pictures to evaluate.

Letters: N batch, H W pixels.
"""

import atexit
import logging
import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from moco.data.augmentations import Transform, ViewPair
from moco.data.datasets import DataSource, Labelled, Pictures
from moco.data.pictures import UnreadablePicture
from moco.data.randomness import derived_seed
from moco.errors import InputError, printable

log = logging.getLogger(__name__)


class PairBatch(NamedTuple):
    """A batch of view pairs."""

    views: tuple[Tensor, Tensor]
    """Query views and key views, (N, 3, H, W) each."""
    indices: Tensor
    """(N,) which picture of the training set each row was asked to be."""
    unreadable: Tensor
    """(N,) bool: that picture could not be read, and the next readable one stands in for it."""


class EvaluationBatch(NamedTuple):
    """A batch of plain pictures."""

    images: Tensor
    """(N, 3, H, W)."""
    labels: Tensor
    """(N,)."""
    unreadable: Tensor
    """(N,) bool: the row is black and stands for nothing."""


class PairDataset(Dataset[PairBatch]):
    """View pairs of pictures, asked for by (epoch, index)."""

    def __init__(self, pictures: Pictures, augment: ViewPair) -> None:
        self.pictures = pictures
        self.augment = augment

    def __getitem__(self, place: tuple[int, int]) -> PairBatch:
        epoch, index = place
        picture, unreadable = self._read(index)
        return PairBatch(self.augment(picture, epoch, index), torch.tensor(index), torch.tensor(unreadable))

    def _read(self, index: int) -> tuple[Image.Image, bool]:
        """The picture, or the next readable one and True; a black one where a hundred in a row are unreadable."""
        for attempt in range(100):
            try:
                return self.pictures[(index + attempt) % len(self.pictures)], attempt > 0
            except UnreadablePicture:
                continue
        return Image.new("RGB", (32, 32)), True


class EvaluationDataset(Dataset[EvaluationBatch]):
    """Labelled pictures without augmentation, by index."""

    def __init__(self, labelled: Labelled, view: Transform, image_size: int) -> None:
        self.labelled = labelled
        self.view = view
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.labelled.pictures)

    def __getitem__(self, index: int) -> EvaluationBatch:
        label = torch.tensor(int(self.labelled.labels[index]))
        try:
            return EvaluationBatch(self.view(self.labelled.pictures[index]), label, torch.tensor(False))
        except UnreadablePicture:
            return EvaluationBatch(torch.zeros(3, self.image_size, self.image_size), label, torch.tensor(True))


class EpochSampler(Sampler[tuple[int, int]]):
    """Each epoch's own random order of the pictures, as (epoch, index); every process takes its share of each batch.

    The order depends on (seed, epoch) alone. Pictures left over after the last whole global batch sit out the epoch,
    as with drop_last in the official code. The length is the whole epoch's, also when a resumed one starts in the middle.

    Args:
        num_pictures: pictures in the training set.
        batch_size: images per optimizer step over all processes.
        rank, world_size: this process and how many there are.
    """

    def __init__(self, num_pictures: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.num_pictures = num_pictures
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.resume_at = (-1, 0)  # an epoch, and this process's pictures of it that were trained on before

    @property
    def start(self) -> int:
        """How many of this process's pictures the current epoch leaves out, since an earlier run trained on them."""
        epoch, position = self.resume_at
        return position if epoch == self.epoch else 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this at the start of every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_pictures // self.batch_size * self.batch_size // self.world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
        order = torch.randperm(self.num_pictures, generator=generator)
        order = order[: len(self) * self.world_size].view(-1, self.batch_size)  # one row per optimizer step
        share = order.chunk(self.world_size, dim=1)[self.rank].flatten()
        return ((self.epoch, index) for index in share[self.start :].tolist())


class ResumableLoader(DataLoader[Any]):
    """A loader whose position Lightning keeps in the checkpoint, so that a resumed epoch goes on with its next batch."""

    sampler: EpochSampler
    batch_size: int

    def __init__(self, dataset: Dataset[Any], sampler: EpochSampler, batch_size: int, **kwargs: Any) -> None:
        # An own generator: DataLoader would draw its workers' seeds from the global one, which a resume has to restore.
        super().__init__(dataset, batch_size, sampler=sampler, generator=torch.Generator(), **kwargs)
        self.batches_done = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.batches_done = self.sampler.start // self.batch_size
        for batch in super().__iter__():
            self.batches_done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its pictures were handed out, by all processes together."""
        pictures = self.batches_done * self.batch_size * self.sampler.world_size
        return {"epoch": self.sampler.epoch, "pictures": pictures}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there when that epoch is iterated next, also with another number of processes."""
        self.sampler.resume_at = (state["epoch"], state["pictures"] // self.sampler.world_size)


class PretrainingData(pl.LightningDataModule):
    """The loaders of a run.

    Args:
        source: the pictures.
        augment: makes the view pairs.
        evaluation_view: makes plain pictures for bank and queries, (3, image_size, image_size).
        batch_size: images per optimizer step over all devices and accumulated batches.
        batches_per_step: devices x accumulated batches; each gets batch_size / this many images at once.
        evaluation_batch_size: images per batch of the bank and query loaders.
        num_workers: loader processes; 0 loads in this process.
        max_bad_fraction: share of unreadable pictures beyond which `on_before_batch_transfer` raises.

    Raises:
        InputError: the batch does not divide evenly, or there are fewer pictures than one batch.
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
    ) -> None:
        super().__init__()
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
        self.unreadable: set[int] = set()

    def dataset(self) -> PairDataset:
        """The training pictures as view pairs."""
        return PairDataset(self.source.train, self.augment)

    def sampler(self) -> EpochSampler:
        """This process's order of the training pictures."""
        return EpochSampler(len(self.source.train), self.batch_size, self.seed, *self.place)

    @property
    def place(self) -> tuple[int, int]:
        """This process's rank, and how many train together."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def state_dict(self) -> dict[str, Any]:
        """Which pictures could not be read so far."""
        return {"unreadable": sorted(self.unreadable)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.unreadable = set(state_dict["unreadable"])

    def train_dataloader(self) -> ResumableLoader:
        batch_size = self.batch_size // self.batches_per_step
        return ResumableLoader(self.dataset(), self.sampler(), batch_size, **loader_options(self.num_workers))

    def evaluation_dataloader(self, labelled: Labelled) -> DataLoader[EvaluationBatch]:
        """Plain pictures in order, for the bank or the queries; of several processes each gets every n-th picture."""
        rank, world_size = self.place
        return evaluation_loader(
            labelled,
            self.evaluation_view,
            self.image_size,
            self.evaluation_batch_size,
            self.num_workers,
            rank,
            world_size,
        )

    def on_before_batch_transfer(self, batch: PairBatch, dataloader_idx: int) -> PairBatch:
        """Count unreadable pictures.

        Raises:
            InputError: they are more than `max_bad_fraction` of the training set; it names the first ten.
        """
        for index in batch.indices[batch.unreadable].tolist():
            if index not in self.unreadable:
                self.unreadable.add(index)
                log.warning("skipped an unreadable picture: %s", printable(self.source.train.name(index)))
        check_unreadable(self.unreadable, self.source.train, self.max_bad_fraction)
        return batch


def check_batch_size(batch_size: int, batches_per_step: int, num_pictures: int) -> None:
    """Raises InputError if the batch does not divide evenly, or there are fewer pictures than one batch."""
    if batch_size % batches_per_step:
        raise InputError(
            f"data.batch_size={batch_size}: expected a multiple of {batches_per_step}, "
            "the devices times trainer.accumulate_grad_batches"
        )
    if batch_size > num_pictures:
        raise InputError(f"data.batch_size={batch_size}: there are only {num_pictures} pictures to train on")


def check_unreadable(unreadable: set[int], pictures: Pictures, max_bad_fraction: float) -> None:
    """Raises InputError if the unreadable pictures (by index) are more than `max_bad_fraction` of all, or all."""
    if len(unreadable) > max_bad_fraction * len(pictures) or len(unreadable) == len(pictures):
        names = ", ".join(printable(pictures.name(index)) for index in sorted(unreadable)[:10])
        raise InputError(
            f"{len(unreadable)} of {len(pictures)} pictures cannot be read, more than "
            f"data.max_bad_fraction={max_bad_fraction}; the first are {names}"
        )


def evaluation_loader(
    labelled: Labelled,
    view: Transform,
    image_size: int,
    batch_size: int,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader[EvaluationBatch]:
    """Labelled pictures in order, without augmentation: every `world_size`-th from `rank` on."""
    dataset: Dataset[EvaluationBatch] = EvaluationDataset(labelled, view, image_size)
    if world_size > 1:
        dataset = Subset(dataset, range(rank, len(labelled.pictures), world_size))
    options = loader_options(num_workers) | {"persistent_workers": False}
    return DataLoader(dataset, batch_size, generator=torch.Generator(), **options)


def loader_options(num_workers: int) -> dict[str, Any]:
    """DataLoader's arguments for so many worker processes."""
    options: dict[str, Any] = {"num_workers": num_workers, "pin_memory": torch.cuda.is_available()}
    if num_workers == 0:
        return options | {"persistent_workers": False}
    # A fork of a process with threads (torch's, faiss's) can deadlock; the fork server has none.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["moco.data.datamodule"])
    # Ctrl-C and SIGTERM reach the whole process group, a scheduler's signals every process of the job; the training process
    # alone decides what happens then. The server and its workers inherit the mask; they leave when that process closes its
    # end or is gone.
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        multiprocessing.resource_tracker.ensure_running()  # it lifts the mask of the first two
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return options | {
        "multiprocessing_context": "forkserver", "persistent_workers": True, "worker_init_fn": leave_with_parent
    }  # fmt: skip


def end_workers() -> None:
    """Kill loader processes that are still there: they take no SIGTERM, and multiprocessing would wait for them for ever."""
    for child in multiprocessing.active_children():
        if isinstance(child, multiprocessing.context.ForkServerProcess):
            child.kill()


atexit.register(end_workers)


def leave_with_parent(worker: int) -> None:
    """Have this worker end when the training process is gone, whatever ended that.

    PyTorch's own watch asks for the fork server instead, which in turn waits for its workers.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
