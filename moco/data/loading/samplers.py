"""The order of an epoch: a function of (seed, epoch), the same after a resume in its middle."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from moco.data.augment.draws import derived_seed


class ResumableSampler(Sampler[tuple[int, int]]):
    """Yield places of the current epoch as (epoch, number).

    The length is that of the whole epoch, also if the epoch starts in its middle.

    Args:
        rank, world_size: the number of this process, and how many there are.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.resume_at = (-1, 0)
        """An epoch, and how many images of this process an earlier run trained on in it."""

    @property
    def start(self) -> int:
        """How many images of this process the current epoch skips."""
        epoch, position = self.resume_at
        return position if epoch == self.epoch else 0

    def set_epoch(self, epoch: int) -> None:
        """Set the current epoch; Lightning calls this when an epoch starts."""
        self.epoch = epoch

    def state_after(self, num_images: int) -> dict[str, int]:
        """Return the state for a checkpoint after `num_images` images of this process.

        The state counts the images of all processes.
        """
        return {"epoch": self.epoch, "images": num_images * self.world_size}

    def resume(self, state: dict[str, int]) -> None:
        """Go on from a state in its epoch, also with another number of processes."""
        # Checkpoints of earlier versions say "pictures".
        num_images = state["images"] if "images" in state else state["pictures"]
        self.resume_at = (state["epoch"], num_images // self.world_size)


class EpochSampler(ResumableSampler):
    """A random order of the images for each epoch, as (epoch, index).

    The order depends on (seed, epoch) alone. Every process takes its share of each batch. Images
    that do not fill a last global batch are skipped in this epoch, as in the official code
    (drop_last).

    Args:
        num_images: images in the training set.
        batch_size: images per optimizer step over all processes.
    """

    def __init__(
        self, num_images: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(rank, world_size)
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed

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
        return batches.chunk(self.world_size, dim=1)[self.rank].flatten()


class StreamSampler(ResumableSampler):
    """The batches of an epoch as (epoch, batch).

    Args:
        num_batches: batches of this process in an epoch.
        batch_size: images of each.
    """

    def __init__(self, num_batches: int, batch_size: int, rank: int, world_size: int) -> None:
        super().__init__(rank, world_size)
        self.num_batches = num_batches
        self.batch_size = batch_size

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for number in range(self.start // self.batch_size, self.num_batches):
            yield self.epoch, number
