"""Load an encoder from any file of weights, for the programs that begin with one."""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from moco.errors import InputError
from moco.methods.moco import MoCo
from moco.models.backbones import CUSTOM, build_backbone
from moco.models.encoder import Encoder, is_channels_last
from moco.models.heads import build_head
from moco.models.swin.backbone import SWITCHES, Swin
from moco.models.swin.window_change import rewindow, suggest_window
from moco.targets import GIVEN, check_named
from moco.weights.architecture import (
    build_outline,
    cached_outline,
    complete_settings,
    described,
    load_fitting,
    settings_of,
)
from moco.weights.inflation import check_bands, widen_stem
from moco.weights.library_names import Weights, to_our_names
from moco.weights.other_projects import BACKBONE, METHOD_PARTS
from moco.weights.weight_files import (
    WeightFile,
    last_number,
    listed_parts,
    log_unused,
    part_of,
    read_weight_file,
    source_in_errors,
    split,
)

log = logging.getLogger(__name__)

# These change what a backbone's tensors mean. A checkpoint of ours says which ones it has.
ARCHITECTURE = ("name", "stem", "num_heads", "learned_positions", "model", "options", *SWITCHES)


class Pretrained(NamedTuple):
    """An encoder and where it is from.

    Attributes:
        encoder: in eval mode, with the windows that were asked for.
        settings: the arguments of `build_backbone` that make such a backbone.
        config: the config of the run that made it; empty for other projects' files.
        epoch: epochs that were trained.
        step: optimizer steps that were trained.
        feature: what to measure, ``backbone`` or ``embedding``.
        window_size: a Swin's windows in the file, cells; None for other backbones.
    """

    encoder: Encoder
    settings: dict[str, Any]
    config: dict[str, Any]
    epoch: int
    step: int
    feature: str
    window_size: tuple[int, ...] | None


def load_encoder(
    path: str | Path,
    encoder: str = "query",
    backbone: nn.Module | None = None,
    trust_targets: bool = False,
    **settings: Any,
) -> Encoder:
    """Return the encoder in any file of weights, in eval mode on the CPU.

    Args:
        path: a checkpoint or backbone of this project, or weights of another one, see
            ``docs/weights.md``.
        encoder: ``query`` or ``key``.
        backbone: the module for the weights, if the file is of a backbone of your own.
        trust_targets: import the function that a file names for its backbone. It runs then.
        settings: arguments of `build_backbone` that the file does not tell, such as ``name`` or
            ``num_heads``; ``window_size`` changes the windows of a Swin; ``target`` names the
            function of a custom backbone, which is imported only then.

    Raises:
        InputError: the file cannot be read, or it needs settings.

    Example:
        >>> encoder = moco.load_encoder("runs/quickstart/TIME/checkpoints/last.ckpt")
        >>> features = encoder.encode(images)  # (N, 3, H, W) to (N, feature_dim)
    """
    return load_pretrained(
        str(path), encoder, settings, module=backbone, trust_targets=trust_targets
    ).encoder


def load_pretrained(
    path: str,
    which: str,
    given: dict[str, Any],
    feature: str | None = "backbone",
    module: nn.Module | None = None,
    *,
    trust_targets: bool = False,
) -> Pretrained:
    """Return the query or the key encoder in any file of weights.

    For other projects' files the log says what was loaded.

    Args:
        which: ``query`` or ``key``.
        given: the arguments of `build_backbone` that the user gave. They override those of a file
            of ours. For another project's file they say what the file does not show. A Swin gets
            the `window_size` at the end.
        feature: what is needed of the encoder, ``backbone`` or ``embedding``. None means what the
            run measured; for a file of a backbone alone it means ``backbone``.
        module: takes the backbone's weights of a file of ours; None: one is built.
        trust_targets: import the function that a file of ours names for its backbone.

    Raises:
        InputError: the file cannot be read, its format is unknown, it has another architecture
            than the given one, or it lacks what is needed.
    """
    source = f"checkpoint={path}"
    with source_in_errors(source):
        file = read_weight_file(path, source, timm_outline(given))
        if feature is None:
            feature = usual_feature(file)
        if file.settings is None:
            if module is not None:
                raise InputError(
                    "is of another project; backbone=module takes weights of this project's files"
                )
            encoder, settings = load_other_project(file, which, given, feature)
        else:
            encoder, settings = load_ours(
                file, which, given, feature, module, trust_targets=trust_targets
            )

    # The window in the file: `moco.export` scales the image size by it.
    window_size: Any = getattr(encoder.backbone, "window_size", None)
    if "window_size" in given:
        rewindow(encoder.backbone, given["window_size"])
    # With the memory format of training, a monitor's figure is repeated to the last digit.
    if is_channels_last(file.weights.values()):
        encoder.to(memory_format=torch.channels_last)
    return Pretrained(
        encoder=encoder.eval(),
        settings=settings_of(encoder.backbone, settings),
        config=file.config,
        epoch=file.epoch,
        step=file.step,
        feature=feature,
        window_size=window_size,
    )


