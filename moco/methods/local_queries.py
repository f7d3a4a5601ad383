"""Local crops as further queries of the method, see `moco.data.augment.local_crops`.

A local crop goes through the query encoder and is to find the key of its image's full view among
the same negatives. It never becomes a key: keys are of full views alone, and the queue stays as it
is. Source: multi-crop, arXiv 2006.09882, section 3.2; with MoCo, arXiv 2106.05967.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moco.errors import InputError
from moco.models.encoder import BATCH_NORMS


def local_crops_of(batch: Any, count: int) -> Sequence[Tensor]:
    """Return the local crops of a batch, (N, B, H, W) each.

    Args:
        batch: of the training.
        count: how many there have to be.

    Raises:
        InputError: the batch has another number of them.
    """
    crops = getattr(batch, "local_crops", ())
    if len(crops) != count:
        raise InputError(
            f"method.local_crops={count}: the batches have {len(crops)} local crops; a batch of "
            f"your own has a field local_crops, {count} tensors (N, bands, side, side)"
        )
    return crops


@contextmanager
def running_statistics_kept(*modules: nn.Module) -> Iterator[None]:
    """Let BatchNorm normalise batches inside the block without moving its running statistics.

    Evaluation, which uses the running statistics, sees full views alone.
    """
    layers: list[Any] = []
    for module in modules:
        layers += [layer for layer in module.modules() if isinstance(layer, BATCH_NORMS)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def mean_with_local(loss_full: Tensor, losses_local: Sequence[Tensor]) -> Tensor:
    """Return the mean loss of all queries of an image, in which each counts the same.

    Args:
        loss_full: of the full views.
        losses_local: of each local crop, in the unit of `loss_full`.
    """
    total = loss_full + torch.stack(list(losses_local)).sum()
    return total / (1 + len(losses_local))
