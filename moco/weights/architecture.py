"""Which backbone and which projector the tensors of another project are of.

Names and shapes of tensors show most settings of a backbone. The file's name shows some more. The
rest has to be given, and is checked here.
"""

import functools
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moco.errors import InputError
from moco.models.backbones import BACKBONES, build_backbone, settings_of_backbone
from moco.models.swin.attention import pretrained_window_of
from moco.models.swin.backbone import MAX_WINDOW_SIZE, Swin, clipped_windows
from moco.models.vit import learned_grid_side
from moco.weights.layouts import BACKBONE_ALONE, MOCO_V3, SOLO_LEARN
from moco.weights.library_names import (
    COORDINATES,
    POSITIONS,
    Weights,
    first_of_each_stage,
    from_sequential,
    to_our_names,
)
from moco.weights.recognise import last_number

log = logging.getLogger(__name__)

# Cells. Published Swin V2s with windows up to this one were pretrained on images whose last map
# holds a whole window (8 at 256 px). With larger windows, the last map was smaller than a window.
LARGEST_WHOLE_WINDOW = 8


def fitting_backbones(weights: Weights) -> list[dict[str, Any]]:
    """Return the arguments of `build_backbone` for every backbone with these names and shapes."""
    fitting = []
    for name in BACKBONES:
        settings = {"name": name, **settings_seen(weights, name)}
        try:
            backbone = build_outline(settings)
            problem = misfit(to_our_names(weights, backbone), backbone.state_dict())
        except InputError:  # Swin V1 has no pretraining window.
            continue
        if problem is None:
            fitting.append(settings)
    return fitting


def build_outline(settings: dict[str, Any]) -> Any:
    """Return a backbone without memory for its tensors.

    Raises:
        InputError, TypeError: there is no backbone with these settings.
    """
    hashable = {}
    for key, value in settings.items():
        hashable[key] = tuple(value) if isinstance(value, list) else value
    return cached_outline(**hashable)


@functools.cache
def cached_outline(**settings: Any) -> Any:
    """Return `build_outline`'s backbone. All backbones together take a second, so they are kept."""
    with torch.device("meta"):
        return build_backbone(**settings)


def outline_of_file(settings: dict[str, Any], source: str) -> Any:
    """Return `build_outline` for the settings that a file of ours holds.

    Raises:
        InputError: there is no backbone with these settings.
    """
    try:
        return build_outline(settings)
    except (TypeError, InputError) as error:
        raise InputError(f"{source}: its settings are of no backbone ({error})") from error


def misfit(weights: Weights, expected: Weights) -> str | None:
    """Return where weights differ from a module's state dict, or None if they fit.

    The first tensor that differs is named, the others are counted.
    """
    problems = []
    for name, tensor in weights.items():
        shape = tuple(tensor.shape)
        if name in expected and shape != tuple(expected[name].shape):
            problems.append(f"{name} is {shape} and should be {tuple(expected[name].shape)}")
    for name, tensor in expected.items():
        if name not in weights:
            problems.append(f"{name} {tuple(tensor.shape)} is missing")
    for name, tensor in weights.items():
        if name not in expected:
            problems.append(f"{name} {tuple(tensor.shape)} has no counterpart")
    if not problems:
        return None
    if len(problems) == 1:
        return problems[0]
    return f"{problems[0]}, and {len(problems) - 1} more differ"


