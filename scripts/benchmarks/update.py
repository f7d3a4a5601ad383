"""Measure the momentum update and the optimizer's step.

Each is compared with one pass over a flat tensor with the same number of parameters.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import of_lightly, official
from benchmarks.nets import NETS, TINY, Net, head
from benchmarks.peers import Peers
from benchmarks.recipe import KEY_MOMENTUM, SGD
from benchmarks.turns import Case, Turn, timed
from moco.methods.momentum import update_key_encoder
from moco.training.optimizers import build_optimizer

ADAMW = {"lr": 1e-4, "weight_decay": 0.05}
OF_TORCH = {"sgd": (torch.optim.SGD, SGD), "adamw": (torch.optim.AdamW, ADAMW)}
OF_OURS = {"sgd": {"lr": SGD["lr"], "weight_decay": SGD["weight_decay"]}, "adamw": ADAMW}


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    pass


def cases(arguments: argparse.Namespace, peers: Peers) -> Iterator[Case]:
    device = torch.device(arguments.device)
    nets = TINY if arguments.tiny else {name: NETS[name] for name in ("resnet50", "swin_v2_t")}
    for name, net in nets.items():
        references = ("flat lerp_", "official", "lightly")
        updates = momentum_updates(net, device, peers)
        yield Case(f"{name}, momentum update", updates, references, warm_ups=2)
        for optimizer in OF_TORCH:
            contenders = {}
            for contender in ("flat, fused", "ours", "torch's default"):
                contenders[contender] = partial(optimizer_turn, optimizer, net, device, contender)
            references = ("flat, fused", "torch's default")
            yield Case(f"{name}, {optimizer} step", contenders, references, warm_ups=2)


def encoder(net: Net, device: torch.device) -> nn.Module:
    backbone = net.ours()
    return nn.Sequential(backbone, head(backbone.feature_dim)).to(device)


def flat(module: nn.Module) -> Tensor:
    """Return all parameters in one flat tensor."""
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def flat_lerp(query_encoder: nn.Module, key_encoder: nn.Module) -> Callable[[], Tensor]:
    """Return the lower bound: one kernel for the same number of parameters."""
    query, key = flat(query_encoder), flat(key_encoder)
    return lambda: key.lerp_(query, 1 - KEY_MOMENTUM)


def ours(query_encoder: nn.Module, key_encoder: nn.Module) -> Callable[[], None]:
    return lambda: update_key_encoder(key_encoder, query_encoder, KEY_MOMENTUM)


def momentum_updates(net: Net, device: torch.device, peers: Peers) -> dict[str, Callable[[], Turn]]:
    def turn(build: Callable[[nn.Module, nn.Module], Callable[[], Any]]) -> Turn:
        query_encoder = encoder(net, device)
        key_encoder = copy.deepcopy(query_encoder).requires_grad_(False)
        return timed(build(query_encoder, key_encoder), device)

    updates: dict[str, Callable[[], Turn]] = {
        "flat lerp_": partial(turn, flat_lerp),
        "ours": partial(turn, ours),
    }
    if "official" in peers:
        checkout = peers["official"]
        updates["official"] = lambda: timed(official.momentum_update(checkout, net, device), device)
    if "lightly" in peers:
        updates["lightly"] = partial(turn, of_lightly.momentum_update)
    return updates


def optimizer_turn(optimizer: str, net: Net, device: torch.device, contender: str) -> Turn:
    return timed(stepping(optimizer, contender, encoder(net, device)).step, device)


def stepping(optimizer: str, contender: str, module: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer whose parameters have small gradients.

    ``flat, fused`` is torch's fused kernel on one parameter that holds all of them.
    """
    build, settings = OF_TORCH[optimizer]
    if contender == "ours":
        made = build_optimizer(module, name=optimizer, **OF_OURS[optimizer])
    elif contender == "torch's default":
        made = build(module.parameters(), **settings)
    else:
        made = build([nn.Parameter(flat(module))], **settings, fused=True)
    for group in made.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, 1e-3)
    return made
