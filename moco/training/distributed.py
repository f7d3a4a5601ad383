"""Collectives that are the identity on one process, so that the method is written once. N: batch per process."""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def all_gather(tensor: Tensor) -> Tensor:
    """The rows of every process in rank order: (N, ...) to (N * world size, ...); no gradient."""
    if world_size() == 1:
        return tensor
    tensor = tensor.contiguous()  # NCCL takes no other strides, and empty_like would repeat them
    gathered = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(gathered, tensor)
    return torch.cat(gathered)


@torch.no_grad()
def shuffled_across(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """This process's share of all processes' rows in one random order, and that order.

    The order is drawn on rank 0 and sent to the others. On one process it is a permutation of the batch.

    Returns:
        The share (N, ...) and the order (N * world size,): row i of the shuffled whole is row order[i] of the original.
    """
    everything = all_gather(tensor)
    order = torch.randperm(len(everything)).to(tensor.device)
    if world_size() == 1:
        return everything[order], order
    dist.broadcast(order, src=0)
    start = dist.get_rank() * len(tensor)
    return everything[order[start : start + len(tensor)]], order


@torch.no_grad()
def unshuffled(shuffled: Tensor, order: Tensor) -> Tensor:
    """Undo `shuffled_across` for rows computed from its share: this process's own rows, (N, ...)."""
    restored = all_gather(shuffled)[order.argsort()]
    if world_size() == 1:
        return restored
    start = dist.get_rank() * len(shuffled)
    return restored[start : start + len(shuffled)]
