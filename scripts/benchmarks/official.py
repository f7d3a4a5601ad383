"""The official MoCo, from a checkout of facebookresearch/moco.

Its class is used unchanged. Its training loop is written again here.
"""

from __future__ import annotations

import atexit
import contextlib
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
    """Return the path of the file with the class.

    Raises:
        InputError: there is no such file.
    """
    path = Path(checkout) / BUILDER
    if not path.is_file():
        raise InputError(
            f"--against official={checkout}: no {BUILDER} there; "
            "expected a checkout of facebookresearch/moco"
        )
    return path


def version(checkout: str) -> str:
    """Return the digest of the file with the class, because the repository has no releases."""
    digest = hashlib.sha256(builder_of(checkout).read_bytes()).hexdigest()
    return f"{BUILDER}, SHA-256 {digest[:12]}"


class WithClassifier(nn.Module):
    """A backbone and a last layer, named ``fc`` as the official class expects."""

    def __init__(self, backbone: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.fc = nn.Linear(backbone.feature_dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.backbone(images))


def model_of(checkout: str, net: Net, device: torch.device) -> Any:
    """Return the official class around torchvision's net.

    It is loaded from its file, because the official package has the same name as ours.
    """
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
    """Join a process group that has only this process.

    The official class gathers from all processes and shuffles between them.
    """
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
    """Return one step of the official ``main_moco.py``.

    Args:
        with_accuracy: also compute the top-1 and top-5 accuracy and read the loss, as that script
            does in every step.
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
    """Let ``tensor.cuda()``, which the class calls, do nothing on a CPU."""
    if device.type == "cuda":
        return contextlib.nullcontext()
    return mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor)


def momentum_update(checkout: str, net: Net, device: torch.device) -> Callable[[], None]:
    """Return the official update of the key encoder."""
    return model_of(checkout, net, device).to(device)._momentum_update_key_encoder
