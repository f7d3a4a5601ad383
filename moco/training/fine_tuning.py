"""AdamW for fine-tuning: lower layers learn more slowly, and the rate is a function of the step."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from moco.training.optimizers import fused, without_decay

MAX_WARMUP_STEPS = 1500  # as in the segmentation code of Swin


def build_layered_optimizer(
    module: nn.Module,
    depths: Mapping[nn.Parameter, int],
    *,
    lr: float,
    weight_decay: float,
    layer_decay: float,
) -> torch.optim.AdamW:
    """Return AdamW with the learning rate lr * layer_decay^depth for each trained parameter.

    As in ELECTRA (arXiv 2003.10555) and BEiT (arXiv 2106.08254). Each group keeps its factor as
    ``scale``. Norms, biases and what the backbone excludes have no weight decay, see
    `without_decay`.

    Args:
        depths: how many layers below the top a parameter is; 0 for parameters that are not in it.
    """
    undecayed = without_decay(module)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        depth = depths.get(parameter, 0)
        is_decayed = name not in undecayed
        key = (depth, not is_decayed)
        if key not in groups:
            scale = layer_decay**depth
            groups[key] = {
                "params": [],
                "lr": lr * scale,
                "scale": scale,
                "weight_decay": weight_decay if is_decayed else 0.0,
            }
        groups[key]["params"].append(parameter)
    # The order is part of the checkpoint format: optimizer states are stored by position.
    ordered = [groups[key] for key in sorted(groups)]
    return fused(torch.optim.AdamW, ordered, lr=lr)


def fine_tuning_lr_at(
    step: int, num_steps: int, *, lr: float, schedule: str, warmup_steps: int | None, power: float
) -> float:
    """Return the learning rate of an optimizer step.

    It rises linearly from 0 during the warm-up and then falls to 0. With t from 0 at the end of the
    warm-up to 1 after the last step, ``poly`` is lr * (1 - t)^power and ``cosine`` is
    lr * (1 + cos(pi * t)) / 2.

    Args:
        step: counted from 0.
        num_steps: of the whole training.
        warmup_steps: None: a twentieth of all steps, at most `MAX_WARMUP_STEPS`.
        power: of ``poly``.
    """
    if warmup_steps is None:
        warmup_steps = min(MAX_WARMUP_STEPS, num_steps // 20)
    if step < warmup_steps:
        return lr * step / warmup_steps
    t = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    t = min(t, 1.0)
    if schedule == "poly":
        return lr * (1 - t) ** power
    return lr * (1 + math.cos(math.pi * t)) / 2
