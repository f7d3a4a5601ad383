"""Features of many images, computed by all processes of a training together."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moco.evaluation.features import EmbeddingStopped, embed
from moco.training.distributed.collectives import gather_rows, largest, rank, world_size


def embed_together(
    encode: Callable[[Tensor], Tensor],
    loader: Iterable[Any],
    device: torch.device | str,
    should_stop: Callable[[], bool] = lambda: False,
    precision: str = "32-true",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embed a dataset: each process embeds its own images, and rank 0 gets all features.

    Args:
        loader: yields every n-th image of the dataset, of n processes, from the process's rank on.
        encode, device, precision: see `embed`.
        should_stop: asked before every batch. If it stops one process, all of them raise.

    Returns:
        On rank 0 what `embed` returns for the whole dataset, in its order; on the others no rows.

    Raises:
        EmbeddingStopped: `should_stop` stopped it on any process.
    """
    if world_size() == 1:
        return embed(encode, loader, device, should_stop, precision)
    stopped = False
    try:
        features, labels, unreadable = embed(encode, loader, device, should_stop, precision)
    except EmbeddingStopped:
        stopped = True
    if largest([stopped])[0]:
        raise EmbeddingStopped
    readable = np.delete(np.arange(len(features) + len(unreadable)), unreadable)
    # Image i of this process is image i * world_size + rank of the dataset.
    readable_places = gather_rows(readable * world_size() + rank())
    unreadable_places = gather_rows(unreadable * world_size() + rank())
    features = gather_rows(features)
    labels = gather_rows(labels)
    order = readable_places.argsort()
    return features[order], labels[order], np.sort(unreadable_places)