def timm_outline(given: dict[str, Any]) -> Any:
    """Return the network of timm that the user asked for, without memory, or None.

    Raises:
        InputError: timm has no such network or option, or is missing.
    """
    if str(given.get("name")).partition(":")[0] != "timm":
        return None
    return cached_outline(json.dumps(given | {"pretrained": False}))


def usual_feature(file: WeightFile) -> str:
    """Return the feature that the run measured, or ``backbone`` if the file has no more."""
    of_run = file.config.get("evaluation", {}).get("feature", "backbone")
    if of_run == "embedding" and file.hyper_parameters is None:
        log.info(
            "the file holds a backbone alone, so the backbone's feature is measured; "
            "the run measured embeddings"
        )
        return "backbone"
    return of_run


def fit_to_data(pretrained: Pretrained, given: dict[str, Any], image_size: int, bands: int) -> None:
    """Prepare an encoder for images as soon as they are known.

    An RGB network of another project is inflated for images of other bands. Log which attention
    windows suit the images.

    Args:
        pretrained: its encoder is changed in place.
        given: the arguments of `build_backbone` that the user gave.
        image_size: side of the images, px.
        bands: of the images.

    Raises:
        InputError: the encoder reads other images.
    """
    backbone: Any = pretrained.encoder.backbone
    if pretrained.config:
        check_bands(backbone, bands, "checkpoint")
    else:
        widen_stem(backbone, bands, "checkpoint")
    log_window_advice(pretrained, given, image_size)


def log_window_advice(pretrained: Pretrained, given: dict[str, Any], image_size: int) -> None:
    """Log which attention windows suit images of this size, if the user gave none.

    Args:
        image_size: px.
    """
    backbone = pretrained.encoder.backbone
    pretrained_image_size = pretrained.config.get("data", {}).get("image_size")
    if not isinstance(backbone, Swin) or "window_size" in given:
        return
    if pretrained_image_size in (None, image_size):
        return
    window = backbone.window_size[0]
    suggestion = suggest_window(image_size, window, pretrained_image_size, backbone.patch_size)
    if suggestion.window_size != window:
        log.info(
            "pretrained on %d px with window %d; %s: backbone.window_size=%d",
            pretrained_image_size,
            window,
            suggestion,
            suggestion.window_size,
        )


