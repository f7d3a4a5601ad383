"""The queue of negative keys. Letters: N batch, C embedding width, K queue size."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KeyQueue(nn.Module):
    """A ring of the newest K keys, first in first out (arXiv 1911.05722, section 3.2).

    Any K goes with any batch: writing wraps around, and of a batch larger than K the newest K stay. Keys, pointer and
    fill are buffers, so a checkpoint restores the queue exactly.

    Args:
        queue_size: K.
        embedding_dim: C.
        start: ``random``: K random unit vectors serve as negatives until keys replace them, as in the official code;
            ``empty``: only keys that were enqueued do.
    """

    keys: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(self, queue_size: int, embedding_dim: int, start: str = "random") -> None:
        super().__init__()
        self.start = start
        self.register_buffer(
            "keys", F.normalize(torch.randn(queue_size, embedding_dim), dim=1)
        )  # (K, C) unit norm
        self.register_buffer(
            "pointer", torch.zeros((), dtype=torch.long)
        )  # row that the next key goes to
        self.register_buffer(
            "filled", torch.zeros((), dtype=torch.long)
        )  # rows that hold real keys
        self.num_filled = (
            0  # the same on the host, so that no step has to wait for the device to tell
        )
        self.num_given = 0
        self.replaced: list[tuple[Tensor, Tensor]] = []

    def negatives(self) -> Tensor:
        """The keys as they are now: (K, C), or (filled, C) while an ``empty`` start fills up; no gradient.

        They are no copy, which of a long queue would take time and memory in every step: `enqueue` changes them.
        """
        self.num_given = len(self.keys) if self.start == "random" else self.num_filled
        self.replaced = []
        return self.keys[: self.num_given]

    def negatives_given_last(self) -> Tensor:
        """A copy of what `negatives` gave last, as it was then."""
        keys = self.keys.clone()
        for rows, before in reversed(self.replaced):
            keys[rows] = before
        return keys[: self.num_given]

    def newest(self, most: int) -> Tensor:
        """A copy of the keys that were enqueued last, the oldest of them first: (min(most, filled), C)."""
        count = min(most, self.num_filled)
        return self.keys[
            (self.pointer - count + torch.arange(count, device=self.keys.device)) % len(self.keys)
        ]

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest keys by `keys` (N, C), in order; advances pointer and fill. No host synchronisation.

        A key that is not finite would spoil every loss until it is overwritten. The row that it would have taken stays as
        it is: an older key, or in a queue that is not full yet the random unit vector that the row was made with.
        """
        size, count = len(self.keys), len(keys)
        newest = keys[-size:].to(self.keys.dtype)  # (n, C)
        rows = (
            self.pointer + count - len(newest) + torch.arange(len(newest), device=keys.device)
        ) % size
        is_finite = newest.isfinite().all(dim=1, keepdim=True)  # (N, 1)
        before = self.keys[rows]
        self.replaced.append((rows, before))
        self.keys[rows] = newest.where(is_finite, before)
        self.pointer.copy_((self.pointer + count) % size)
        self.num_filled = min(self.num_filled + count, size)
        self.filled.fill_(self.num_filled)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.num_filled = int(self.filled)
