"""Optimizers, and the learning rate as a pure function of the step."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def build_optimizer(
    module: nn.Module,
    *,
    name: str,
    lr: float,
    weight_decay: float,
    decay_all: bool = True,
    sgd_momentum: float = 0.9,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    trust_coefficient: float = 1e-3,
    trust_clip: bool = False,
    **_: Any,
) -> torch.optim.Optimizer:
    """The optimizer `name` over the parameters of `module` that are trained; the schedule's fields are not its business.

    SGD and AdamW are `fused`; timm's LARS takes a step parameter by parameter.

    ``lars`` is LARS (arXiv 1708.03888) by timm. With eta the trust coefficient, b the weight decay and the ratio
    r = eta * |w| / (|g| + b |w|), a layer of weights w and gradient g takes the step lr * r * (g + b w), or with
    `trust_clip` (LARC) min(lr, r) * (g + b w). What weight decay spares takes plain steps lr * g.
    Differs from the paper: momentum adds steps up before they are multiplied by lr, as in PyTorch's SGD. MoCo v3's official
    code does so too; it has |g + b w| in the denominator.
    Where g is exactly zero, timm takes the ratio 1: weight decay alone, lr * b * w. MoCo v3's code
    has the ratio eta / b there and takes lr * eta * w, a thousand times as much with its numbers.
    With weight decay 0 both leave the layer as it is.

    Args:
        decay_all: see `without_decay`; LARS spares norms and biases in any case.
    """
    spared = without_decay(module, decay_all and name != "lars")
    decayed_group: dict[str, Any] = {"params": []}
    spared_group: dict[str, Any] = {"params": [], "weight_decay": 0.0}
    for path, parameter in module.named_parameters():
        if parameter.requires_grad:
            (spared_group if path in spared else decayed_group)["params"].append(parameter)
    groups = [group for group in (decayed_group, spared_group) if group["params"]]
    if name == "adamw":
        return fused(
            torch.optim.AdamW,
            groups,
            lr=lr,
            betas=(beta1, beta2),
            eps=eps,
            weight_decay=weight_decay,
        )
    if name == "lars":
        from timm.optim.lars import Lars  # an optional extra

        decayed_group["always_adapt"] = True  # timm's default adapts nothing once weight decay is 0
        momentum, eta = sgd_momentum, trust_coefficient
        return Lars(
            groups, lr, momentum, weight_decay=weight_decay, trust_coeff=eta, trust_clip=trust_clip
        )
    assert name == "sgd", name  # the schema has no other
    optimizer = fused(
        torch.optim.SGD, groups, lr=lr, momentum=sgd_momentum, weight_decay=weight_decay
    )
    if sgd_momentum:
        # From the gradient alone, as PyTorch begins, is from zero. PyTorch's own buffers of the first step are not written
        # to before it, and what is in them would be taken for momentum if that step is left out on the device.
        for parameter in (parameter for group in groups for parameter in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def fused(
    kind: Callable[..., torch.optim.Optimizer], groups: list[dict[str, Any]], **settings: Any
) -> Any:
    """PyTorch's optimizer `kind` that takes its step in one kernel, on CPUs as on GPUs.

    Its state in a checkpoint is that of any other: it takes those of optimizers that were not fused, and of weights that lay
    in memory in another order.
    """
    optimizer = kind(groups, fused=True, **settings)
    # It says that the step divides gradients by a loss scale, for which Lightning would refuse to clip them in mixed
    # precision. Ours come to the step as they are.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    optimizer.register_load_state_dict_pre_hook(kept_fused)
    optimizer.register_load_state_dict_post_hook(as_the_weights_lie)
    return optimizer


def kept_fused(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state whose groups say that they are fused, whatever those of its run were."""
    groups = [group | {"fused": True, "foreach": None} for group in state_dict["param_groups"]]
    return state_dict | {"param_groups": groups}


def as_the_weights_lie(optimizer: torch.optim.Optimizer) -> None:
    """Bring what a state holds for each weight into the weight's memory format: the kernels read both as they lie."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)


def without_decay(module: nn.Module, decay_all: bool = False) -> set[str]:
    """Names of the parameters that weight decay is not for.

    Those of at most one dimension (norms, biases), and those whose name inside a submodule contains one of that submodule's
    ``no_weight_decay_keywords``.

    Args:
        decay_all: decay norms and biases too, as the official MoCo code does, but for those of submodules with such
            keywords, which know better.
    """
    spared = {
        path
        for path, parameter in module.named_parameters()
        if parameter.ndim <= 1 and not decay_all
    }
    for prefix, layer in module.named_modules():
        keywords = getattr(layer, "no_weight_decay_keywords", None)
        if keywords is not None:
            spared |= {
                f"{prefix}.{path}".lstrip(".")
                for path, parameter in layer.named_parameters()
                if parameter.ndim <= 1 or any(keyword in path for keyword in keywords)
            }
    return spared


def scaled_to_batch(optimizer: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """The fields of ``OptimizerConfig`` with its learning rates for `batch_size` images per optimizer step.

    They grow in proportion to the batch (arXiv 1706.02677) from what they are at ``lr_for_batch_size``; if that is None,
    they stay.
    """
    if optimizer["lr_for_batch_size"] is None:
        return optimizer
    scale = batch_size / optimizer["lr_for_batch_size"]
    rates = {name: optimizer[name] * scale for name in ("lr", "warmup_start_lr", "final_lr")}
    return optimizer | rates | {"lr_for_batch_size": None}


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
    warmup_start_lr: float = 0,
    final_lr: float = 0,
    **_: Any,
) -> float:
    """The learning rate of optimizer step `step` of `num_steps`, counted from 0.

    After a linear warm-up from `warmup_start_lr` over `warmup_epochs`:
    ``constant`` is `lr`; ``step`` multiplies it by `step_factor` at each of `milestones` (epochs);
    ``cosine`` is final_lr + (lr - final_lr) * (1 + cos(pi * t)) / 2, where t runs from 0 at the end of the warm-up to 1
    after the last step.
    With `schedule_interval` ``epoch`` the schedule sees whole epochs only, plus `schedule_offset_epochs`.
    """
    warmup_steps = warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return warmup_start_lr + (lr - warmup_start_lr) * step / warmup_steps
    position = float(step)
    if schedule_interval == "epoch":
        position = (step // steps_per_epoch + schedule_offset_epochs) * steps_per_epoch
    if schedule == "constant":
        return lr
    if schedule == "step":
        return lr * step_factor ** sum(
            position >= milestone * steps_per_epoch for milestone in milestones
        )
    progress = (position - warmup_steps) / max(num_steps - warmup_steps, 1)
    return final_lr + (lr - final_lr) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2
