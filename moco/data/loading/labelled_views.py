"""Labelled images to train a classifier on: one augmented view of each image."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moco.data.augment.views import View, ViewPair
from moco.data.loading.loaders import (
    EpochSampler,
    MemoryLoader,
    PairDataset,
    ResumableLoader,
    choose_engine,
)
from moco.data.loading.workers import loader_options, unchanged
from moco.data.sources.source import ArrayImages, Labelled


class OneView(ViewPair):
    """One view of each image. Where a pair is expected, both are this view.

    Args:
        operations: settings of the view's operations by name.
        where: their key in the config, for error messages.
        settings: the other arguments of `ViewPair`.
    """

    def __init__(
        self, operations: Mapping[str, Any], where: str, image_size: int, **settings: Any
    ) -> None:
        view = View(operations, image_size, where)
        super().__init__(operations, operations, image_size=image_size, **settings)
        self.views_of_size = {image_size: [view]}


class LabelledViews:
    """Batches of views with labels. Order and draws of an epoch depend on (seed, epoch) alone.

    The last batch of an epoch can be smaller.

    Args:
        operations, where, mean, std: see `OneView`.
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
        self.view = OneView(
            operations,
            where,
            image_size,
            mean=mean,
            std=std,
            seed=seed,
            engine=self.engine.name,
        )
        # With a batch size of 1 the sampler leaves no image out.
        self.sampler = EpochSampler(len(images), batch_size=1, seed=seed)
        self.loader: MemoryLoader | ResumableLoader
        if self.engine.in_memory and isinstance(images, ArrayImages):
            self.loader = MemoryLoader(images, self.view, self.sampler, batch_size, device)
        else:
            dataset = PairDataset(images, self.view)
            options = loader_options(num_workers, device)
            self.loader = ResumableLoader(
                dataset, self.sampler, batch_size, collate_fn=unchanged, **options
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
                views, _ = self.view.finished([views], number, batch.indices.to(self.device))
            yield views, labels.to(self.device), indices
