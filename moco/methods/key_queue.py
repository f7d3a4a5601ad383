"""The queue of negative keys. Letters: N batch, C embedding width, K queue size."""

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
        self.register_buffer("keys", F.normalize(torch.randn(queue_size, embedding_dim), dim=1))  # (K, C) unit norm
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))  # row that the next key goes to
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))  # rows that hold real keys

    def negatives(self) -> Tensor:
        """A copy of the keys as they are now: (K, C), or (filled, C) while an ``empty`` start fills up; no gradient.

        A copy, because backward needs these rows after `enqueue` has overwritten some of them.
        """
        if self.start == "random":
            return self.keys.clone()
        return self.keys[: int(self.filled)].clone()

    def newest(self, most: int) -> Tensor:
        """A copy of the keys that were enqueued last, the oldest of them first: (min(most, filled), C)."""
        count = min(most, int(self.filled))
        return self.keys[(self.pointer - count + torch.arange(count, device=self.keys.device)) % len(self.keys)]

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest keys by `keys` (N, C), in order; advances pointer and fill. No host synchronisation.

        A key that is not finite would spoil every loss until it is overwritten. The row that it would have taken stays as
        it is: an older key, or in a queue that is not full yet the random unit vector that the row was made with.
        """
        size, count = len(self.keys), len(keys)
        newest = keys[-size:].to(self.keys.dtype)
        rows = (self.pointer + count - len(newest) + torch.arange(len(newest), device=keys.device)) % size
        is_finite = newest.isfinite().all(dim=1, keepdim=True)  # (N, 1)
        self.keys[rows] = newest.where(is_finite, self.keys[rows])
        self.pointer.copy_((self.pointer + count) % size)
        self.filled.copy_((self.filled + count).clamp(max=size))
