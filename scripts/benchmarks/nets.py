"""The nets, batch sizes and queue sizes of the benchmarks, the same for all contenders."""

import contextlib
import copy
import dataclasses
import functools
from typing import Any

import torch
from bench_swin import torchvisions
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from benchmarks.recipe import EMBEDDING_DIM
from moco.config.parsing import CONFIG_DIR, parse, register_schemas
from moco.config.train import TrainConfig
from moco.models.backbones import build_backbone


@dataclasses.dataclass(frozen=True)
class Net:
    """A backbone, its batch and its queue."""

    backbone: str
    """A name in ``conf/backbone``."""
    image_size: int
    batch_size: int
    queue_size: int
    window_size: int | None = None
    """The window of a Swin, in cells. It should fit the feature maps without padding."""
    partial_patches: str | None = None
    """For a Swin. ``drop`` ignores the last pixels if the image is not a multiple of the patch, as
    torchvision does."""

    @property
    def has_batch_norm(self) -> bool:
        return self.backbone.startswith("resnet")

    def config(self, *more: str) -> TrainConfig:
        """Return the config of MoCo v2 with this net, with the defaults of ``conf/``.

        Args:
            more: further overrides.
        """
        register_schemas()
        overrides = [
            f"backbone={self.backbone}",
            "method=moco_v2",
            f"method.queue_size={self.queue_size}",
            f"data.batch_size={self.batch_size}",
            f"data.image_size={self.image_size}",
        ]
        if self.window_size:
            overrides.append(f"backbone.window_size={self.window_size}")
        if self.partial_patches:
            overrides.append(f"backbone.partial_patches={self.partial_patches}")
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            return parse(compose("train", [*overrides, *more]), TrainConfig)

    def plain(self, *more: str) -> dict[str, Any]:
        """Return the config as nested dicts."""
        return copy.deepcopy(plain_config(self, more))

    def ours(self) -> nn.Module:
        """Return this project's backbone."""
        return build_backbone(**self.plain()["backbone"])

    def theirs(self) -> nn.Module:
        """Return torchvision's backbone, which the peers use.

        Our ResNets are those of torchvision, except for their stems.
        """
        if self.window_size is None:
            return self.ours()
        backbone = torchvisions(self.window_size, self.backbone)
        backbone.feature_dim = backbone.norm.normalized_shape[0]
        return backbone


@functools.cache
def plain_config(net: Net, more: tuple[str, ...]) -> dict[str, Any]:
    """Return the config of `Net.plain` from a cache.

    Each contender asks for it, and composing takes longer than the steps of a tiny net.
    """
    return dataclasses.asdict(net.config(*more))


NETS = {
    "resnet18 K 4096": Net("resnet18_cifar", 32, 256, 4096),
    "resnet18 K 65536": Net("resnet18_cifar", 32, 256, 65536),
    "resnet50": Net("resnet50", 224, 16, 65536),
    "swin_v2_t": Net("swin_v2_t", 256, 8, 65536, window_size=8),
}
ON_A_GPU = {
    "resnet18 K 4096": Net("resnet18_cifar", 32, 512, 4096),
    "resnet18 K 65536": Net("resnet18_cifar", 32, 512, 65536),
    "resnet50": Net("resnet50", 224, 64, 65536),
    "swin_v2_t": Net("swin_v2_t", 256, 32, 65536, window_size=8),
}
"""The same nets with batches that fill a GPU."""
TINY = {"resnet_tiny": Net("resnet_tiny", 16, 16, 64)}
GPU_CHECK = {
    "ResNet-18, 32 px, batch 512": Net("resnet18_cifar", 32, 512, 4096),
    "ResNet-50, 224 px, batch 64": Net("resnet50", 224, 64, 65536),
    "ViT-S, 224 px, batch 64": Net("vit_small", 224, 64, 65536),
    "Swin V2-T, 224 px, window 7, batch 64": Net("swin_v2_t", 224, 64, 65536, 7, "drop"),
    "Swin V2-T, 565 px, window 18, batch 8": Net("swin_v2_t", 565, 8, 65536, 18, "drop"),
}
"""The nets of `gpu_check.py`, by the names in its table."""
TINY_GPU_CHECK = {
    "tiny ResNet, 16 px, batch 8": Net("resnet_tiny", 16, 8, 64),
    "tiny ResNet, 24 px, batch 8": Net("resnet_tiny", 24, 8, 64),
    "tiny ViT, 16 px, batch 8": Net("vit_tiny_patch4", 16, 8, 64),
    "tiny Swin V2, 16 px, window 4, batch 8": Net("swin_v2_tiny_patch2", 16, 8, 64, 4, "drop"),
    "tiny Swin V2, 19 px, window 3, batch 8": Net("swin_v2_tiny_patch2", 19, 8, 64, 3, "drop"),
}
"""The nets of its rehearsal on a CPU."""


def nets_of(device: torch.device, tiny: bool) -> dict[str, Net]:
    """Return the nets that are measured on a device."""
    if tiny:
        return TINY
    return ON_A_GPU if device.type == "cuda" else NETS


@dataclasses.dataclass(frozen=True)
class Setting:
    """Device, precision and memory format of a step."""

    device: torch.device
    precision: str = "fp32"
    """``fp32`` or ``bf16`` (autocast)."""
    memory_format: str = "contiguous"
    """``contiguous`` or ``channels_last``."""

    def placed(self, module: Any) -> Any:
        """Move a module or a tensor of four dimensions to the device, in the memory format."""
        formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
        return module.to(self.device, memory_format=formats[self.memory_format])

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def views(self, net: Net) -> list[Tensor]:
        """Return two views of noise, (batch, 3, height, width) each."""
        shape = (net.batch_size, 3, net.image_size, net.image_size)
        generator = torch.Generator().manual_seed(0)
        return [self.placed(torch.randn(shape, generator=generator)) for _ in range(2)]


def head(feature_dim: int) -> nn.Sequential:
    """Return MoCo v2's head, from feature to embedding through one hidden layer."""
    return nn.Sequential(
        nn.Linear(feature_dim, feature_dim), nn.ReLU(), nn.Linear(feature_dim, EMBEDDING_DIM)
    )
