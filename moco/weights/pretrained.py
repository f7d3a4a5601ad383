"""The encoder in a file of weights, ours or another project's, for the programs that begin with one."""

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

from moco.errors import InputError
from moco.weights.layouts import BACKBONE_ALONE, METHOD_PARTS, MOCO_V3, QUERY, SOLO_LEARN
from moco.weights.weight_files import Held, described, named, read_held

if TYPE_CHECKING:
    from torch import nn

    from moco.models.encoder import Encoder
    from moco.weights.library_names import Weights

log = logging.getLogger(__name__)

# torch is imported where it is first needed: what only names these functions starts in a moment.

# Cells. Published Swin V2s with windows up to this one were pretrained on images whose last map holds a whole window (8 at
# 256 px). With larger windows, the last map was smaller than a window.
LARGEST_WHOLE_WINDOW = 8
# Settings that change what a backbone's tensors mean; of a checkpoint of ours they are known.
ARCHITECTURE = ("name", "stem", "num_heads", "learned_positions")


class Pretrained(NamedTuple):
    """An encoder and where it is from."""

    encoder: "Encoder"
    """In eval mode, in the windows that were asked for."""
    settings: dict[str, Any]
    """The arguments of `build_backbone` that make such a backbone."""
    config: dict[str, Any]
    """Of the run that made it, as much as is known: of other projects' files nothing is."""
    epoch: int
    step: int
    feature: str
    """What of it is to be measured: ``backbone`` or ``embedding``."""
    window_size: tuple[int, ...] | None
    """A Swin's windows in the file."""


def load_pretrained(
    path: str, which: str, given: dict[str, Any], feature: str | None = "backbone"
) -> Pretrained:
    """The query or the key encoder in any file of weights; of other projects' files the log says what was taken.

    Args:
        which: ``query`` or ``key``.
        given: arguments of `build_backbone`, as many as the user gave. A Swin gets their `window_size` in the end. Others
            override those of a file of ours. Of another project's they say what the file does not, and what does not show
            in the tensors' shapes.
        feature: what is needed of the encoder, ``backbone`` or ``embedding``. None: what the run that made it measured, of
            a backbone alone its feature.

    Raises:
        InputError: the file cannot be read, is of an unknown format or of another architecture than was asked for, or lacks
            what is needed.
    """
    import torch

    from moco.models.encoder import is_channels_last
    from moco.models.swin.backbone import rewindow
    from moco.weights.library_names import settings_of

    source = f"checkpoint={path}"
    held = read_held(path, source)
    is_backbone_alone = held.settings is not None and held.checkpoint is None
    of_run = held.config.get("evaluation", {}).get("feature", "backbone")
    if feature is None and is_backbone_alone and of_run == "embedding":
        log.info(
            "%s: a backbone alone, so its own feature is measured, where the run measured embeddings",
            source,
        )
    feature = feature or ("backbone" if is_backbone_alone else of_run)
    if held.settings is None:
        encoder, settings, is_window_set = load_foreign(held, which, given, feature, source)
    else:
        settings = held.settings | {
            key: value for key, value in given.items() if key != "window_size"
        }
        check_architecture(held.settings, given, source)
        for key in ("pretrained_window_size", "pretrained_image_size"):
            if key in given:
                log.warning(
                    "backbone.%s: another one than the checkpoint's stretches the position biases",
                    key,
                )
        encoder, is_window_set = load_ours(held, which, settings, feature, path), False
    window_size: Any = getattr(encoder.backbone, "window_size", None)
    if "window_size" in given and not is_window_set:
        rewindow(encoder.backbone, given["window_size"])
    settings = settings_of(encoder.backbone, settings)
    if is_channels_last(
        held.weights.values()
    ):  # so that a monitor's figure is repeated to the last digit
        encoder.to(memory_format=torch.channels_last)
    return Pretrained(
        encoder.eval(), settings, held.config, held.epoch, held.step, feature, window_size
    )


def log_window_advice(pretrained: Pretrained, given: dict[str, Any], image_size: int) -> None:
    """Say which attention windows would suit images of this size, if others than those of pretraining, and none are given.

    Args:
        image_size: px.
    """
    from moco.models.swin.backbone import window_advice

    pretrained_image_size = pretrained.config.get("data", {}).get("image_size")
    if pretrained_image_size is None or "window_size" in given:
        return
    if advice := window_advice(pretrained.encoder.backbone, image_size, pretrained_image_size):
        log.info(advice)


