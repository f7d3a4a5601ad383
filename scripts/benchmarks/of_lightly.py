"""Lightly's MoCo, from the parts of the installed package.

They are put together as in the PyTorch example of its documentation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from benchmarks.recipe import EMBEDDING_DIM, KEY_MOMENTUM, SGD, TEMPERATURE

if TYPE_CHECKING:
    from benchmarks.nets import Net, Setting


def step(net: Net, setting: Setting) -> Callable[[Tensor, Tensor], None]:
    """Return one step of the example's loop.

    It does not shuffle. The momentum update comes first, and the loss owns the memory bank.
    """
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    backbone = setting.placed(net.theirs())
    width = backbone.feature_dim
    projection_head = MoCoProjectionHead(width, width, EMBEDDING_DIM).to(setting.device)
    online = nn.ModuleList([backbone, projection_head])
    averaged = copy.deepcopy(online)
    deactivate_requires_grad(averaged)
    criterion = loss(net.queue_size, EMBEDDING_DIM, TEMPERATURE).to(setting.device)
    optimizer = torch.optim.SGD(online.parameters(), **SGD)

    def step(query_view: Tensor, key_view: Tensor) -> None:
        for module, its_average in zip(online, averaged, strict=True):
            update_momentum(module, its_average, m=KEY_MOMENTUM)
        with setting.autocast():
            query = projection_head(backbone(query_view).flatten(start_dim=1))
            key = averaged[1](averaged[0](key_view).flatten(start_dim=1)).detach()
            value = criterion(query, key)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def loss(queue_size: int, embedding_dim: int, temperature: float) -> nn.Module:
    """Return lightly's loss of queries and keys.

    It also normalises both and adds the keys to its memory bank.
    """
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature, memory_bank_size=(queue_size, embedding_dim))


def momentum_update(query_encoder: nn.Module, key_encoder: nn.Module) -> Callable[[], None]:
    """Return lightly's update of the key encoder."""
    from lightly.models.utils import update_momentum

    return lambda: update_momentum(query_encoder, key_encoder, m=KEY_MOMENTUM)
