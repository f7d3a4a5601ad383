"""The data of a segmentation run as a Lightning data module."""

import math

import pytorch_lightning as pl

from moco.data.loading.datamodule import check_batch_size
from moco.data.loading.every_image import ImageReader
from moco.data.loading.loaders import EpochSampler, ResumableLoader
from moco.data.loading.workers import WatchedLoader, device_of, loader_options, unchanged
from moco.errors import InputError
from moco.segmentation.mask_augmentation import SegmentationView
from moco.segmentation.mask_batches import Crops, MaskBatch, mask_batch, whole_image_loader
from moco.segmentation.mask_sources import SegmentationSource


class SegmentationData(pl.LightningDataModule):
    """Augmented crops in a reproducible order to train on, and whole images to measure on.

    An epoch takes a crop of every image, except of those that do not fill a last batch. Where a
    draw (`LabelDraw`) leaves fewer images than a batch holds, an epoch is one batch with several
    crops of each image. So a run on few labels has the batch size of the run that it is compared
    with. Other datasets need as many images as a batch holds.

    Args:
        source: the images with masks.
        view: makes the training crops.
        batch_size: images per optimizer step, over all accumulated batches.
        batches_per_step: accumulated batches. Each gets batch_size / batches_per_step images.
        evaluation_batch_size: whole images at once, if they have one size.
        num_workers: loader processes; 0 loads in this process.
        seed: of the order of the images.

    Raises:
        InputError: the batch does not divide evenly, there are fewer images than one batch, or a
            batch holds a single image.
    """

    def __init__(
        self,
        source: SegmentationSource,
        view: SegmentationView,
        *,
        batch_size: int,
        batches_per_step: int = 1,
        evaluation_batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.crops_per_image = 1
        """Crops of each image among which an epoch chooses."""
        if source.draw is not None:
            self.crops_per_image = math.ceil(batch_size / len(source.train))
        num_crops = len(source.train) * self.crops_per_image
        check_batch_size(batch_size, batches_per_step, num_crops)
        if batch_size // batches_per_step < 2:
            raise InputError(
                f"data.batch_size={batch_size}: a batch would hold one image; "
                "the decoders' BatchNorm needs at least two"
            )
        self.source = source
        self.view = view
        self.num_crops = num_crops
        self.steps_per_epoch = num_crops // batch_size
        """Optimizer steps."""
        self.batch_size = batch_size
        self.batches_per_step = batches_per_step
        self.evaluation_batch_size = evaluation_batch_size
        self.num_workers = num_workers
        self.seed = seed

    def train_dataloader(self) -> ResumableLoader:
        train = self.source.train
        return ResumableLoader(
            ImageReader(Crops(train, self.view), unchanged),
            EpochSampler(self.num_crops, self.batch_size, self.seed),
            self.batch_size // self.batches_per_step,
            collate_fn=mask_batch,
            **loader_options(self.num_workers, device_of(self)),
        )

    def evaluation_dataloader(self) -> WatchedLoader:
        """Return a loader of the held-out images at their own size."""
        return whole_image_loader(
            self.source.validation,
            self.view.normalize,
            self.evaluation_batch_size,
            self.num_workers,
            device_of(self),
        )

    def on_before_batch_transfer(self, batch: MaskBatch, dataloader_idx: int) -> MaskBatch:
        check_readable(batch)
        return batch


def check_readable(batch: MaskBatch) -> None:
    """Check that every image of a batch could be read.

    The check runs in the training process, because an error in a loader process would come with
    the traceback of that process.

    Raises:
        InputError: an image could not be read. The message names the file.
    """
    if batch.unreadable:
        raise InputError(batch.unreadable[0].problem)
