"""Start a new run with the weights of a file: the setting ``init_from``."""

import logging
from typing import Any

from moco.errors import InputError
from moco.methods.moco import MoCo
from moco.models.swin.backbone import windows_of
from moco.weights.architecture import (
    check_hidden_settings,
    misfit,
    outline_of_file,
    settings_seen,
    source_in_errors,
)
from moco.weights.layouts import KEY, METHOD_PARTS, QUERY
from moco.weights.library_names import Weights, to_our_names
from moco.weights.reading import WeightFile, read_weight_file
from moco.weights.recognise import listed_parts, listed_unused, split

log = logging.getLogger(__name__)

# A part is of use only together with another part of the same file.
NEEDS = {
    "predictor.": "query_encoder.projector.",
    "key_encoder.projector.": "query_encoder.projector.",
    "key_encoder.dense_projector.": "query_encoder.dense_projector.",
    "queue.": "key_encoder.projector.",
    "reverse_queue.": "key_encoder.projector.",
    "dense_queue.": "key_encoder.dense_projector.",
    "reverse_dense_queue.": "key_encoder.dense_projector.",
}


def start_from(method: MoCo, path: str) -> None:
    """Load the weights of a file into a new method, all parts that fit; the log lists them.

    The backbone has to fit. If the file has no key encoder, the key encoder is a copy of the query
    encoder. A queue is loaded with the key encoder that made it, or else starts as in any new run.

    Raises:
        InputError: the file cannot be read, its format is unknown, or its backbone does not fit.
    """
    source = f"init_from={path}"
    file = read_weight_file(path, source)
    weights = with_our_backbones(file, method, source)
    check_backbone(file, weights, method, source)

    # Parts come in an order in which each comes after the part that it needs.
    state = method.state_dict()
    loaded_parts: set[str] = set()
    reasons = {}
    for part in METHOD_PARTS:
        reason = reason_against(part, weights, state, loaded_parts)
        if reason is None:
            loaded_parts.add(part)
        elif any(name.startswith(part) for name in state):
            reasons[part] = reason

    loaded = {}
    unused = {}
    for name, tensor in weights.items():
        if name.startswith(tuple(loaded_parts)):
            loaded[name] = tensor
        else:
            unused[name] = tensor
    state |= loaded
    # What the file lacks of the key encoder is a copy of the query encoder, as in any new run.
    for name in state:
        if name.startswith(KEY) and name.startswith(tuple(reasons)):
            state[name] = state[QUERY + name.removeprefix(KEY)]
    method.load_state_dict(state)

    log.info("%s: %s; loaded: %s", source, file.origin, listed_parts(loaded))
    for part, reason in reasons.items():
        remedy = "starts as in a new run"
        if part.startswith(KEY):
            remedy = "copied from the query encoder"
        log.info("%s: %s; %s", METHOD_PARTS[part], reason, remedy)
    if unused or file.ignored:
        log.info("not used: %s", listed_unused(unused, file.ignored))


def with_our_backbones(file: WeightFile, method: MoCo, source: str) -> Weights:
    """Return the weights of a file, with the backbones' tensors under our names.

    Raises:
        InputError: they were pretrained with other windows or positions than the method has, or
            a setting is neither in the file nor in the config.
    """
    if file.settings is not None:
        return file.weights
    backbone: Any = method.query_encoder.backbone
    weights = file.weights
    for encoder in (QUERY, KEY):
        prefix = f"{encoder}backbone."
        theirs, others = split(weights, prefix)
        if not theirs:
            continue
        with source_in_errors(source):
            if encoder == QUERY:
                check_settings(file, theirs, method, source)
            renamed = to_our_names(theirs, backbone)
        weights = others
        for name, tensor in renamed.items():
            weights[prefix + name] = tensor
    return weights


def check_settings(file: WeightFile, theirs: Weights, method: MoCo, source: str) -> None:
    """Hold the method's backbone to what another project's file says about its own.

    Raises:
        InputError: the windows of the pretraining differ, or a setting is not known.
    """
    backbone: Any = method.query_encoder.backbone
    settings = {}
    for key, value in method.hparams["backbone"].items():
        if value is not None:
            settings[key] = value
    seen = settings_seen(theirs, settings["name"], file.origin)
    is_pretraining_saved = "pretrained_window_size" in seen
    is_swin_v2 = settings["name"].startswith("swin_v2")
    if is_swin_v2 and not is_pretraining_saved and file.named_windows:
        check_named_windows(file.named_windows, settings, backbone.pretrained_window_size)
        seen |= file.named_windows
    check_hidden_settings(file.origin, seen | settings, source, is_pretraining_saved)


def check_named_windows(
    named: dict[str, Any], settings: dict[str, Any], pretrained: tuple[int, ...]
) -> None:
    """Hold a Swin V2 to the windows in the name of the file, unless its config gives others.

    Args:
        named: what `windows_in_name` returns.
        settings: of the backbone, those that are not null.
        pretrained: the backbone's pretraining windows, cells.

    Raises:
        InputError: they differ, and the config does not give the windows of the pretraining.
    """
    if "pretrained_window_size" in settings or "pretrained_image_size" in settings:
        return
    there = list(windows_of("pretrained_window_size", named["pretrained_window_size"]))
    if there == list(pretrained):
        return
    value = str(there).replace(" ", "")
    raise InputError(
        f"by its name it was pretrained with windows of {there} cells, and this backbone has "
        f"{list(pretrained)}; set backbone.window_size={named['window_size']} "
        f"backbone.pretrained_window_size={value}"
    )


def check_backbone(file: WeightFile, weights: Weights, method: MoCo, source: str) -> None:
    """Raise InputError if the file's backbone does not fit the method's."""
    backbone: Any = method.query_encoder.backbone
    theirs, _ = split(weights, QUERY + "backbone.")
    problem = misfit(theirs, backbone.state_dict())
    if problem is not None:
        name = method.hparams["backbone"]["name"]
        raise InputError(f"{source}: its weights do not fit backbone={name}: {problem}")
    if file.settings is None:
        return
    # These settings change the features, and the shapes of the tensors do not show them.
    outline = outline_of_file(file.settings, source)
    for key in ("pretrained_window_size", "num_heads"):
        there = getattr(outline, key, None)
        here = getattr(backbone, key, None)
        if there != here:
            raise InputError(
                f"{source}: backbone.{key}: {there} there, {here} here, "
                "which would change the features"
            )


def reason_against(
    part: str, weights: Weights, state: Weights, loaded_parts: set[str]
) -> str | None:
    """Return why a method cannot load one of its parts from a file, or None if it can.

    Args:
        weights: the file's.
        state: the method's state dict.
        loaded_parts: the parts before this one that it loads.
    """
    theirs, _ = split(weights, part)
    own, _ = split(state, part)
    if not theirs or not own:
        return "not in the file"
    if part in NEEDS and NEEDS[part] not in loaded_parts:
        return f"of no use without the file's {METHOD_PARTS[NEEDS[part]]}"
    problem = misfit(theirs, own)
    if problem is not None:
        return f"does not fit: {problem}"
    return None
