"""Lightly's MoCo: the parts of the installed package, put together as its documentation's example for PyTorch does."""

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
    """One step of the example's loop: no shuffling, the momentum update before it, the loss with its memory bank."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    backbone = setting.placed(net.theirs())
    width = backbone.feature_dim
    projection_head = MoCoProjectionHead(width, width, EMBEDDING_DIM).to(setting.device)
    online = nn.ModuleList([backbone, projection_head])
    averaged = copy.deepcopy(online)
    deactivate_requires_grad(averaged)
    criterion = NTXentLoss(TEMPERATURE, memory_bank_size=(net.queue_size, EMBEDDING_DIM)).to(
        setting.device
    )
    optimizer = torch.optim.SGD(online.parameters(), **SGD)

    def step(query_view: Tensor, key_view: Tensor) -> None:
        for module, its_average in zip(online, averaged, strict=True):
            update_momentum(module, its_average, m=KEY_MOMENTUM)
        with setting.autocast():
            query = projection_head(backbone(query_view).flatten(start_dim=1))
            key = averaged[1](averaged[0](key_view).flatten(start_dim=1)).detach()
            loss = criterion(query, key)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def loss(
    queue_size: int, embedding_dim: int, temperature: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """Their loss of a batch of queries and keys, which also normalises both and takes the keys into its memory bank."""
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature, memory_bank_size=(queue_size, embedding_dim))


def momentum_update(query_encoder: nn.Module, key_encoder: nn.Module) -> Callable[[], None]:
    """Their update of the key encoder."""
    from lightly.models.utils import update_momentum

    return lambda: update_momentum(query_encoder, key_encoder, m=KEY_MOMENTUM)