def check_architecture(there: dict[str, Any], given: dict[str, Any], source: str) -> None:
    """Raises InputError if a checkpoint of ours has another backbone than was asked for."""
    from moco.runs.config_changes import differences

    outline = described(there, source)
    usual = {
        key: getattr(outline, key, "imagenet" if key == "stem" else None) for key in ARCHITECTURE
    }
    own = usual | {key: value for key, value in there.items() if value is not None}
    asked = {key: given[key] for key in ARCHITECTURE if key in given}
    if differing := differences(
        {"backbone": {key: own.get(key) for key in asked}}, {"backbone": asked}
    ):
        raise InputError(f"{source}: of another architecture: {'; '.join(differing)}")


def load_ours(
    held: Held, which: str, settings: dict[str, Any], feature: str, path: str
) -> "Encoder":
    """The encoder of a file that a program of ours has written.

    Args:
        settings: the arguments of `build_backbone`.
        path: of the file, for the errors.

    Raises:
        InputError: it has no such encoder, or its weights do not fit its own settings.
    """
    from torch import nn

    from moco.models.encoder import Encoder
    from moco.weights.foreign import split

    if held.checkpoint is not None:
        return load_encoder(held.checkpoint, which, path, settings)
    if which == "key" and held.encoder != "key":
        raise InputError(
            f"checkpoint={path}: the query encoder's backbone alone, and encoder=key asks for the key's"
        )
    if feature == "embedding":
        raise InputError(
            f"checkpoint={path}: a backbone alone, and feature=embedding needs the projector too"
        )
    weights, _ = split(held.weights, QUERY + "backbone.")
    return Encoder(built_and_loaded(weights, settings, f"checkpoint={path}"), nn.Identity())


def built_and_loaded(weights: "Weights", settings: dict[str, Any], source: str) -> "nn.Module":
    """The backbone of these settings with weights under our names.

    Raises:
        InputError: there is no such backbone, or the weights do not fit it.
    """
    from moco.models.backbones import build_backbone
    from moco.weights.foreign import misfit

    backbone = build_backbone(**settings)
    if problem := misfit(weights, backbone.state_dict()):
        raise InputError(
            f"{source}: its weights do not fit the backbone {settings['name']}: {problem}"
        )
    backbone.load_state_dict(weights)
    return backbone


def load_encoder(
    checkpoint: dict[str, Any], which: str, path: str, settings: dict[str, Any] | None = None
) -> "Encoder":
    """The query or the key encoder of a checkpoint, in eval mode.

    Args:
        checkpoint: of `moco.runs.checkpoint_files.read_checkpoint`.
        which: ``query`` or ``key``.
        path: of the checkpoint, for the error.
        settings: arguments of `build_backbone`; None: the checkpoint's.

    Raises:
        InputError: it is not of pretraining, or its weights do not fit the model that its hyperparameters describe.
    """
    from moco.methods.moco import MoCo

    if "decoder" in checkpoint["hyper_parameters"]:
        raise InputError(
            f"checkpoint={path}: written by moco.segment, and expected is one of moco.train"
        )
    hyper_parameters = checkpoint["hyper_parameters"] | ({"backbone": settings} if settings else {})
    try:
        method = MoCo(**hyper_parameters)
        method.load_state_dict(checkpoint["state_dict"])
    except (TypeError, RuntimeError) as error:
        raise InputError(
            f"checkpoint={path}: its weights do not fit its own hyperparameters ({error})"
        ) from error
    encoder: Any = method.query_encoder if which == "query" else method.key_encoder
    return encoder.eval()


