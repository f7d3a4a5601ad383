"""From a `SegmentationSource` to batches: augmented crops in a reproducible order to train on, whole pictures to measure.

Letters: M pictures, N batch, H W pixels.
"""

from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moco.data.datamodule import check_batch_size
from moco.data.loading import ResumableLoader
from moco.data.pictures import UnreadablePicture
from moco.data.samplers import EpochSampler
from moco.data.segmentation import MaskedPictures, SegmentationSource
from moco.data.segmentation_views import SegmentationView
from moco.data.views import Transform
from moco.data.waiting import remedies
from moco.data.workers import loader_options
from moco.errors import InputError, printable


class MaskBatch(NamedTuple):
    """A batch of pictures with their classes."""

    images: Tensor
    """(N, 3, H, W)."""
    classes: Tensor
    """(N, H, W) int64."""
    indices: Tensor
    """(N,) which picture of its part each row is."""
    unreadable: Tensor
    """(N,) bool: that picture could not be read, and the row stands for nothing."""


class CropDataset(Dataset[MaskBatch]):
    """Augmented crops, asked for by (epoch, index)."""

    def __init__(self, pictures: MaskedPictures, view: SegmentationView, image_size: int) -> None:
        self.pictures = pictures
        self.view = view
        self.image_size = image_size

    def __getitem__(self, place: tuple[int, int]) -> MaskBatch:
        epoch, index = place
        try:
            picture, mask = self.pictures[index]
        except UnreadablePicture:
            return unreadable_row(index, (self.image_size, self.image_size))
        return MaskBatch(*self.view(picture, mask, epoch, index), torch.tensor(index), torch.tensor(False))


class WholeDataset(Dataset[MaskBatch]):
    """Pictures as they are, normalised, by index."""

    def __init__(self, pictures: MaskedPictures, normalize: Transform) -> None:
        self.pictures = pictures
        self.normalize = normalize

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> MaskBatch:
        try:
            picture, mask = self.pictures[index]
        except UnreadablePicture:
            height, width = self.pictures.sizes[index].tolist()
            return unreadable_row(index, (height, width))
        classes = torch.from_numpy(mask).long()
        return MaskBatch(self.normalize(picture), classes, torch.tensor(index), torch.tensor(False))


def unreadable_row(index: int, size: tuple[int, int]) -> MaskBatch:
    """What stands in for a picture that could be opened when the run began, and cannot be decoded now."""
    return MaskBatch(
        torch.zeros(3, *size), torch.zeros(size, dtype=torch.int64), torch.tensor(index), torch.tensor(True)
    )


class SegmentationData(pl.LightningDataModule):
    """The training loader, and one for the pictures that were held out.

    Args:
        view: makes the crops to train on.
        image_size: side of the crops, px.
        batch_size: images per optimizer step over all accumulated batches.
        batches_per_step: accumulated batches; each gets batch_size / this many images at once.
        evaluation_batch_size: whole pictures at once, if they are of one size.
        num_workers: loader processes; 0 loads in this process.

    Raises:
        InputError: the batch does not divide evenly, there are fewer pictures than one batch, or a single one at once.
    """

    def __init__(
        self,
        source: SegmentationSource,
        view: SegmentationView,
        *,
        image_size: int,
        batch_size: int,
        batches_per_step: int = 1,
        evaluation_batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_batch_size(batch_size, batches_per_step, len(source.train))
        if batch_size // batches_per_step < 2:
            raise InputError(
                f"data.batch_size={batch_size}: one image at a time; the decoders' BatchNorm needs at least two"
            )
        self.source = source
        self.view = view
        self.image_size = image_size
        self.batch_size = batch_size
        self.batches_per_step = batches_per_step
        self.evaluation_batch_size = evaluation_batch_size
        self.num_workers = num_workers
        self.seed = seed

    def train_dataloader(self) -> ResumableLoader:
        train = self.source.train
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = EpochSampler(len(train), self.batch_size, self.seed, rank, world_size)
        dataset = CropDataset(train, self.view, self.image_size)
        return ResumableLoader(
            dataset, sampler, self.batch_size // self.batches_per_step, **loader_options(self.num_workers)
        )

    def evaluation_dataloader(self) -> DataLoader[MaskBatch]:
        """The pictures that were held out, whole; a batch holds pictures of one size."""
        held_out = self.source.validation
        options = loader_options(self.num_workers) | {"persistent_workers": False}
        batches = batches_of_one_size(held_out.sizes, self.evaluation_batch_size)
        return DataLoader(
            WholeDataset(held_out, self.view.normalize), batch_sampler=batches, generator=torch.Generator(), **options
        )

    def remedies_for_waiting(self, share: float, num_cores: int, has_gpu: bool) -> list[str]:
        """See `remedies`."""
        return remedies(
            self.source.train,
            share,
            num_workers=self.num_workers,
            num_cores=num_cores,
            image_size=self.image_size,
            has_gpu=has_gpu,
        )

    def on_before_batch_transfer(self, batch: MaskBatch, dataloader_idx: int) -> MaskBatch:
        check_readable(batch, self.source.train)
        return batch


def check_readable(batch: MaskBatch, pictures: MaskedPictures) -> None:
    """Raises InputError for a picture that can no longer be read; it names the file.

    Here, since an error in a loader process would come with that process's traceback.
    """
    for index in batch.indices[batch.unreadable].tolist():
        reason = f"{printable(pictures.images.name(index))}: it, or its mask, could not be read at the first attempt"
        try:
            pictures[index]
        except UnreadablePicture as error:
            reason = str(error)
        raise InputError(reason)


def batches_of_one_size(sizes: np.ndarray, batch_size: int) -> list[list[int]]:
    """Numbers of pictures (M, 2 sizes) in batches of at most `batch_size`, each of pictures of the same size."""
    rows: dict[Any, list[int]] = defaultdict(list)
    for row, size in enumerate(map(tuple, sizes.tolist())):
        rows[size].append(row)
    return [alike[start : start + batch_size] for alike in rows.values() for start in range(0, len(alike), batch_size)]
