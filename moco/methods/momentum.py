"""The key encoder's moving average."""

import math

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


@torch.no_grad()
def update_key_encoder(
    key_encoder: nn.Module, query_encoder: nn.Module, key_momentum: float
) -> None:
    """Set every parameter of the key encoder to m * key + (1 - m) * query, in place.

    Buffers stay: BatchNorm's running statistics in the key encoder come from its own forward
    passes.

    Args:
        key_encoder: of the same layers as the query encoder.
        query_encoder: stays as it is.
        key_momentum: m, from 0 to 1.

    Source: arXiv 1911.05722, equation 2.
    """
    keys: list[Tensor] = list(key_encoder.parameters())
    queries: list[Tensor] = list(query_encoder.parameters())
    # PyTorch's moving average updates all parameters in one call. It ignores its last argument.
    average = get_ema_multi_avg_fn(key_momentum)
    average(keys, queries, 0)


def key_momentum_at(step: int, num_steps: float, start: float, end: float, schedule: str) -> float:
    """Return m of an optimizer step.

    Args:
        step: counted from 0.
        num_steps: optimizer steps of the whole training.
        start: m at step 0.
        end: m at step `num_steps`, for ``cosine``.
        schedule: ``constant``, or ``cosine`` for half a cosine from `start` to `end` (BYOL,
            arXiv 2006.07733, section 3.3; also MoCo v3).
    """
    if schedule == "constant":
        return start
    progress = min(step / num_steps, 1.0)
    return end - (end - start) * (math.cos(math.pi * progress) + 1) / 2