def load_ours(
    file: WeightFile,
    which: str,
    given: dict[str, Any],
    feature: str,
    module: nn.Module | None = None,
    *,
    trust_targets: bool = False,
) -> tuple[Encoder, dict[str, Any]]:
    """Return the encoder of a file that a program of ours wrote, and its backbone's settings.

    Raises:
        InputError: the file has another architecture than the given one, has no such encoder, or
            its weights do not fit its own settings.
    """
    assert file.settings is not None
    there = file.settings
    if there.get("pretrained"):
        there = there | {"pretrained": False}  # the weights are in the file
    if there.get("name") == GIVEN and "target" in given:
        there = {"name": CUSTOM}  # the user says which function makes such a module
    elif module is None:
        if there.get("name") != GIVEN:
            target, named = there.get("target"), given.get("target")
            check_named(target, named, "backbone.target", trust_targets=trust_targets)
        check_architecture(there, given)
    for key in ("pretrained_window_size", "pretrained_image_size"):
        if key in given:
            log.warning(
                "backbone.%s: a value that is not the checkpoint's stretches the position biases",
                key,
            )
    # The backbone is built with the file's window, because its tensors have that size. The given
    # window follows when they are loaded.
    others = dict(given)
    others.pop("window_size", None)
    settings = there | others

    if file.hyper_parameters is not None:
        try:
            method = MoCo(**file.hyper_parameters | {"backbone": module or settings})
            method.load_state_dict(file.weights)
        except (TypeError, RuntimeError) as error:
            raise InputError(f"its weights do not fit its own hyperparameters ({error})") from error
        encoder: Any = method.key_encoder
        if which == "query":
            encoder = method.query_encoder
        return encoder, settings
    # What follows is for a file that holds a backbone alone.
    if which == "key" and file.encoder != "key":
        raise InputError(
            "holds the query encoder's backbone alone, and encoder=key needs the key's"
        )
    if feature == "embedding":
        raise InputError("holds a backbone alone, and feature=embedding needs the projector too")
    backbone = module or build_backbone(**settings)
    complaint = f"its weights do not fit the backbone {settings['name']}"
    load_fitting(backbone, part_of(file.weights, BACKBONE), complaint)
    return Encoder(backbone, nn.Identity()), settings


def check_architecture(there: dict[str, Any], given: dict[str, Any]) -> None:
    """Raise InputError if a checkpoint of ours has another backbone than the user asked for."""
    outline = build_outline(there)
    for key in ARCHITECTURE:
        own = there.get(key)
        if own is None and key in SWITCHES:
            own = getattr(outline, "switches", {}).get(key)
        elif own is None:
            own = getattr(outline, key, None)
        if key in given and given[key] != own:
            raise InputError(
                f"has another architecture: backbone.{key}: {own} there, {given[key]} here"
            )


def load_other_project(
    file: WeightFile, which: str, given: dict[str, Any], feature: str
) -> tuple[Encoder, dict[str, Any]]:
    """Return the encoder in another project's file, and its backbone's settings.

    Raises:
        InputError: the file lacks what is needed, or it fits no backbone, or not the given one.
    """
    prefix = f"{which}_encoder."
    theirs, others = split(file.weights, prefix + "backbone.")
    if not theirs:
        raise InputError(f"{file.origin}, without {METHOD_PARTS[prefix + 'backbone.'].title}")
    settings = complete_settings(theirs, file.origin, given)
    backbone = build_backbone(**settings)
    weights = to_our_names(theirs, backbone)
    load_fitting(backbone, weights, f"its weights do not fit backbone={settings['name']}")

    projector: nn.Module = nn.Identity()
    if feature == "embedding":
        head, others = split(others, prefix + "projector.")
        if not head:
            raise InputError("holds no projector, which feature=embedding needs")
        projector = build_head(backbone.feature_dim, **head_settings(head))
        load_fitting(projector, head, "its projector is of an unknown kind")

    log.info("%s; backbone %s", file.origin, described(settings))
    loaded = file.weights.keys() - others.keys()
    log.info("loaded: %s", listed_parts(loaded))
    log_unused(others, file)
    log.info("the file says nothing about images: mean and std are ImageNet's where none are given")
    return Encoder(backbone, projector), settings


def head_settings(head: Weights) -> dict[str, Any]:
    """Return the arguments of `build_head`, without the input's width, that make such a head.

    A head that `build_head` cannot make, as one with a scale in its last BatchNorm, gets the
    settings of a similar one. `misfit` tells the difference.

    Args:
        head: the tensors under our names.
    """
    widths = []
    last_linear: float = 0
    norms = []
    for name, tensor in head.items():
        if name.endswith("running_mean"):
            norms.append(last_number(name))
        elif tensor.ndim >= 2:
            widths.append(len(tensor))
            last_linear = last_number(name)
    hidden_dim = None
    if len(widths) > 1:
        hidden_dim = widths[0]
    return {
        "output_dim": widths[-1],
        "num_layers": len(widths),
        "hidden_dim": hidden_dim,
        "hidden_batch_norm": min(norms, default=last_linear) < last_linear,
        "last_batch_norm": max(norms, default=last_linear) > last_linear,
        "bias": f"{last_linear}.bias" in head or "bias" in head,
    }
