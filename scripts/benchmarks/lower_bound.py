"""The least that a step of MoCo has to do, whoever writes it."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.nets import Net, Setting, head
from benchmarks.recipe import SGD
from moco.training.hardware import keep_freed_memory


def step(net: Net, setting: Setting) -> Callable[[Tensor, Tensor], None]:
    """Forward and backward of the query, forward of the key without gradient, a step of plain SGD; nothing else.

    The encoder is the bare backbone with its head. No loss, no queue, no momentum update, no shuffling, no log.
    """
    backbone = net.ours()
    return step_of(nn.Sequential(backbone, head(backbone.feature_dim)), setting)


def step_of(encoder: nn.Module, setting: Setting) -> Callable[[Tensor, Tensor], None]:
    """The same of any encoder."""
    keep_freed_memory()  # the least is without the kernel's work, too
    query_encoder = setting.placed(encoder)
    key_encoder = copy.deepcopy(query_encoder).requires_grad_(False)
    optimizer = torch.optim.SGD(query_encoder.parameters(), **SGD)

    def step(query_view: Tensor, key_view: Tensor) -> None:
        with setting.autocast():
            query = query_encoder(query_view)
            with torch.no_grad():
                key_encoder(key_view)
        optimizer.zero_grad()
        query.float().mean().backward()
        optimizer.step()

    return step
