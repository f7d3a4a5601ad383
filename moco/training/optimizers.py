"""Optimizers of pretraining and of fine-tuning."""

from collections.abc import Callable, Mapping
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
    """Return the optimizer `name` for the trained parameters of `module`.

    SGD and AdamW take a step in one fused kernel; timm's LARS takes it parameter by parameter.

    ``lars`` is LARS (arXiv 1708.03888) by timm. With eta the trust coefficient, b the weight decay
    and the ratio r = eta * |w| / (|g| + b |w|), a layer with weights w and gradient g takes the
    step lr * r * (g + b w), or with `trust_clip` (LARC) min(lr, r) * (g + b w). Parameters without
    weight decay take plain steps lr * g.

    Differs from the paper: momentum adds up steps before they are multiplied by lr, as in PyTorch's
    SGD. MoCo v3's official code does so too; it has |g + b w| in the denominator.

    Where g is exactly zero, timm uses the ratio 1, so that only weight decay acts: lr * b * w. MoCo
    v3's code has the ratio eta / b there and takes lr * eta * w, which is a thousand times as much
    with its numbers. With weight decay 0 both leave the layer as it is.

    Args:
        module: the module.
        name: sgd, adamw or lars.
        lr: the learning rate.
        weight_decay: of the parameters that are not excluded.
        decay_all: see `without_decay`; LARS always excludes norms and biases.
        sgd_momentum: of SGD and LARS.
        beta1: of AdamW.
        beta2: of AdamW.
        eps: of AdamW.
        trust_coefficient: of LARS.
        trust_clip: of LARS.
        _: the fields of the schedule, which are not used here.
    """
    excluded = without_decay(module, decay_all and name != "lars")
    decayed_group: dict[str, Any] = {"params": []}
    excluded_group: dict[str, Any] = {"params": [], "weight_decay": 0.0}
    for path, parameter in module.named_parameters():
        group = excluded_group if path in excluded else decayed_group
        if parameter.requires_grad:
            group["params"].append(parameter)
    groups = [group for group in (decayed_group, excluded_group) if group["params"]]
    if name == "adamw":
        settings = {"betas": (beta1, beta2), "eps": eps}
        return fused(torch.optim.AdamW, groups, lr=lr, weight_decay=weight_decay, **settings)
    if name == "lars":
        from timm.optim.lars import Lars  # an optional extra

        decayed_group["always_adapt"] = True  # timm's default adapts nothing when weight decay is 0
        return Lars(
            groups,
            lr,
            sgd_momentum,
            weight_decay=weight_decay,
            trust_coeff=trust_coefficient,
            trust_clip=trust_clip,
        )
    assert name == "sgd", name  # the schema has no other
    optimizer = fused(
        torch.optim.SGD, groups, lr=lr, momentum=sgd_momentum, weight_decay=weight_decay
    )
    if sgd_momentum:
        # PyTorch would make these buffers in the first step. If that step is skipped on the device,
        # it leaves them uninitialised, and the next step takes their content for momentum. Zeros
        # give the same first step as PyTorch's.
        for group in groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


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
        is_undecayed = name in undecayed
        scale = layer_decay**depth
        group = {
            "params": [],
            "lr": lr * scale,
            "scale": scale,
            "weight_decay": 0.0 if is_undecayed else weight_decay,
        }
        groups.setdefault((depth, is_undecayed), group)["params"].append(parameter)
    # The order is part of the checkpoint format: optimizer states are stored by position.
    ordered = [groups[key] for key in sorted(groups)]
    return fused(torch.optim.AdamW, ordered, lr=lr)


def fused(
    kind: Callable[..., torch.optim.Optimizer], groups: list[dict[str, Any]], **settings: Any
) -> Any:
    """Return PyTorch's optimizer `kind` that takes its step in one kernel, on CPUs and GPUs.

    It loads the state of an optimizer that was not fused, and of weights that had another memory
    format.
    """
    optimizer = kind(groups, fused=True, **settings)
    # A fused optimizer says that its step divides gradients by the loss scale. Lightning then
    # refuses to clip gradients in mixed precision. Ours are divided before. There is no public
    # setting; a test clips in mixed precision.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    optimizer.register_load_state_dict_pre_hook(kept_fused)
    optimizer.register_load_state_dict_post_hook(match_memory_format)
    return optimizer


def kept_fused(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the state with all groups fused, also if those of its run were not."""
    groups = [group | {"fused": True, "foreach": None} for group in state_dict["param_groups"]]
    return state_dict | {"param_groups": groups}


def match_memory_format(optimizer: torch.optim.Optimizer) -> None:
    """Bring the loaded state of each weight into the weight's memory format.

    The fused kernels read both in the order in which they lie in memory.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)


def without_decay(module: nn.Module, decay_all: bool = False) -> set[str]:
    """Return the names of the parameters that get no weight decay.

    These are parameters of at most one dimension (norms, biases), and those whose name inside a
    submodule contains one of that submodule's ``no_weight_decay_keywords``.

    Args:
        module: the module.
        decay_all: decay norms and biases too, as the official MoCo code does, except in submodules
            with such keywords.
    """
    excluded = set()
    for path, parameter in module.named_parameters():
        if parameter.ndim <= 1 and not decay_all:
            excluded.add(path)
    for prefix, layer in module.named_modules():
        keywords = getattr(layer, "no_weight_decay_keywords", None)
        if keywords is None:
            continue
        for path, parameter in layer.named_parameters():
            if parameter.ndim <= 1 or any(keyword in path for keyword in keywords):
                excluded.add(f"{prefix}.{path}".lstrip("."))
    return excluded
