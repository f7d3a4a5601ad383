"""Features of many images, by any function from images to features."""

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
    """Return features of every image that a loader yields, in order, without unreadable images.

    Args:
        encode: from images (batch, 3, height, width) on `device` to features (batch, width).
        loader: yields batches with ``images``, ``labels`` and ``unreadable``.
        device: where to compute.
        should_stop: asked before every batch.
        precision: ``32-true``, whatever the training's, or ``bf16-mixed``, under autocast.

    Returns:
        Features (images, width) float32, labels (images,) int64, and the place of each image among
        all that the loader yields, (images,) int64.

    Raises:
        EmbeddingStopped: `should_stop` returned true.
    """
    features, labels, readable = [], [], []
    device = torch.device(device)
    for batch in loader:
        if should_stop():
            raise EmbeddingStopped
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            encoded = encode(batch.images.to(device, non_blocking=True)).float()
        # A batch keeps a black image in the place of an unreadable one.
        is_readable = ~batch.unreadable
        features.append(encoded.cpu()[is_readable])
        labels.append(batch.labels[is_readable])
        readable.append(is_readable)
    if not features:  # one of several processes may have no image at all
        return np.empty((0, 0), np.float32), np.empty(0, np.int64), np.empty(0, np.int64)
    rows = torch.cat(readable).nonzero()[:, 0]
    return torch.cat(features).numpy(), torch.cat(labels).numpy(), rows.numpy()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put `module` into eval mode inside the block; afterwards each layer has its old mode."""
    modes = [(layer, layer.training) for layer in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode
