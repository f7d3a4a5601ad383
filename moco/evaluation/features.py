"""Features of many images. Letters: N batch, M images, D feature width, H W pixels."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class EmbeddingStopped(Exception):
    """`embed` was told to stop before the last batch."""


@torch.no_grad()
def embed(
    encode: Callable[[Tensor], Tensor],
    loader: Iterable[Any],
    device: torch.device | str,
    should_stop: Callable[[], bool] = lambda: False,
    precision: str = "32-true",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of every image that a loader yields, in order.

    Args:
        encode: images (N, 3, H, W) on `device` to features (N, D).
        loader: yields batches with ``images``, ``labels`` and ``unreadable``; unreadable rows are left out.
        should_stop: asked before every batch.
        precision: ``32-true``, whatever the training's, or ``bf16-mixed``, under autocast.

    Returns:
        Features (M, D) float32, labels (M,) int64, and the numbers of the unreadable images.

    Raises:
        EmbeddingStopped: `should_stop` said so.
    """
    features, labels, unreadable = [], [], []
    device = torch.device(device)
    for batch in loader:
        if should_stop():
            raise EmbeddingStopped
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            encoded = encode(batch.images.to(device, non_blocking=True)).float()
        features.append(encoded.cpu()[~batch.unreadable])
        labels.append(batch.labels[~batch.unreadable])
        unreadable.append(batch.unreadable)
    if not features:  # of several processes one may have no image at all
        return np.empty((0, 0), np.float32), np.empty(0, np.int64), np.empty(0, np.int64)
    return (
        torch.cat(features).numpy(),
        torch.cat(labels).numpy(),
        torch.cat(unreadable).nonzero()[:, 0].numpy(),
    )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, `module` is in eval mode; afterwards each of its layers is in the mode that it was in before."""
    modes = [(layer, layer.training) for layer in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode
