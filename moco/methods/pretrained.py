"""What a file of weights holds, ours or another project's, for the programs that begin with it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moco.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from moco.methods.moco import MoCo
    from moco.models.encoder import Encoder
    from moco.models.weights import Weights

log = logging.getLogger(__name__)

# torch is imported where it is first needed: what only names these functions starts in a moment.

# Settings that change what a backbone's tensors mean; of a checkpoint of ours they are known.
ARCHITECTURE = ("name", "stem", "num_heads", "learned_positions")
# What a file of the backbone alone has, and of which kind it is.
BACKBONE_PARTS = {
    "state_dict": dict, "backbone": dict, "encoder": str, "image_size": int, "mean": list, "std": list, "epoch": int,
    "step": int,
}  # fmt: skip
# What has to be the file's for a part to be of use; without it the part is made anew.
NEEDS = {
    "predictor.": "query_encoder.projector.",
    "key_encoder.projector.": "query_encoder.projector.",
    "key_encoder.dense_projector.": "query_encoder.dense_projector.",
    "queue.": "key_encoder.projector.",
    "reverse_queue.": "key_encoder.projector.",
    "dense_queue.": "key_encoder.dense_projector.",
    "reverse_dense_queue.": "key_encoder.dense_projector.",
}


class Held(NamedTuple):
    """What is in a file."""

    origin: str
    weights: "Weights"
    """By the names of `MoCo`; of the backbones by their library's, where `settings` is None."""
    ignored: list[str]
    """Names of tensors that have no place here."""
    settings: dict[str, Any] | None
    """The arguments of `build_backbone`; None: the file does not say."""
    config: dict[str, Any]
    """Of the run that made it, as much as is known."""
    epoch: int
    step: int
    checkpoint: dict[str, Any] | None = None
    """All of it, if it is a whole checkpoint of ours."""
    encoder: str | None = None
    """``query`` or ``key``, if it is one backbone that we have written."""


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


@contextmanager
def named(source: str) -> Iterator[None]:
    """Inside, an error about the weights of a file says which file."""
    try:
        yield
    except InputError as error:
        raise error if str(error).startswith(source) else InputError(f"{source}: {error}") from error


def load_pretrained(path: str, which: str, given: dict[str, Any], feature: str | None = "backbone") -> Pretrained:
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
    from moco.models.swin import rewindow
    from moco.models.weights import settings_of

    source = f"checkpoint={path}"
    held = read_held(path, source)
    is_backbone_alone = held.settings is not None and held.checkpoint is None
    of_run = held.config.get("evaluation", {}).get("feature", "backbone")
    if feature is None and is_backbone_alone and of_run == "embedding":
        log.info("%s: a backbone alone, so its own feature is measured, where the run measured embeddings", source)
    feature = feature or ("backbone" if is_backbone_alone else of_run)
    if held.settings is None:
        encoder, settings, is_window_set = load_foreign(held, which, given, feature, source)
    else:
        settings = held.settings | {key: value for key, value in given.items() if key != "window_size"}
        check_architecture(held.settings, given, source)
        if "pretrained_window_size" in given:
            log.warning(
                "backbone.pretrained_window_size: another one than the checkpoint's stretches the position biases"
            )
        encoder, is_window_set = load_ours(held, which, settings, feature, path), False
    window_size: Any = getattr(encoder.backbone, "window_size", None)
    if "window_size" in given and not is_window_set:
        rewindow(encoder.backbone, given["window_size"])
    settings = settings_of(encoder.backbone, settings)
    return Pretrained(encoder.eval(), settings, held.config, held.epoch, held.step, feature, window_size)


def log_window_advice(pretrained: Pretrained, given: dict[str, Any], image_size: int) -> None:
    """Say which attention windows would suit images of this size, if others than those of pretraining, and none are given.

    Args:
        image_size: px.
    """
    from moco.models.swin import window_advice

    pretrained_image_size = pretrained.config.get("data", {}).get("image_size")
    if pretrained_image_size is None or "window_size" in given:
        return
    if advice := window_advice(pretrained.encoder.backbone, image_size, pretrained_image_size):
        log.info(advice)


