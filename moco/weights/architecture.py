"""Which backbone the tensors of another project are of.

Names and shapes of tensors show most settings of a backbone. The rest has to be given, and is
checked here.
"""

import functools
import json
import logging
from typing import Any

import torch
from torch import nn

from moco.errors import InputError
from moco.models.backbones import (
    BACKBONES,
    CUSTOM,
    build_backbone,
    settings_of_backbone,
    switches_of_swin,
)
from moco.models.swin.backbone import SWITCHES, Swin, one_or_each
from moco.models.vit import learned_grid_side
from moco.targets import GIVEN
from moco.weights.library_names import (
    COORDINATES,
    POSITIONS,
    Weights,
    first_of_each_stage,
    from_sequential,
    pretrained_windows,
    switches_seen,
    to_our_names,
)
from moco.weights.other_projects import BACKBONE_ALONE, MOCO_V3, SOLO_LEARN

log = logging.getLogger(__name__)

# Cells. Published Swin V2s with windows up to this one were pretrained on images whose last map
# holds a whole window (8 at 256 px). With larger windows, the last map was smaller than a window.
LARGEST_WHOLE_WINDOW = 8
# The weights of the convolution that reads the images, under the names of all libraries.
STEMS = (
    "conv1.weight",
    "conv_proj.weight",
    "features.0.0.weight",
    "patch_embed.proj.weight",
)
RGB_BANDS = 3