def settings_seen(weights: Weights, name: str, origin: str = "") -> dict[str, Any]:
    """Return the arguments of `build_backbone` that show in a backbone's weights.

    Args:
        weights: under any library's names.
        name: the backbone; settings that it does not have are left out.
        origin: whose weights they are, which decides how a 3x3 stem pads.
    """
    weights = from_sequential(weights)
    seen: dict[str, Any] = {}
    # A ResNet for small images has a 3x3 convolution in place of 7x7.
    if "conv1.weight" in weights and weights["conv1.weight"].shape[-1] == 3:
        seen["stem"] = "solo_cifar" if origin == SOLO_LEARN else "cifar"

    # Fixed positions of a ViT are no setting, so only learned ones are seen.
    for positions in ("pos_embed", POSITIONS):
        if positions in weights:
            side = learned_grid_side(weights[positions])
            if side is not None:
                seen["learned_positions"] = side

    tables = first_of_each_stage(weights, "relative_position_bias_table")
    if tables:
        # A table has a row for each offset, (2 * window - 1)^2 of them.
        seen["window_size"] = one_or_each([(round(len(x) ** 0.5) + 1) // 2 for x in tables])

    # Tables of coordinates also tell the windows that normalise them.
    tables = first_of_each_stage(weights, COORDINATES)
    if tables:
        windows = []
        pretrained_windows = []
        for table in tables:
            window = (table.shape[1] + 1) // 2
            pretrained = pretrained_window_of(table)
            windows.append(window)
            pretrained_windows.append(pretrained[0] if pretrained else window)
        seen["window_size"] = one_or_each(windows)
        seen["pretrained_window_size"] = one_or_each(pretrained_windows)

    known = settings_of_backbone(name)
    return {key: value for key, value in seen.items() if key in known}


def windows_in_name(file_name: str) -> dict[str, Any]:
    """Return the arguments of `build_backbone` for the windows in the name of a Swin V2's file.

    Args:
        file_name: with one of the names that timm and Microsoft give their models, such as
            ``swinv2_tiny_window16_256`` or ``swinv2_base_patch4_window12to16_192to256_22kto1k_ft``:
            the window of the pretraining, that of the fine-tuning, and the image sizes of both, px.
    """
    found = re.search(r"swinv2_[a-z]+_(?:patch4_)?window(\d+)(?:to(\d+))?_(\d+)", file_name)
    if found is None:
        return {}
    pretrained_window, last_window, image_size = found.groups()
    windows = [int(pretrained_window), int(last_window or pretrained_window)]
    if min(*windows, int(image_size)) < 1 or max(windows) > MAX_WINDOW_SIZE:
        return {}  # Neither timm nor Microsoft gave this name.
    return {
        "window_size": windows[1],
        "pretrained_window_size": list(clipped_windows(int(image_size), windows[0])),
    }


def settings_of(backbone: nn.Module, built_with: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with which `build_backbone` makes a backbone of the same windows.

    Args:
        built_with: the arguments that it was made with. Its windows may have changed since.
    """
    settings = {key: value for key, value in built_with.items() if value is not None}
    if isinstance(backbone, Swin):
        settings["window_size"] = one_or_each(backbone.window_size)
        if backbone.version == 2:
            settings["pretrained_window_size"] = one_or_each(backbone.pretrained_window_size)
            # The pretraining windows are clipped to its maps already.
            settings.pop("pretrained_image_size", None)
    return settings


def one_or_each(windows: Sequence[int]) -> int | list[int]:
    """Return the stages' windows as one number if they are all the same, else as a list."""
    if len(set(windows)) == 1:
        return windows[0]
    return list(windows)


def check_hidden_settings(
    origin: str, settings: dict[str, Any], source: str, is_pretraining_saved: bool = False
) -> None:
    """Check the settings that tensors' shapes do not show; warn of those that are probably wrong.

    Args:
        origin: the project that the weights are from.
        settings: the arguments of `build_backbone`, seen or given.
        source: the key and the path that errors begin with.
        is_pretraining_saved: tables in the file tell the pretraining windows of a Swin V2.

    Raises:
        InputError: a setting changes the features, and the file does not show it, and the user
            does not give it.
    """
    name = settings["name"]
    if name.startswith("swin_v2") and not is_pretraining_saved:
        check_pretraining_windows(settings, source)
    if name == "vit_small" and "num_heads" not in settings and origin != MOCO_V3:
        raise InputError(
            f"{source}: does not say how many heads its attention has; "
            "give backbone.num_heads: 6 in DeiT and timm, 12 in MoCo v3"
        )
    if origin == SOLO_LEARN and settings.get("stem") == "cifar":
        log.warning(
            "solo-learn pads the first convolution by 2 pixels and stem=cifar by 1, "
            "which changes the features; backbone.stem=solo_cifar keeps them"
        )
    if origin == BACKBONE_ALONE and settings.get("stem") == "cifar":
        log.info(
            "a 3x3 convolution does not show its padding: stem=cifar pads by 1 pixel; "
            "if the weights are solo-learn's give backbone.stem=solo_cifar"
        )


def check_pretraining_windows(settings: dict[str, Any], source: str) -> None:
    """Check that the settings say which windows normalise a Swin V2's coordinates.

    This is for files without tables of the coordinates, which would say it.
    A list of four is taken as it stands, and so is one window that fits the last map of usual
    pretraining images. A larger one may have been clipped to a map, which changes the features by
    some percent.

    Raises:
        InputError: no window is given, or one that may have been clipped.
    """
    if "window_size" not in settings:
        raise InputError(
            f"{source}: does not say which windows it was pretrained with; "
            "give backbone.window_size, which is 8 for timm's swinv2_..._window8_256"
        )
    pretrained = settings.get("pretrained_window_size", settings["window_size"])
    if not isinstance(pretrained, int) or "pretrained_image_size" in settings:
        return
    if pretrained > LARGEST_WHOLE_WINDOW:
        raise InputError(
            f"{source}: does not say on which images its windows of {pretrained} cells were "
            "pretrained, and windows are clipped to smaller maps; give "
            "backbone.pretrained_image_size, which is 256 for timm's swinv2_..._window16_256, and "
            "192 with backbone.pretrained_window_size=12 for swinv2_..._window12to16_192to256"
        )
    log.info(
        "%s: assuming that pretraining windows of %d cells fitted all maps; "
        "if the images were smaller give backbone.pretrained_image_size",
        source,
        pretrained,
    )


def head_settings(head: Weights) -> dict[str, Any]:
    """Return the arguments of `build_head`, without the input's width, that make such a head.

    A head that `build_head` cannot make, as one with a scale in its last BatchNorm, gets the
    settings of a similar one. `misfit` tells the difference.

    Args:
        head: the tensors under our names.
    """
    widths = []
    last_linear: float = 0
    has_bias = False
    for name, tensor in head.items():
        if name.endswith("weight") and tensor.ndim >= 2:
            widths.append(len(tensor))
            last_linear = max(last_linear, last_number(name))
            has_bias = has_bias or name.replace("weight", "bias") in head
    norms = [last_number(name) for name in head if name.endswith("running_mean")]
    return {
        "output_dim": widths[-1],
        "num_layers": len(widths),
        "hidden_dim": widths[0] if len(widths) > 1 else None,
        "hidden_batch_norm": any(number < last_linear for number in norms),
        "last_batch_norm": any(number > last_linear for number in norms),
        "bias": has_bias,
    }


@contextmanager
def source_in_errors(source: str) -> Iterator[None]:
    """Put the key and the path of a file before errors about its weights."""
    try:
        yield
    except InputError as error:
        if str(error).startswith(source):
            raise
        raise InputError(f"{source}: {error}") from error