def read_held(path: str, source: str) -> Held:
    """What is in a file of weights, whoever has written it.

    Args:
        source: the key and the path, for the errors.

    Raises:
        InputError: it cannot be read, or is of an unknown format.
    """
    from moco.models.foreign import QUERY, recognise, tensors_in
    from moco.training.checkpoint_files import PARTS, check_parts, read_weights

    content = read_weights(path, source)
    keys = content.keys() if isinstance(content, dict) else set()
    if keys >= PARTS.keys():
        check_parts(content, source)
        hyper_parameters = content["hyper_parameters"]
        if "decoder" in hyper_parameters:
            raise InputError(f"{source}: written by moco.segment, and expected is one of moco.train")
        if not isinstance(hyper_parameters.get("backbone"), dict):
            raise InputError(f"{source}: not written by moco.train (its hyper_parameters have no backbone)")
        epoch, step = content["figures"].get("epoch", 0), content["global_step"]
        origin = f"a checkpoint of moco.train, epoch {epoch}"
        weights, settings = content["state_dict"], hyper_parameters["backbone"]
        return Held(origin, weights, [], settings, content["config"], epoch, step, checkpoint=content)
    if keys >= BACKBONE_PARTS.keys():
        check_parts({"config": {}, **content}, source, BACKBONE_PARTS | {"config": dict})
        described(content["backbone"], source)
        of_images = {
            "data": {"image_size": content["image_size"]},
            "augmentation": {"mean": content["mean"], "std": content["std"]},
        }
        return Held(
            f"a backbone of moco.train, epoch {content['epoch']}",
            {f"{QUERY}backbone.{name}": tensor for name, tensor in content["state_dict"].items()},
            [],
            content["backbone"],
            of_images | content.get("config", {}),
            content["epoch"],
            content["step"],
            encoder=content["encoder"],
        )
    origin, weights, ignored = recognise(tensors_in(content, source), source)
    epoch = content.get("epoch") if isinstance(content, dict) else None
    return Held(origin, weights, ignored, None, {}, epoch if isinstance(epoch, int) else 0, 0)


def described(settings: dict[str, Any], source: str) -> "nn.Module":
    """The backbone of a file's settings, without memory for its tensors.

    Raises:
        InputError: they are no settings of a backbone.
    """
    import torch

    from moco.models.backbones import build_backbone

    try:
        with torch.device("meta"):
            return build_backbone(**settings)
    except (TypeError, InputError) as error:
        raise InputError(f"{source}: its settings are of no backbone ({error})") from error


def check_architecture(there: dict[str, Any], given: dict[str, Any], source: str) -> None:
    """Raises InputError if a checkpoint of ours has another backbone than was asked for."""
    from moco.training.run_folder import differences

    outline = described(there, source)
    usual = {key: getattr(outline, key, "imagenet" if key == "stem" else None) for key in ARCHITECTURE}
    own = usual | {key: value for key, value in there.items() if value is not None}
    asked = {key: given[key] for key in ARCHITECTURE if key in given}
    if differing := differences({"backbone": {key: own.get(key) for key in asked}}, {"backbone": asked}):
        raise InputError(f"{source}: of another architecture: {'; '.join(differing)}")


def load_ours(held: Held, which: str, settings: dict[str, Any], feature: str, path: str) -> "Encoder":
    """The encoder of a file that a program of ours has written.

    Args:
        settings: the arguments of `build_backbone`.
        path: of the file, for the errors.

    Raises:
        InputError: it has no such encoder, or its weights do not fit its own settings.
    """
    from torch import nn

    from moco.models.encoder import Encoder
    from moco.models.foreign import QUERY, split

    if held.checkpoint is not None:
        return load_encoder(held.checkpoint, which, path, settings)
    if which == "key" and held.encoder != "key":
        raise InputError(f"checkpoint={path}: the query encoder's backbone alone, and encoder=key asks for the key's")
    if feature == "embedding":
        raise InputError(f"checkpoint={path}: a backbone alone, and feature=embedding needs the projector too")
    weights, _ = split(held.weights, QUERY + "backbone.")
    return Encoder(built_and_loaded(weights, settings, f"checkpoint={path}"), nn.Identity())


def built_and_loaded(weights: "Weights", settings: dict[str, Any], source: str) -> "nn.Module":
    """The backbone of these settings with weights under our names.

    Raises:
        InputError: there is no such backbone, or the weights do not fit it.
    """
    from moco.models.backbones import build_backbone
    from moco.models.foreign import misfit

    backbone = build_backbone(**settings)
    if problem := misfit(weights, backbone.state_dict()):
        raise InputError(f"{source}: its weights do not fit the backbone {settings['name']}: {problem}")
    backbone.load_state_dict(weights)
    return backbone


