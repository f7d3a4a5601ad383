"""The key encoder's moving average."""

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def update_key_encoder(
    key_encoder: nn.Module, query_encoder: nn.Module, key_momentum: float
) -> None:
    """Key <- m * key + (1 - m) * query for every parameter, in place (arXiv 1911.05722, equation 2).

    Only parameters are averaged: BatchNorm's running statistics in the key encoder come from its own forward passes.
    """
    keys: list[Tensor] = list(key_encoder.parameters())
    queries: list[Tensor] = list(query_encoder.parameters())
    torch._foreach_lerp_(keys, queries, 1.0 - key_momentum)


def key_momentum_at(step: int, num_steps: int, start: float, end: float, schedule: str) -> float:
    """M for optimizer step `step` of `num_steps`, counted from 0.

    ``constant``: `start`. ``cosine``: from `start` at step 0 to `end` at step `num_steps`
    (BYOL, arXiv 2006.07733, section 3.3; also MoCo v3).
    """
    if schedule == "constant":
        return start
    progress = min(step / num_steps, 1.0)
    return end - (end - start) * (math.cos(math.pi * progress) + 1) / 2
