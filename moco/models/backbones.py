"""All backbones by name. `moco.models.contract` says what they have in common."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from moco.errors import InputError, unknown_name
from moco.models.contract import check_contract
from moco.models.resnet import ResNet
from moco.models.swin.backbone import SWITCHES, Swin
from moco.models.timm_backbone import TimmBackbone
from moco.models.vit import VisionTransformer
from moco.targets import GIVEN, call_target, check_options, import_target

# Channels of the first stage, blocks of each stage, attention heads of each stage.
SWIN_TINY = (32, (2, 2, 2, 2), (1, 2, 4, 8))
SWIN_T = (96, (2, 2, 6, 2), (3, 6, 12, 24))
SWIN_S = (96, (2, 2, 18, 2), (3, 6, 12, 24))
SWIN_B = (128, (2, 2, 18, 2), (4, 8, 16, 32))
SWIN_V1: dict[str, Any] = {"norm": "pre", "attention": "dot", "position_bias": "table"}
SWIN_V2: dict[str, Any] = {"norm": "res_post", "attention": "cosine", "position_bias": "log_cpb"}

# A partial fixes what it gives by position. What it gives by keyword is a default for users.
BACKBONES: dict[str, partial[Any]] = {
    "resnet_tiny": partial(ResNet, BasicBlock, (1, 1, 1, 1), width=16),
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet18_half": partial(ResNet, BasicBlock, (2, 2, 2, 2), width=32),
    "resnet34": partial(ResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
    "resnet101": partial(ResNet, Bottleneck, (3, 4, 23, 3)),
    "resnet152": partial(ResNet, Bottleneck, (3, 8, 36, 3)),
    "wide_resnet50_2": partial(ResNet, Bottleneck, (3, 4, 6, 3), width_per_group=128),
    "swin_tiny_patch2": partial(Swin, *SWIN_TINY, patch_size=2, window_size=4, **SWIN_V1),
    "swin_tiny_patch4": partial(Swin, *SWIN_TINY, **SWIN_V1),
    "swin_t": partial(Swin, *SWIN_T, **SWIN_V1),
    "swin_s": partial(Swin, *SWIN_S, **SWIN_V1),
    "swin_b": partial(Swin, *SWIN_B, **SWIN_V1),
    "swin_v2_tiny_patch2": partial(Swin, *SWIN_TINY, patch_size=2, window_size=4, **SWIN_V2),
    "swin_v2_tiny_patch4": partial(Swin, *SWIN_TINY, **SWIN_V2),
    "swin_v2_t": partial(Swin, *SWIN_T, **SWIN_V2),
    "swin_v2_s": partial(Swin, *SWIN_S, **SWIN_V2),
    "swin_v2_b": partial(Swin, *SWIN_B, **SWIN_V2),
    "vit_tiny_patch4": partial(VisionTransformer, 4, 64, 4, num_heads=4),
    "vit_small": partial(VisionTransformer, 16, 384, 12, num_heads=12),
    "vit_b_16": partial(VisionTransformer, 16, 768, 12, num_heads=12),
}


def custom_backbone(
    *,
    target: str,
    options: dict[str, Any] | None = None,
    image_size: int | None = None,
    in_channels: int = 3,
) -> Any:
    """Return what a function of the user returns.

    Args:
        target: ``package.module:function``.
        options: its keyword arguments.
        image_size: side of the images on which `build_backbone` checks it, px.
        in_channels: bands of the images. The function gets it if it has such an argument.

    Raises:
        InputError: there is no such function, or it takes no such options.
    """
    build = import_target(target, "backbone.target")
    return call_target(target, with_bands(build, options, in_channels), "backbone")


def with_bands(
    build: Callable[..., Any], options: dict[str, Any] | None, in_channels: int
) -> dict[str, Any]:
    """Return the options of a user's function, with the number of bands if it takes that."""
    options = dict(options or {})
    if "in_channels" in inspect.signature(build).parameters:
        options.setdefault("in_channels", in_channels)
    return options


CUSTOM = "custom"
# These need other settings to say which network they are.
OPEN_BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "timm": TimmBackbone,
    CUSTOM: custom_backbone,
}
# Added by `register_backbone`.
REGISTERED: dict[str, Callable[..., nn.Module]] = {}
CHECKED_SIZE = 64
"""Side of the images on which a backbone of the user's is checked, px, if no size is given."""


