"""The least work of a MoCo step, in any implementation."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.nets import Net, Setting, head
from benchmarks.recipe import SGD
from moco.training.hardware import keep_freed_memory


def step(net: Net, setting: Setting) -> Callable[[Tensor, Tensor], None]:
    """Return a step that is a lower bound for all contenders.

    It is a forward and backward pass of the queries, a forward pass of the keys without gradient,
    and a step of SGD. The encoder is the backbone with its head. There is no loss, queue, momentum
    update, shuffling or log.
    """
    backbone = net.ours()
    return step_of(nn.Sequential(backbone, head(backbone.feature_dim)), setting)


def step_of(encoder: nn.Module, setting: Setting) -> Callable[[Tensor, Tensor], None]:
    """Return the same step of any encoder."""
    keep_freed_memory()  # `moco.train` does so, too
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
