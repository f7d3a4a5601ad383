"""Labelled images to train a classifier on: one augmented view of each image."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moco.data.augment.views import View, ViewPair
from moco.data.loading.loaders import EpochSampler, choose_engine, pair_loader
from moco.data.sources.source import Labelled


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
        self.engine = choose_engine("auto", images, image_size, device.type)
        # A pair of one view. It is built first, because its errors name the right key.
        view = View(operations, image_size, where)
        self.views = ViewPair(operations, operations, mean, std, image_size, seed, self.engine.name)
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
