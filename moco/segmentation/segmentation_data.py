"""From a `SegmentationSource` to batches: augmented crops in a reproducible order to train on, whole images to measure."""

import pytorch_lightning as pl

from moco.data.files.images import UnreadableImage
from moco.data.loading.datamodule import check_batch_size
from moco.data.loading.loaders import ResumableLoader
from moco.data.loading.lost_workers import WatchedLoader
from moco.data.loading.samplers import EpochSampler
from moco.data.loading.waiting import remedies
from moco.data.loading.workers import device_of, loader_options
from moco.errors import InputError, printable
from moco.segmentation.mask_augmentation import SegmentationView
from moco.segmentation.mask_batches import CropDataset, MaskBatch, WholeDataset, batches_of_one_size
from moco.segmentation.mask_sources import MaskedImages, SegmentationSource


class SegmentationData(pl.LightningDataModule):
    """The training loader, and one for the images that were held out.

    Args:
        view: makes the crops to train on.
        image_size: side of the crops, px.
        batch_size: images per optimizer step over all accumulated batches.
        batches_per_step: accumulated batches; each gets batch_size / this many images at once.
        evaluation_batch_size: whole images at once, if they are of one size.
        num_workers: loader processes; 0 loads in this process.

    Raises:
        InputError: the batch does not divide evenly, there are fewer images than one batch, or a single one at once.
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
        rank, world_size = (
            (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        )
        sampler = EpochSampler(len(train), self.batch_size, self.seed, rank, world_size)
        dataset = CropDataset(train, self.view, self.image_size, self.num_workers)
        return ResumableLoader(
            dataset,
            sampler,
            self.batch_size // self.batches_per_step,
            **loader_options(self.num_workers, device_of(self)),
        )

    def evaluation_dataloader(self) -> WatchedLoader:
        """The images that were held out, whole; a batch holds images of one size."""
        held_out = self.source.validation
        options = loader_options(self.num_workers, device_of(self)) | {"persistent_workers": False}
        batches = batches_of_one_size(held_out.sizes, self.evaluation_batch_size)
        dataset = WholeDataset(held_out, self.view.normalize, self.num_workers)
        return WatchedLoader(dataset, batch_sampler=batches, **options)

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


def check_readable(batch: MaskBatch, images: MaskedImages) -> None:
    """Raises InputError for an image that can no longer be read; it names the file.

    Here, since an error in a loader process would come with that process's traceback.
    """
    for index in batch.indices[batch.unreadable].tolist():
        reason = f"{printable(images.images.name(index))}: it, or its mask, could not be read at the first attempt"
        try:
            images[index]
        except UnreadableImage as error:
            reason = str(error)
        raise InputError(reason)
