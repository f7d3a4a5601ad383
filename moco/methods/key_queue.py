"""The queue of negative keys."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KeyQueue(nn.Module):
    """A ring buffer of the newest K keys, first in, first out.

    Any K goes with any batch size: writing wraps around, and of a batch larger than K the newest K
    keys stay. Keys, pointer and fill are buffers, so a checkpoint restores the queue exactly.

    Args:
        queue_size: K.
        embedding_dim: C.
        start: ``random``: K random unit vectors are negatives until keys replace them, as in the
            official code. ``empty``: only enqueued keys are negatives.
        keeps_groups: whether the queue has a buffer for the group of each key's image.

    Source: arXiv 1911.05722, section 3.2.
    """

    keys: Tensor
    """(K, C), unit norm."""
    pointer: Tensor
    """Scalar: the row that the next key goes to."""
    filled: Tensor
    """Scalar: how many rows hold enqueued keys."""
    groups: Tensor | None
    """(K,) int64, the group of each key's image; -1: unknown. None if the queue keeps no groups."""

    def __init__(
        self,
        queue_size: int,
        embedding_dim: int,
        start: str = "random",
        keeps_groups: bool = False,
    ) -> None:
        super().__init__()
        self.start = start
        keys = F.normalize(torch.randn(queue_size, embedding_dim), dim=1)
        self.register_buffer("keys", keys)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))
        groups = None
        if keeps_groups:
            groups = torch.full((queue_size,), -1)
        self.register_buffer("groups", groups)
        # A copy of `filled` on the host: a step need not wait for the device to read it.
        self.num_filled = 0
        self.register_load_state_dict_post_hook(_copy_fill_to_host)

    def negatives(self) -> Tensor:
        """Return a copy of the keys: (K, C), or (filled, C) while an ``empty`` start fills up.

        A copy, because `enqueue` overwrites keys that the backward pass still needs.
        """
        if self.start == "random":
            return self.keys.clone()
        return self.keys[: self.num_filled].clone()

    def groups_of_negatives(self) -> Tensor:
        """Return a copy of the groups (K,) int64 of `negatives`; for a queue that keeps groups."""
        assert self.groups is not None
        if self.start == "random":
            return self.groups.clone()
        return self.groups[: self.num_filled].clone()

    def newest(self, most: int) -> Tensor:
        """Return a copy of the newest keys, the oldest of them first: (min(most, filled), C)."""
        count = min(most, self.num_filled)
        rows = self.pointer - count + torch.arange(count, device=self.keys.device)
        return self.keys[rows % len(self.keys)]

    @torch.no_grad()
    def enqueue(self, keys: Tensor, groups: Tensor | None = None) -> None:
        """Replace the oldest keys by new ones, in order; advances pointer and fill.

        A key that is not finite would spoil every later loss. It is left out, and its row keeps the
        value that it had. Nothing waits for the device.

        Args:
            keys: (N, C), unit norm.
            groups: (N,) int64, of the keys' images, for a queue that keeps groups.
        """
        size = len(self.keys)
        newest = keys[-size:].to(self.keys.dtype)
        first = self.pointer + len(keys) - len(newest)
        places = torch.arange(len(newest), device=keys.device)
        rows = (first + places) % size  # the queue is a ring
        is_finite = newest.isfinite().all(dim=1, keepdim=True)  # (N, 1)
        self.keys[rows] = newest.where(is_finite, self.keys[rows])
        if self.groups is not None:
            assert groups is not None
            newest_groups = groups[-size:]
            self.groups[rows] = newest_groups.where(is_finite[:, 0], self.groups[rows])
        self.pointer.copy_((self.pointer + len(keys)) % size)
        self.num_filled = min(self.num_filled + len(keys), size)
        self.filled.fill_(self.num_filled)


def _copy_fill_to_host(queue: nn.Module, incompatible_keys: Any) -> None:
    """Update `num_filled` after the buffers of a queue were loaded."""
    assert isinstance(queue, KeyQueue)
    queue.num_filled = int(queue.filled)
