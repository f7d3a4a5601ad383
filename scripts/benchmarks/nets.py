"""The nets, batches and queues that steps are measured on, the same for all contenders."""

import contextlib
import dataclasses
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
    """A backbone and the batch that it sees."""

    backbone: str
    """In ``conf/backbone``."""
    image_size: int
    batch_size: int
    queue_size: int
    window_size: int | None = None
    """Of a Swin, cells: one that fits its maps without padding."""

    def config(self, *more: str) -> TrainConfig:
        """MoCo v2 with this net, all else as ``conf/`` has it, but for the overrides `more`."""
        register_schemas()
        overrides = [
            f"backbone={self.backbone}",
            "method=moco_v2",
            f"method.queue_size={self.queue_size}",
            f"data.batch_size={self.batch_size}",
            f"data.image_size={self.image_size}",
            *([f"backbone.window_size={self.window_size}"] if self.window_size else []),
        ]
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            return parse(compose("train", [*overrides, *more]), TrainConfig)

    def plain(self, *more: str) -> dict[str, Any]:
        """The same as dicts and numbers."""
        return dataclasses.asdict(self.config(*more))

    def ours(self) -> nn.Module:
        """The backbone as the method has it."""
        return build_backbone(**self.plain()["backbone"])

    def theirs(self) -> nn.Module:
        """The backbone as peers have it: torchvision's. Our ResNet is torchvision's own, but for its stems."""
        if self.window_size is None:
            return self.ours()
        backbone = torchvisions(self.window_size)
        backbone.feature_dim = 768
        return backbone


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
"""The same with batches that fill a GPU."""
TINY = {"resnet_tiny": Net("resnet_tiny", 16, 16, 64)}


def nets_of(device: torch.device, tiny: bool) -> dict[str, Net]:
    """Those that are measured there."""
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
        """A module or a tensor of four dimensions on the device, in the memory format."""
        formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
        return module.to(self.device, memory_format=formats[self.memory_format])

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def views(self, net: Net) -> list[Tensor]:
        """Two views of noise, (N, 3, H, W) each."""
        shape = (net.batch_size, 3, net.image_size, net.image_size)
        generator = torch.Generator().manual_seed(0)
        return [self.placed(torch.randn(shape, generator=generator)) for _ in range(2)]


def head(feature_dim: int) -> nn.Sequential:
    """MoCo v2's: from feature to embedding through one hidden layer."""
    return nn.Sequential(nn.Linear(feature_dim, feature_dim), nn.ReLU(), nn.Linear(feature_dim, EMBEDDING_DIM))
