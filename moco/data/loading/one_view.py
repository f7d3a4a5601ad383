"""Labelled images to train a classifier on: one augmented view of each, by the engines of pretraining.

Letters: N batch, S side of a view.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moco.data.augment.view_steps import View
from moco.data.augment.views import ViewPair
from moco.data.loading.datamodule import choose_engine
from moco.data.loading.loaders import MemoryLoader, PairDataset, ResumableLoader, as_it_is
from moco.data.loading.samplers import EpochSampler
from moco.data.loading.workers import loader_options
from moco.data.sources.source import ArrayImages, Labelled


class OneView(ViewPair):
    """One view of each image; what gives a pair gives the same view twice.

    Args:
        operations: of the view.
        where: their key in the config, for error messages.
    """

    def __init__(
        self,
        operations: Mapping[str, Any],
        where: str,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: int,
        seed: int,
        engine: str,
    ) -> None:
        view = View(operations, image_size, where)
        super().__init__(operations, operations, mean, std, image_size, seed, engine)
        self.views = [view]


class LabelledViews:
    """Batches of views with labels, an epoch's own order and draws as a function of the seed and the epoch.

    The last batch of an epoch may be smaller.

    Args:
        operations, where, mean, std: of the view, see `OneView`.
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
        self.view = OneView(operations, where, mean, std, image_size, seed, self.engine.name)
        self.sampler = EpochSampler(len(images), 1, seed)  # in ones: no image sits an epoch out
        self.loader: MemoryLoader | ResumableLoader
        if self.engine.in_memory:
            assert isinstance(images, ArrayImages)
            self.loader = MemoryLoader(images, self.view, self.sampler, batch_size, device)
        else:
            dataset = PairDataset(images, self.view, num_workers)
            options = loader_options(num_workers, device) | {"collate_fn": as_it_is}
            self.loader = ResumableLoader(dataset, self.sampler, batch_size, **options)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Views (N, 3, S, S) float32, normalised, and labels (N,), on the device, and indices (N,) on the CPU.

        Where an image cannot be read another's view stands in for it, and the label is -1.
        """
        self.sampler.set_epoch(number)
        for batch in self.loader:
            indices = batch.indices.cpu()
            labels = self.labels[indices].masked_fill(batch.unreadable.cpu(), -1).to(self.device)
            views = batch.views[0]
            if not self.engine.in_memory:
                views, _ = self.view.finished(
                    [views.to(self.device)], number, batch.indices.to(self.device)
                )
            yield views, labels, indices
