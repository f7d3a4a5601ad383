"""Features of many images, computed by all processes of a training. Letters: N batch, M images, D feature width."""

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
    """`embed` by several processes: each embeds its own images, rank 0 gets all of them in the order of the data set.

    Args:
        loader: yields every n-th image of the data set, of n processes, from the process's rank on.
        encode, device, precision: see `embed`.
        should_stop: asked before every batch; if it stops one process, all of them raise.

    Returns:
        On rank 0 what `embed` returns for the whole data set; no rows on the others.

    Raises:
        EmbeddingStopped: `should_stop` said so on any process.
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
    places, not_places = (
        gather_rows(local * world_size() + rank()) for local in (readable, unreadable)
    )
    features, labels = gather_rows(features), gather_rows(labels)
    order = places.argsort()
    return features[order], labels[order], np.sort(not_places)