def load_encoder(
    checkpoint: dict[str, Any], which: str, path: str, settings: dict[str, Any] | None = None
) -> "Encoder":
    """The query or the key encoder of a checkpoint, in eval mode.

    Args:
        checkpoint: of `moco.training.checkpoint_files.read_checkpoint`.
        which: ``query`` or ``key``.
        path: of the checkpoint, for the error.
        settings: arguments of `build_backbone`; None: the checkpoint's.

    Raises:
        InputError: it is not of pretraining, or its weights do not fit the model that its hyperparameters describe.
    """
    from moco.methods.moco import MoCo

    if "decoder" in checkpoint["hyper_parameters"]:
        raise InputError(f"checkpoint={path}: written by moco.segment, and expected is one of moco.train")
    hyper_parameters = checkpoint["hyper_parameters"] | ({"backbone": settings} if settings else {})
    try:
        method = MoCo(**hyper_parameters)
        method.load_state_dict(checkpoint["state_dict"])
    except (TypeError, RuntimeError) as error:
        raise InputError(f"checkpoint={path}: its weights do not fit its own hyperparameters ({error})") from error
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
    from moco.models.foreign import PARTS, backbone_weights, listed, listed_parts, misfit, settings_seen, split

    prefix = f"{which}_encoder."
    theirs, others = split(held.weights, prefix + "backbone.")
    if not theirs:
        raise InputError(f"{source}: {held.origin}, without {PARTS[prefix + 'backbone.']}")
    settings = given if "name" in given else recognised(theirs, source) | given
    with named(source):
        seen = settings_seen(theirs, settings["name"])
    settings = settings | {key: value for key, value in seen.items() if key == "window_size" or key not in given}
    check_what_shapes_hide(held.origin, settings, source)
    backbone = build_backbone(**settings)
    with named(source):
        weights = backbone_weights(theirs, backbone)
    if problem := misfit(weights, backbone.state_dict()):
        raise InputError(f"{source}: its weights do not fit backbone={settings['name']}: {problem}")
    backbone.load_state_dict(weights)
    head, unused = split(others, prefix + "projector.")
    encoder = Encoder(backbone, projector_of(head if feature == "embedding" else None, backbone.feature_dim, source))
    if feature == "backbone":
        unused = others
    others_set = ", ".join(f"{key} {value}" for key, value in settings.items() if key != "name")
    log.info("%s: %s; backbone %s%s", source, held.origin, settings["name"], others_set and f" ({others_set})")
    log.info("taken: %s", listed_parts({n: x for n, x in held.weights.items() if n not in unused}))
    if unused or held.ignored:
        log.info("not used: %s", "; ".join(filter(None, [listed_parts(unused), listed(held.ignored)])))
    log.info("the file says nothing of images: mean and std are ImageNet's where none are given")
    return encoder, settings, "window_size" not in seen


def recognised(weights: "Weights", source: str) -> dict[str, Any]:
    """The arguments of `build_backbone` for the one backbone that has tensors of these names and shapes.

    Raises:
        InputError: none has, or several have.
    """
    from moco.models.foreign import fitting_backbones

    fitting = fitting_backbones(weights)
    if len(fitting) == 1:
        log.info("%s: backbone=%s, recognised by its tensors' shapes", source, fitting[0]["name"])
        return fitting[0]
    which = f"{' and '.join(settings['name'] for settings in fitting)} have" if fitting else "no backbone here has"
    raise InputError(f"{source}: {which} tensors of these shapes; give backbone=NAME")


def check_what_shapes_hide(origin: str, settings: dict[str, Any], source: str) -> None:
    """Hold the settings of another project's backbone to be complete; warn of what cannot be set.

    Raises:
        InputError: something decides the outputs, does not show in the file, and is not given.
    """
    from moco.models.foreign import MOCO_V3, SOLO_LEARN

    name = settings["name"]
    if name.startswith("swin_v2") and "window_size" not in settings:
        raise InputError(
            f"{source}: does not say which windows it was pretrained with; give backbone.window_size, which is 8 of timm's "
            "swinv2_..._window8_256"
        )
    if name == "vit_small" and "num_heads" not in settings and origin != MOCO_V3:
        raise InputError(
            f"{source}: does not say how many heads its attention has; give backbone.num_heads: 6 in DeiT and timm, 12 in "
            "MoCo v3"
        )
    if origin == SOLO_LEARN and settings.get("stem") == "cifar":
        log.warning(
            "solo-learn pads the first convolution by 2 pixels, this project by 1: the features differ a little"
        )


def projector_of(head: "Weights | None", feature_dim: int, source: str) -> "nn.Module":
    """The projector with these weights, under our names; None: an identity, for those who need none.

    Raises:
        InputError: there are none, or they are of a projector that is not known here.
    """
    from torch import nn

    from moco.models.foreign import head_settings, misfit
    from moco.models.heads import build_head

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


