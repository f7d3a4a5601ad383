"""AdamW for fine-tuning: lower layers learn more slowly, and the learning rate is a pure function of the step."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from moco.training.optimizers import fused, without_decay

LONGEST_WARMUP = 1500  # steps; of the Swin segmentation code


def build_layered_optimizer(
    module: nn.Module,
    depths: Mapping[nn.Parameter, int],
    *,
    lr: float,
    weight_decay: float,
    layer_decay: float,
) -> torch.optim.AdamW:
    """AdamW over the parameters of `module` that are trained, with the learning rate lr * layer_decay^depth for each.

    As in ELECTRA (arXiv 2003.10555) and BEiT (arXiv 2106.08254). Each group keeps its factor as ``scale``. Weight decay
    spares norms, biases and what the backbone asks to be spared, see `without_decay`.

    Args:
        depths: layers from the top, of the parameters that are in one; the others' depth is 0.
    """
    spared = without_decay(module)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for path, parameter in module.named_parameters():
        if parameter.requires_grad:
            depth, is_spared = depths.get(parameter, 0), path in spared
            scale = layer_decay**depth
            new = {
                "params": [],
                "lr": lr * scale,
                "scale": scale,
                "weight_decay": 0.0 if is_spared else weight_decay,
            }
            groups.setdefault((depth, is_spared), new)["params"].append(parameter)
    return fused(torch.optim.AdamW, [groups[key] for key in sorted(groups)], lr=lr)


def fine_tuning_lr_at(
    step: int, num_steps: int, *, lr: float, schedule: str, warmup_steps: int | None, power: float
) -> float:
    """The learning rate of optimizer step `step` of `num_steps`, counted from 0.

    After a linear warm-up from 0 over `warmup_steps`, with t from 0 at its end to 1 after the last step: ``poly`` is
    lr * (1 - t)^power, ``cosine`` is lr * (1 + cos(pi * t)) / 2.

    Args:
        warmup_steps: None: a twentieth of all steps, at most `LONGEST_WARMUP`.
    """
    if warmup_steps is None:
        warmup_steps = min(LONGEST_WARMUP, num_steps // 20)
    if step < warmup_steps:
        return lr * step / warmup_steps
    t = min((step - warmup_steps) / max(num_steps - warmup_steps, 1), 1.0)
    return lr * (1 - t) ** power if schedule == "poly" else lr * (1 + math.cos(math.pi * t)) / 2