def load_foreign(
    held: Held, which: str, given: dict[str, Any], feature: str, source: str
) -> "tuple[Encoder, dict[str, Any], bool]":
    """The encoder in another project's file, the backbone's settings, and whether it has the window of `given` already.

    Raises:
        InputError: it lacks what is needed, or fits no backbone, or not the one that was asked for.
    """
    from moco.models.backbones import build_backbone
    from moco.models.encoder import Encoder
    from moco.weights.foreign import (
        backbone_weights,
        listed,
        listed_parts,
        misfit,
        settings_seen,
        split,
    )

    prefix = f"{which}_encoder."
    theirs, others = split(held.weights, prefix + "backbone.")
    if not theirs:
        raise InputError(f"{source}: {held.origin}, without {METHOD_PARTS[prefix + 'backbone.']}")
    settings = given if "name" in given else recognised(theirs, source) | given
    with named(source):
        seen = settings_seen(theirs, settings["name"], held.origin)
    is_normaliser_saved = "pretrained_window_size" in seen
    if settings["name"].startswith("swin_v2") and not is_normaliser_saved and held.named_windows:
        seen |= held.named_windows
        log.info(
            "%s: its name says that it looks through windows of %s, and was pretrained with windows of %s",
            source,
            seen["window_size"],
            seen["pretrained_window_size"],
        )
    if "pretrained_image_size" in given and not is_normaliser_saved:
        seen.pop("pretrained_window_size", None)  # what is given counts more than a file's name
    settings = settings | {
        key: value for key, value in seen.items() if key == "window_size" or key not in given
    }
    check_what_shapes_hide(held.origin, settings, source, is_normaliser_saved)
    backbone = build_backbone(**settings)
    with named(source):
        weights = backbone_weights(theirs, backbone)
    if problem := misfit(weights, backbone.state_dict()):
        raise InputError(f"{source}: its weights do not fit backbone={settings['name']}: {problem}")
    backbone.load_state_dict(weights)
    head, unused = split(others, prefix + "projector.")
    encoder = Encoder(
        backbone,
        projector_of(head if feature == "embedding" else None, backbone.feature_dim, source),
    )
    if feature == "backbone":
        unused = others
    others_set = ", ".join(f"{key} {value}" for key, value in settings.items() if key != "name")
    log.info(
        "%s: %s; backbone %s%s",
        source,
        held.origin,
        settings["name"],
        others_set and f" ({others_set})",
    )
    log.info("taken: %s", listed_parts({n: x for n, x in held.weights.items() if n not in unused}))
    if unused or held.ignored:
        log.info(
            "not used: %s", "; ".join(filter(None, [listed_parts(unused), listed(held.ignored)]))
        )
    log.info("the file says nothing of images: mean and std are ImageNet's where none are given")
    return encoder, settings, "window_size" not in seen


def recognised(weights: "Weights", source: str) -> dict[str, Any]:
    """The arguments of `build_backbone` for the one backbone that has tensors of these names and shapes.

    Raises:
        InputError: none has, or several have.
    """
    from moco.weights.foreign import fitting_backbones

    fitting = fitting_backbones(weights)
    if len(fitting) == 1:
        log.info("%s: backbone=%s, recognised by its tensors' shapes", source, fitting[0]["name"])
        return fitting[0]
    which = (
        f"{' and '.join(settings['name'] for settings in fitting)} have"
        if fitting
        else "no backbone here has"
    )
    raise InputError(f"{source}: {which} tensors of these shapes; give backbone=NAME")


def check_what_shapes_hide(
    origin: str, settings: dict[str, Any], source: str, is_normaliser_saved: bool = False
) -> None:
    """Check the settings of another project's backbone; warn of those that are probably wrong.

    Args:
        is_normaliser_saved: the pretraining windows of a Swin V2 are of tables in the file.

    Raises:
        InputError: something decides the outputs, does not show in the file, and is not given.
    """
    name = settings["name"]
    if name.startswith("swin_v2") and not is_normaliser_saved:
        check_pretraining_is_known(settings, source)
    if name == "vit_small" and "num_heads" not in settings and origin != MOCO_V3:
        raise InputError(
            f"{source}: does not say how many heads its attention has; give backbone.num_heads: 6 in DeiT and timm, 12 in "
            "MoCo v3"
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


def check_pretraining_is_known(settings: dict[str, Any], source: str) -> None:
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
            f"{source}: does not say which windows it was pretrained with; give backbone.window_size, "
            "which is 8 of timm's swinv2_..._window8_256"
        )
    pretrained = settings.get("pretrained_window_size", settings["window_size"])
    if not isinstance(pretrained, int) or "pretrained_image_size" in settings:
        return
    if pretrained > LARGEST_WHOLE_WINDOW:
        raise InputError(
            f"{source}: does not say on which images its windows of {pretrained} cells were "
            "pretrained, and windows are clipped to smaller maps; give backbone.pretrained_image_size, "
            "which is 256 of timm's swinv2_..._window16_256, and 192 with "
            "backbone.pretrained_window_size=12 of swinv2_..._window12to16_192to256"
        )
    log.info(
        "%s: pretraining windows of %d cells are taken to fit all maps; if its images were smaller "
        "give backbone.pretrained_image_size",
        source,
        pretrained,
    )


def projector_of(head: "Weights | None", feature_dim: int, source: str) -> "nn.Module":
    """The projector with these weights, under our names; None: an identity, for those who need none.

    Raises:
        InputError: there are none, or they are of a projector that is not known here.
    """
    from torch import nn

    from moco.models.heads import build_head
    from moco.weights.foreign import head_settings, misfit

    if head is None:
        return nn.Identity()
    if not head:
        raise InputError(f"{source}: holds no projector, which feature=embedding needs")
    settings = head_settings(head)
    projector = build_head(feature_dim, settings.pop("output_dim"), **settings)
    if problem := misfit(head, projector.state_dict()):
        raise InputError(f"{source}: its projector is of a form that is not known here: {problem}")
    projector.load_state_dict(head)
    return projector