def complete_settings(weights: Weights, origin: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `build_backbone` for a backbone of another project.

    What the tensors show counts most for a window, which can be changed after loading. What the
    user gives counts most for all other settings.

    Args:
        weights: the backbone's, under any library's names.
        origin: the project that the weights are from.
        given: the arguments that the user gave.

    Raises:
        InputError: no backbone fits or several do, or a setting is neither shown nor given.
    """
    if given.get("name"):
        start = {"name": given["name"]}
    else:
        start = recognised_backbone(weights)
    seen = settings_seen(weights, start["name"], origin)
    if switches_of_swin(start | given).get("position_bias") == "table":
        # A table has no pretraining window. `to_our_names` says that these weights have an MLP.
        seen.pop("pretrained_window_size", None)
    settings = start | seen | given
    if "window_size" in seen:
        settings["window_size"] = seen["window_size"]
    check_hidden_settings(origin, settings, "pretrained_window_size" in seen)
    return settings


def recognised_backbone(weights: Weights) -> dict[str, Any]:
    """Return the name of the one backbone that the weights fit, and its switches if it is a Swin.

    Raises:
        InputError: no backbone or several backbones fit.
    """
    fitting = fitting_backbones(weights)
    if len(fitting) != 1:
        fit = " and ".join(fitting) or "no backbone"
        raise InputError(f"its tensors' shapes fit {fit}; give backbone=NAME")
    name = fitting[0]
    recognised = {"name": name} | unusual_switches(weights, name)
    log.info("backbone=%s, recognised by its tensors' shapes", described(recognised))
    return recognised


def fitting_backbones(weights: Weights) -> list[str]:
    """Return every backbone that has tensors of these names and shapes.

    Every Swin could have two names, because each version takes every switch. The name of the nearer
    version is returned.
    """
    switches = {}
    fewest = len(SWITCHES)
    for name in BACKBONES:
        switches[name] = unusual_switches(weights, name)
        if switches_of_swin({"name": name}):
            fewest = min(fewest, len(switches[name]))
    fitting = []
    for name in BACKBONES:
        if len(switches[name]) > fewest:
            continue
        settings = {"name": name} | switches[name] | settings_seen(weights, name)
        try:
            backbone = build_outline(settings)
            problem = misfit(to_our_names(weights, backbone), backbone.state_dict())
        except InputError:  # other windows or positions
            continue
        if problem is None:
            fitting.append(name)
    return fitting


def unusual_switches(weights: Weights, name: str) -> dict[str, str]:
    """Return the switches of a Swin that show in its weights and that its name does not have."""
    usual = switches_of_swin({"name": name})
    unusual = {}
    for key, value in switches_seen(weights).items():
        if key in usual and usual[key] != value:
            unusual[key] = value
    return unusual


def build_outline(settings: dict[str, Any]) -> Any:
    """Return a backbone without memory for its tensors; nothing is downloaded or imported.

    The settings may be of a file that nobody trusts, so a custom backbone and one that was given as
    a module are None.

    Raises:
        InputError: there is no backbone with these settings.
    """
    if settings.get("name") in (CUSTOM, GIVEN):
        return None
    if settings.get("pretrained"):
        settings = settings | {"pretrained": False}
    try:
        # As text, because a cache takes no lists as arguments.
        return cached_outline(json.dumps(settings))
    except (TypeError, InputError) as error:
        raise InputError(f"its settings are of no backbone ({error})") from error


@functools.cache
def cached_outline(settings: str) -> Any:
    """Return `build_outline`'s backbone. All backbones together take a second, so they are kept."""
    with torch.device("meta"):
        return build_backbone(**json.loads(settings))


def misfit(weights: Weights, expected: Weights) -> str | None:
    """Return where weights differ from a module's state dict, or None if they fit.

    The first tensor that differs is named, the others are counted.
    """
    problems = []
    for name, tensor in (expected | weights).items():
        shape = tuple(tensor.shape)
        if name not in weights:
            problems.append(f"{name} {shape} is missing")
        elif name not in expected:
            problems.append(f"{name} {shape} has no counterpart")
        elif tensor.shape != expected[name].shape:
            problems.append(f"{name} is {shape} and should be {tuple(expected[name].shape)}")
    if len(problems) > 1:
        return f"{problems[0]}, and {len(problems) - 1} more differ"
    if problems:
        return problems[0]
    return None


def load_fitting(module: nn.Module, weights: Weights, complaint: str) -> None:
    """Load weights into a module.

    Args:
        complaint: what the error begins with.

    Raises:
        InputError: they do not fit.
    """
    problem = misfit(weights, module.state_dict())
    if problem is not None:
        raise InputError(f"{complaint}: {problem}")
    module.load_state_dict(weights)


def settings_seen(weights: Weights, name: str, origin: str = "") -> dict[str, Any]:
    """Return the arguments of `build_backbone` that show in a backbone's weights.

    Args:
        weights: under any library's names.
        name: the backbone; settings that it does not have are left out.
        origin: whose weights they are, which decides how a 3x3 stem pads.
    """
    if name not in BACKBONES:
        return {}  # the names of a network of timm's or the user's mean other things
    weights = from_sequential(weights)
    seen: dict[str, Any] = {}
    # A ResNet for small images has a 3x3 convolution in place of 7x7.
    if "conv1.weight" in weights and weights["conv1.weight"].shape[-1] == 3:
        seen["stem"] = "cifar"
        if origin == SOLO_LEARN:
            seen["stem"] = "solo_cifar"

    for stem in STEMS:
        if stem in weights and weights[stem].ndim == 4:
            bands = weights[stem].shape[1]  # (channels, bands, height, width)
            if bands != RGB_BANDS:
                seen["in_channels"] = int(bands)

    # Fixed positions of a ViT are no setting, so only learned ones are seen.
    for positions in ("pos_embed", POSITIONS):
        if positions in weights:
            side = learned_grid_side(weights[positions])
            if side is not None:
                seen["learned_positions"] = side

    tables = first_of_each_stage(weights, "relative_position_bias_table")
    if tables:
        windows = []
        for table in tables:
            # A table has a row for each offset, (2 * window - 1)^2 of them.
            side = round(len(table) ** 0.5)
            windows.append((side + 1) // 2)
        seen["window_size"] = one_or_each(windows)

    # Tables of coordinates also tell the windows that normalise them.
    tables = first_of_each_stage(weights, COORDINATES)
    if tables:
        # (1, 2 * window - 1, 2 * window - 1, 2) each.
        windows = [(table.shape[1] + 1) // 2 for table in tables]
        seen["window_size"] = one_or_each(windows)
        seen["pretrained_window_size"] = one_or_each(pretrained_windows(tables, windows))

    for key in seen.keys() - settings_of_backbone(name):
        del seen[key]
    return seen


def settings_of(backbone: nn.Module, built_with: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with which `build_backbone` makes a backbone of the same windows.

    Args:
        built_with: the arguments that it was made with. Its windows may have changed since.
    """
    settings = without_none(built_with)
    if isinstance(backbone, Swin):
        settings["window_size"] = one_or_each(backbone.window_size)
        if backbone.switches["position_bias"] != "table":
            settings["pretrained_window_size"] = one_or_each(backbone.pretrained_window_size)
            # The pretraining windows are clipped to its maps already.
            settings.pop("pretrained_image_size", None)
    return settings


def without_none(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that are given; None stands for one that is not."""
    given = {}
    for key, value in settings.items():
        if value is not None:
            given[key] = value
    return given


def described(settings: dict[str, Any]) -> str:
    """Return a backbone's name and its settings for one line."""
    shown = []
    for key, value in settings.items():
        if key != "name":
            shown.append(f"{key} {value}")
    if not shown:
        return settings["name"]
    return f"{settings['name']} ({', '.join(shown)})"


def check_hidden_settings(origin: str, settings: dict[str, Any], are_windows_saved: bool) -> None:
    """Check the settings that tensors' shapes do not show; warn of those that are probably wrong.

    Args:
        origin: the project that the weights are from.
        settings: the arguments of `build_backbone`, seen or given.
        are_windows_saved: tables in the file tell the pretraining windows of a Swin.

    Raises:
        InputError: a setting changes the features, and neither file nor user say it.
    """
    name = settings["name"]
    has_coordinates = switches_of_swin(settings).get("position_bias", "table") != "table"
    if has_coordinates and not are_windows_saved:
        check_pretraining_windows(settings)
    if name == "vit_small" and "num_heads" not in settings and origin != MOCO_V3:
        raise InputError(
            "does not say how many heads its attention has; "
            "give backbone.num_heads: 6 in DeiT and timm, 12 in MoCo v3"
        )
    if settings.get("stem") == "cifar" and origin in (SOLO_LEARN, BACKBONE_ALONE):
        log.warning(
            "solo-learn pads the first convolution by 2 pixels and stem=cifar by 1, which changes "
            "the features; if the weights are solo-learn's give backbone.stem=solo_cifar"
        )


def check_pretraining_windows(settings: dict[str, Any]) -> None:
    """Check that the settings say which windows normalise a Swin's coordinates.

    This is for files without tables of the coordinates, which would say it.
    A list of four is taken as it stands, and so is one window that fits the last map of usual
    pretraining images. A larger one may have been clipped to a map, which changes the features by
    some percent.

    Raises:
        InputError: no window is given, or one that may have been clipped.
    """
    if "window_size" not in settings:
        raise InputError(
            "does not say which windows it was pretrained with; "
            "give backbone.window_size, which is 8 for timm's swinv2_..._window8_256"
        )
    pretrained = settings.get("pretrained_window_size", settings["window_size"])
    if not isinstance(pretrained, int) or "pretrained_image_size" in settings:
        return
    if pretrained > LARGEST_WHOLE_WINDOW:
        raise InputError(
            f"does not say on which images its windows of {pretrained} cells were "
            "pretrained, and windows are clipped to smaller maps; give "
            "backbone.pretrained_image_size, which is 256 for timm's swinv2_..._window16_256, and "
            "192 with backbone.pretrained_window_size=12 for swinv2_..._window12to16_192to256"
        )
    log.info(
        "assuming that pretraining windows of %d cells fitted all maps; "
        "if the images were smaller give backbone.pretrained_image_size",
        pretrained,
    )