def start_from(method: "MoCo", path: str) -> None:
    """Let a new method begin with the weights of a file, as many as fit; the log says what was taken.

    The backbone has to fit. Without the file's key encoder the key encoder is a copy of the query encoder; a queue is taken
    with the key encoder that has made it, or else begins as in any new run.

    Raises:
        InputError: the file cannot be read, is of an unknown format, or its backbone is another one.
    """
    from moco.models.foreign import KEY, PARTS, QUERY, listed, listed_parts

    source = f"init_from={path}"
    held = read_held(path, source)
    weights = fitted_to(held, method, source)
    ours = method.state_dict()
    taken: set[str] = set()
    reasons = {}
    for part in PARTS:
        reason = reason_against(part, weights, ours, taken)
        if reason is None:
            taken.add(part)
        elif any(name.startswith(part) for name in ours):
            reasons[part] = reason
    new = ours | {name: x for name, x in weights.items() if name.startswith(tuple(taken))}
    for part in reasons:
        if part.startswith(KEY):
            new |= {name: new[QUERY + name.removeprefix(KEY)] for name in ours if name.startswith(part)}
    method.load_state_dict(new)
    unused = {name: x for name, x in weights.items() if not name.startswith(tuple(taken))}
    log.info("%s: %s; taken: %s", source, held.origin, listed_parts({n: weights[n] for n in weights.keys() - unused}))
    for part, reason in reasons.items():
        log.info("%s: %s; %s", PARTS[part], reason, "as the query's" if part.startswith(KEY) else "begins anew")
    if unused or held.ignored:
        log.info("not used: %s", "; ".join(filter(None, [listed_parts(unused), listed(held.ignored)])))


def fitted_to(held: Held, method: "MoCo", source: str) -> "Weights":
    """The weights of a file with the backbones' under our names, their shapes held to those of the method.

    Raises:
        InputError: the query encoder's backbone is another one than the method's.
    """
    from moco.models.foreign import KEY, QUERY, backbone_weights, misfit, settings_seen, split

    backbone: Any = method.query_encoder.backbone
    settings = {key: value for key, value in method.hparams["backbone"].items() if value is not None}
    weights = held.weights
    for encoder in (QUERY, KEY):
        theirs, others = split(weights, f"{encoder}backbone.")
        if held.settings is None and theirs:
            with named(source):
                if encoder == QUERY:
                    seen = settings_seen(theirs, settings["name"])
                    check_what_shapes_hide(held.origin, seen | settings, source)
                theirs = backbone_weights(theirs, backbone)
            weights = others | {f"{encoder}backbone.{name}": tensor for name, tensor in theirs.items()}
    theirs, _ = split(weights, QUERY + "backbone.")
    if problem := misfit(theirs, backbone.state_dict()):
        raise InputError(f"{source}: its weights do not fit backbone={settings['name']}: {problem}")
    if held.settings is not None:
        there = described(held.settings, source)
        for key in ("pretrained_window_size", "num_heads"):
            value, own = getattr(there, key, None), getattr(backbone, key, None)
            if value != own:
                raise InputError(
                    f"{source}: backbone.{key}: {value} there, {own} here, which would change the features"
                )
    return weights


def reason_against(part: str, weights: "Weights", ours: "Weights", taken: set[str]) -> str | None:
    """Why a method with the state dict `ours` cannot take one of its parts from a file's weights; None if it can.

    Args:
        taken: the parts before it that it takes.
    """
    from moco.models.foreign import PARTS, misfit, split

    theirs, own = split(weights, part)[0], split(ours, part)[0]
    if not theirs or not own:
        return "not in the file"
    if part in NEEDS and NEEDS[part] not in taken:
        return f"of no use without the file's {PARTS[NEEDS[part]]}"
    problem = misfit(theirs, own)
    return problem and f"does not fit: {problem}"


def write_backbone_file(path: Path, method: "MoCo", config: dict[str, Any], figures: dict[str, Any]) -> None:
    """Write the query encoder's backbone and what is to be known of it: plain data, for `load_pretrained` and anyone else.

    Args:
        config: of the run, as plain data.
        figures: of the run, under the names of ``metrics.json``.
    """
    import torch

    from moco.models.weights import settings_of
    from moco.training.run_folder import write_atomically

    backbone: Any = method.query_encoder.backbone
    content = {
        "state_dict": {name: tensor.cpu() for name, tensor in backbone.state_dict().items()},
        "backbone": settings_of(backbone, method.hparams["backbone"]),
        "encoder": "query",
        "image_size": config["data"]["image_size"],
        "mean": config["augmentation"]["mean"],
        "std": config["augmentation"]["std"],
        "epoch": figures["epoch"],
        "step": figures["step"],
        "config": config,
    }
    write_atomically(path, lambda file: torch.save(content, file))
