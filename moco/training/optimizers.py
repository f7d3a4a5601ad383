"""Optimizers, and the learning rate as a pure function of the step."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn


def build_optimizer(
    parameters: Iterable[nn.Parameter], *, name: str, lr: float, sgd_momentum: float, weight_decay: float, **_: Any
) -> torch.optim.Optimizer:
    """The optimizer `name` over `parameters`, all of them decayed; the schedule's fields are not its business."""
    assert name == "sgd", name  # the schema has no other
    return torch.optim.SGD(parameters, lr=lr, momentum=sgd_momentum, weight_decay=weight_decay)


def learning_rate_at(
    step: int,
    num_steps: int,
    steps_per_epoch: int,
    *,
    lr: float,
    schedule: str,
    schedule_interval: str = "step",
    schedule_offset_epochs: int = 0,
    milestones: Sequence[int] = (),
    step_factor: float = 0.1,
    warmup_epochs: float = 0,
    **_: Any,
) -> float:
    """The learning rate of optimizer step `step` of `num_steps`, counted from 0.

    After a linear warm-up from 0 over `warmup_epochs`:
    ``constant`` is `lr`; ``step`` multiplies it by `step_factor` at each of `milestones` (epochs);
    ``cosine`` is lr * (1 + cos(pi * t)) / 2, where t runs from 0 at the end of the warm-up to 1 after the last step.
    With `schedule_interval` ``epoch`` the schedule sees whole epochs only, plus `schedule_offset_epochs`.
    """
    warmup_steps = warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return lr * step / warmup_steps
    position = float(step)
    if schedule_interval == "epoch":
        position = (step // steps_per_epoch + schedule_offset_epochs) * steps_per_epoch
    if schedule == "constant":
        return lr
    if schedule == "step":
        return lr * step_factor ** sum(position >= milestone * steps_per_epoch for milestone in milestones)
    progress = (position - warmup_steps) / max(num_steps - warmup_steps, 1)
    return lr * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2
