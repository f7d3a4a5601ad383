"""What comes when in an epoch: a function of (seed, epoch), the same after a resume in the middle.

Letters: M images.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from moco.data.augment.draws import derived_seed


class ResumableSampler(Sampler[tuple[int, int]]):
    """Places of the current epoch, as (epoch, number). The length is the whole epoch's, also if it starts in the middle."""

    def __init__(self) -> None:
        self.epoch = 0
        self.resume_at = (
            -1,
            0,
        )  # an epoch, and this process's places of it that were trained on before

    @property
    def start(self) -> int:
        """How many of this process's places the current epoch leaves out, since an earlier run trained on them."""
        epoch, position = self.resume_at
        return position if epoch == self.epoch else 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this at the start of every epoch."""
        self.epoch = epoch


class EpochSampler(ResumableSampler):
    """Each epoch's own random order of the images, as (epoch, index); every process takes its share of each batch.

    The order depends on (seed, epoch) alone. Images left over after the last whole global batch sit out the epoch,
    as with drop_last in the official code.

    Args:
        num_images: images in the training set.
        batch_size: images per optimizer step over all processes.
        rank, world_size: this process and how many there are.
    """

    def __init__(
        self, num_images: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__()
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return self.num_images // self.batch_size * self.batch_size // self.world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, index) for index in self.share()[self.start :].tolist())

    def share(self) -> Tensor:
        """This process's images in the current epoch, (M,), those before `start` too."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
        order = torch.randperm(self.num_images, generator=generator)
        order = order[: len(self) * self.world_size].view(
            -1, self.batch_size
        )  # one row per optimizer step
        return order.chunk(self.world_size, dim=1)[self.rank].flatten()


class StreamSampler(ResumableSampler):
    """An epoch's batches as (epoch, batch)."""

    def __init__(self, num_batches: int) -> None:
        super().__init__()
        self.num_batches = num_batches

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, number) for number in range(self.start, self.num_batches))


def images_handed_out(state: dict[str, int]) -> int:
    """Return how far a loader was, also from a checkpoint of an earlier version, which said "pictures"."""
    return state["images"] if "images" in state else state["pictures"]