def register_backbone(name: str, build: Callable[..., nn.Module]) -> None:
    """Make a function known as ``backbone=name``.

    A checkpoint holds the name alone, so the function has to be registered before it is loaded.

    Args:
        name: not that of a backbone of this project.
        build: takes the settings that `BackboneConfig.options` holds, and ``in_channels`` if it
            has such an argument. Returns the backbone.

    Raises:
        InputError: this project has a backbone of that name.

    Example:
        >>> import moco
        >>> moco.register_backbone("my_net", lambda width=64: MyNet(width))
        >>> backbone = moco.build_backbone("my_net", options={"width": 32})
    """
    if name in BACKBONES or name in OPEN_BACKBONES:
        raise InputError(f"backbone={name}: this project has a backbone of that name")

    def registered(
        *,
        options: dict[str, Any] | None = None,
        image_size: int | None = None,
        in_channels: int = 3,
    ) -> nn.Module:
        given = with_bands(build, options, in_channels)
        check_options(build, given, "backbone", name)
        return build(**given)

    REGISTERED[name] = registered


def builders() -> dict[str, Callable[..., nn.Module]]:
    """Return the function that builds each backbone, by name."""
    return {**BACKBONES, **OPEN_BACKBONES, **REGISTERED}


def settings_of_backbone(name: str) -> list[str]:
    """Return the keyword arguments that `build_backbone` takes for a backbone.

    The list is empty if there is no such backbone.
    """
    known = builders()
    if name not in known:
        return []
    settings = []
    for key, parameter in inspect.signature(known[name]).parameters.items():
        if parameter.kind == parameter.KEYWORD_ONLY:
            settings.append(key)
    return settings


def switches_of_swin(settings: dict[str, Any]) -> dict[str, str]:
    """Return a Swin's ``norm``, ``attention`` and ``position_bias``; {} for other backbones.

    Args:
        settings: the arguments of `build_backbone`.
    """
    build = BACKBONES.get(settings["name"])
    if build is None or build.func is not Swin:
        return {}
    switches = {}
    for key in SWITCHES:
        switches[key] = settings.get(key) or build.keywords[key]
    return switches


def is_as_large(build: partial[Any], other: partial[Any]) -> bool:
    """Return whether two named Swins have the same channels, blocks, heads and patches."""
    same_patches = build.keywords.get("patch_size") == other.keywords.get("patch_size")
    return build.args == other.args and same_patches


def usual_name(settings: dict[str, Any]) -> str:
    """Return the name that a backbone has without any of its switches, or else its own name.

    A swin_t with all three changes of Swin V2 is a swin_v2_t.

    Args:
        settings: the arguments of `build_backbone`.
    """
    name = settings["name"]
    switches = switches_of_swin(settings)
    if switches:
        for other, build in BACKBONES.items():
            is_swin = build.func is Swin and is_as_large(build, BACKBONES[name])
            if is_swin and switches_of_swin({"name": other}) == switches:
                return other
    return name


def build_backbone(name: str, **settings: Any) -> Any:
    """Build a freshly initialised backbone.

    Args:
        name: one of `BACKBONES`, ``timm:MODEL`` for a network of timm, ``custom`` with the setting
            ``target``, or a name of `register_backbone`.
        settings: keyword arguments of the backbone. A setting that is None keeps its default.

    Raises:
        InputError: no backbone has that name, the backbone has no such setting, or one of timm or
            of the user does not keep the contract.

    Example:
        >>> backbone = build_backbone("timm:convnext_tiny")
        >>> backbone(torch.zeros(2, 3, 224, 224)).shape
        torch.Size([2, 768])
    """
    if name == GIVEN:
        raise InputError(
            f"the backbone was given as a module, a {settings.get('target')}; give one again: "
            "moco.load_encoder(path, backbone=module), or backbone=custom "
            "backbone.target=package.module:function"
        )
    if name.startswith("timm:"):
        name, settings["model"] = name.split(":", 1)
    known_names = builders()
    if name not in known_names:
        raise InputError(f"backbone.name: {unknown_name('backbone', name, known_names)}")
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
    for key, missing in (("model", "timm"), ("target", CUSTOM)):
        if name == missing and key not in given:
            raise InputError(f"backbone.{key}: missing; backbone={name} needs it")
    if not isinstance(given.get("options", {}), dict):
        raise InputError(f"backbone.options={given['options']}: expected {{name: value}}")
    backbone = known_names[name](**given)
    if name in BACKBONES:
        return backbone
    label = f"backbone={name}"
    for key in ("model", "target"):
        if key in given:
            label = f"backbone.{key}={given[key]}"
    image_size = given.get("image_size", CHECKED_SIZE)
    return check_contract(backbone, label, image_size, given.get("in_channels", 3))
