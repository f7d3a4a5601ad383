"""The official MoCo, from a checkout of facebookresearch/moco: its class as it is there, its training loop retold."""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.recipe import EMBEDDING_DIM, KEY_MOMENTUM, SGD, TEMPERATURE
from moco.errors import InputError

if TYPE_CHECKING:
    from benchmarks.nets import Net, Setting

BUILDER = Path("moco", "builder.py")


def builder_of(checkout: str) -> Path:
    """The file of the class.

    Raises:
        InputError: it is not there.
    """
    path = Path(checkout) / BUILDER
    if not path.is_file():
        raise InputError(
            f"--against official={checkout}: no {BUILDER} there; expected a checkout of facebookresearch/moco"
        )
    return path


def version(checkout: str) -> str:
    """The class's file by its digest: its repository has no releases."""
    return (
        f"{BUILDER}, SHA-256 {hashlib.sha256(builder_of(checkout).read_bytes()).hexdigest()[:12]}"
    )


class WithClassifier(nn.Module):
    """A backbone and, by the name that the official class looks for, the layer behind it."""

    def __init__(self, backbone: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.fc = nn.Linear(backbone.feature_dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.backbone(images))


def model_of(checkout: str, net: Net, device: torch.device) -> Any:
    """Their class around torchvision's net; the official package's name is also ours, so it is loaded from its file."""
    spec = importlib.util.spec_from_file_location("official_moco_builder", builder_of(checkout))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    join_alone(device)

    def base_encoder(num_classes: int) -> nn.Module:
        return WithClassifier(net.theirs(), num_classes)

    return module.MoCo(
        base_encoder, EMBEDDING_DIM, net.queue_size, KEY_MOMENTUM, TEMPERATURE, mlp=True
    )


def join_alone(device: torch.device) -> None:
    """A process group of this process alone: the class gathers from all processes and shuffles over them."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(leave)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def step(
    checkout: str, net: Net, setting: Setting, with_accuracy: bool
) -> Callable[[Tensor, Tensor], None]:
    """One step as their ``main_moco.py`` takes it.

    Args:
        with_accuracy: also how often the positive is among the first and the first five, and the loss as a number, which
            their script works out in every step.
    """
    model = setting.placed(model_of(checkout, net, setting.device))
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)

    def step(query_view: Tensor, key_view: Tensor) -> None:
        with on(setting.device), setting.autocast():
            logits, targets = model(im_q=query_view, im_k=key_view)
            loss = criterion(logits, targets)
        if with_accuracy:
            loss.item()
            is_right = logits.topk(5).indices == targets[:, None]
            is_right[:, :1].sum(), is_right.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def on(device: torch.device) -> Any:
    """On a CPU ``tensor.cuda()``, which the class calls, leaves the tensor where it is."""
    return mock.patch.object(
        torch.Tensor, "cuda", torch.Tensor.cuda if device.type == "cuda" else lambda tensor: tensor
    )


def momentum_update(checkout: str, net: Net, device: torch.device) -> Callable[[], None]:
    """Their update of the key encoder."""
    return model_of(checkout, net, device).to(device)._momentum_update_key_encoder
