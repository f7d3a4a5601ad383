"""All backbones by name. `moco.models.contract` says what they have in common."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from moco.errors import InputError, unknown_name
from moco.models.resnet import ResNet
from moco.models.swin.backbone import Swin
from moco.models.vit import VisionTransformer

# Channels of the first stage, blocks of each stage, attention heads of each stage.
SWIN_TINY = (32, (2, 2, 2, 2), (1, 2, 4, 8))
SWIN_T = (96, (2, 2, 6, 2), (3, 6, 12, 24))
SWIN_S = (96, (2, 2, 18, 2), (3, 6, 12, 24))
SWIN_B = (128, (2, 2, 18, 2), (4, 8, 16, 32))

# A partial fixes what it gives by position. What it gives by keyword is a default for users.
BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "resnet_tiny": partial(ResNet, BasicBlock, (1, 1, 1, 1), width=16),
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(ResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
    "resnet101": partial(ResNet, Bottleneck, (3, 4, 23, 3)),
    "resnet152": partial(ResNet, Bottleneck, (3, 8, 36, 3)),
    "wide_resnet50_2": partial(ResNet, Bottleneck, (3, 4, 6, 3), width_per_group=128),
    "swin_tiny_patch2": partial(Swin, 1, *SWIN_TINY, patch_size=2, window_size=4),
    "swin_t": partial(Swin, 1, *SWIN_T),
    "swin_s": partial(Swin, 1, *SWIN_S),
    "swin_b": partial(Swin, 1, *SWIN_B),
    "swin_v2_tiny_patch2": partial(Swin, 2, *SWIN_TINY, patch_size=2, window_size=4),
    "swin_v2_t": partial(Swin, 2, *SWIN_T),
    "swin_v2_s": partial(Swin, 2, *SWIN_S),
    "swin_v2_b": partial(Swin, 2, *SWIN_B),
    "vit_tiny_patch4": partial(VisionTransformer, 4, 64, 4, num_heads=4),
    "vit_small": partial(VisionTransformer, 16, 384, 12, num_heads=12),
    "vit_b_16": partial(VisionTransformer, 16, 768, 12, num_heads=12),
}


def settings_of_backbone(name: str) -> list[str]:
    """Return the keyword arguments that `build_backbone` takes for a backbone.

    The list is empty if there is no such backbone.
    """
    if name not in BACKBONES:
        return []
    settings = []
    for key, parameter in inspect.signature(BACKBONES[name]).parameters.items():
        if parameter.kind == parameter.KEYWORD_ONLY:
            settings.append(key)
    return settings


def build_backbone(name: str, **settings: Any) -> Any:
    """Build a freshly initialised backbone.

    Args:
        name: one of `BACKBONES`.
        settings: keyword arguments of the backbone. A setting that is None keeps its default.

    Raises:
        InputError: no backbone has that name, or the backbone has no such setting.
    """
    if name not in BACKBONES:
        raise InputError(f"backbone.name: {unknown_name('backbone', name, BACKBONES)}")
    known = settings_of_backbone(name)
    given = {}
    for key, value in settings.items():
        if value is None:
            continue
        if key not in known:
            raise InputError(
                f"backbone.{key}={value}: {name} has no such setting (it has {', '.join(known)})"
            )
        given[key] = value
    return BACKBONES[name](**given)
