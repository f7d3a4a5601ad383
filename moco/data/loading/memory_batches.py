"""Plain images that lie in memory, as batches: no loader processes, nothing done image by image.

Letters: M images, N batch, S side of an image.
"""

from collections.abc import Iterator

import numpy as np
import torch

from moco.data.augment.views import EvaluationView, Transform, rgb_batch
from moco.data.loading.loaders import EvaluationBatch
from moco.data.sources.source import ArrayImages, Labelled


class MemoryBatches:
    """What the evaluation view makes of images that have its size already, to the same bits as one by one.

    They travel to `device` as bytes and are normalised there.

    Args:
        images: of (S, S), S the view's `unchanged_size`.
        labels: (M,).
        batch_size: images at once.
        rank, world_size: every `world_size`-th image from `rank` on.
    """

    def __init__(
        self,
        images: ArrayImages,
        labels: np.ndarray,
        view: EvaluationView,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.pixels = images.tensor[rank::world_size]
        self.labels = torch.from_numpy(labels)[rank::world_size]
        self.scale, self.shift = view.normalized.scale.to(device), view.normalized.shift.to(device)
        self.batch_size = batch_size
        self.device = device

    def __len__(self) -> int:
        return -(-len(self.pixels) // self.batch_size)

    def __iter__(self) -> Iterator[EvaluationBatch]:
        for pixels, labels in zip(
            self.pixels.split(self.batch_size), self.labels.split(self.batch_size), strict=True
        ):
            images = rgb_batch(pixels.to(self.device)) * self.scale - self.shift  # (N, 3, S, S)
            yield EvaluationBatch(images, labels, torch.zeros(len(labels), dtype=torch.bool))


def memory_batches(
    labelled: Labelled,
    view: Transform,
    batch_size: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> MemoryBatches | None:
    """None where images have to be read, resized or cropped one by one."""
    images = labelled.images
    if not isinstance(images, ArrayImages) or not isinstance(view, EvaluationView):
        return None
    if images.tensor.shape[1:3] != (view.unchanged_size, view.unchanged_size):
        return None
    return MemoryBatches(images, labelled.labels, view, batch_size, rank, world_size, device)
