"""Learning rates as pure functions of the step."""

import math
from collections.abc import Sequence
from typing import Any

MAX_WARMUP_STEPS = 1500  # as in the segmentation code of Swin


def scaled_to_batch(optimizer: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """Return the fields of ``OptimizerConfig`` with the learning rates for a batch size.

    Learning rates grow in proportion to the batch (arXiv 1706.02677), starting from their values at
    ``lr_for_batch_size``. If that is None, they stay.

    Args:
        optimizer: the fields.
        batch_size: images per optimizer step.
    """
    if optimizer["lr_for_batch_size"] is None:
        return optimizer
    scale = batch_size / optimizer["lr_for_batch_size"]
    scaled = optimizer | {"lr_for_batch_size": None}
    for name in ("lr", "warmup_start_lr", "final_lr"):
        scaled[name] = optimizer[name] * scale
    return scaled


def learning_rate_at(
    step: int,
    num_steps: float,
    steps_per_epoch: float,
    *,
    lr: float,
    schedule: str,
    schedule_interval: str = "step",
    schedule_offset_epochs: int = 0,
    milestones: Sequence[int] = (),
    step_factor: float = 0.1,
    warmup_epochs: float = 0,
    warmup_start_lr: float = 0,
    final_lr: float = 0,
    **_: Any,
) -> float:
    """Return the learning rate of optimizer step `step` of `num_steps`, counted from 0.

    After a linear warm-up from `warmup_start_lr` over `warmup_epochs`:
    ``constant`` is `lr`; ``step`` multiplies it by `step_factor` at each of `milestones` (epochs);
    ``cosine`` is final_lr + (lr - final_lr) * (1 + cos(pi * t)) / 2, where t runs from 0 at the end
    of the warm-up to 1 after the last step.
    With `schedule_interval` ``epoch`` the schedule sees whole epochs only, plus
    `schedule_offset_epochs`.
    """
    warmup_steps = warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return warmup_start_lr + (lr - warmup_start_lr) * step / warmup_steps
    if schedule == "constant":
        return lr
    position = float(step)
    if schedule_interval == "epoch":
        position = (step // steps_per_epoch + schedule_offset_epochs) * steps_per_epoch
    if schedule == "step":
        num_passed = sum(position >= milestone * steps_per_epoch for milestone in milestones)
        return lr * step_factor**num_passed
    progress = (position - warmup_steps) / max(num_steps - warmup_steps, 1)
    progress = min(max(progress, 0.0), 1.0)
    return final_lr + (lr - final_lr) * (1 + math.cos(math.pi * progress)) / 2


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
