"""Start a new run with the weights of a file: the setting ``init_from``."""

import logging

from moco.errors import InputError
from moco.methods.moco import MoCo
from moco.weights.architecture import build_outline, check_hidden_settings, misfit, settings_seen
from moco.weights.layouts import (
    BACKBONE,
    DENSE_PROJECTOR,
    KEY,
    KEY_BACKBONE,
    KEY_DENSE_PROJECTOR,
    KEY_PROJECTOR,
    METHOD_PARTS,
    PREDICTOR,
    PROJECTOR,
    QUERY,
)
from moco.weights.library_names import Weights, to_our_names
from moco.weights.reading import WeightFile, read_weight_file, source_in_errors
from moco.weights.recognise import listed_parts, listed_unused, split

log = logging.getLogger(__name__)

# A part is of use only together with another part of the same file.
NEEDS = {
    PREDICTOR: PROJECTOR,
    KEY_PROJECTOR: PROJECTOR,
    KEY_DENSE_PROJECTOR: DENSE_PROJECTOR,
    "queue.": KEY_PROJECTOR,
    "reverse_queue.": KEY_PROJECTOR,
    "dense_queue.": KEY_DENSE_PROJECTOR,
    "reverse_dense_queue.": KEY_DENSE_PROJECTOR,
}


def start_from(method: MoCo, path: str) -> None:
    """Load the weights of a file into a new method, all parts that fit; the log lists them.

    The backbone has to fit. If the file has no key encoder, the key encoder is a copy of the query
    encoder. A queue is loaded with the key encoder that made it, or else starts as in any new run.

    Raises:
        InputError: the file cannot be read, its format is unknown, or its backbone does not fit.
    """
    source = f"init_from={path}"
    with source_in_errors(source):
        file = read_weight_file(path, source)
        weights = with_our_backbones(file, method)
        check_backbone(file, weights, method)

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


def with_our_backbones(file: WeightFile, method: MoCo) -> Weights:
    """Return the weights of a file, with the backbones' tensors under our names.

    Raises:
        InputError: they were pretrained with other windows or positions than the method has, or
            a setting is neither in the file nor in the config.
    """
    weights = file.weights
    if file.settings is not None:
        return weights
    check_settings(file, method)
    for prefix in (BACKBONE, KEY_BACKBONE):
        theirs, weights = split(weights, prefix)
        if theirs:
            for name, tensor in to_our_names(theirs, method.query_encoder.backbone).items():
                weights[prefix + name] = tensor
    return weights


def check_settings(file: WeightFile, method: MoCo) -> None:
    """Check what another project's file does not show of its backbone against the config.

    Raises:
        InputError: a setting changes the features, and neither the file nor the config says it.
    """
    theirs, _ = split(file.weights, BACKBONE)
    given = method.hparams["backbone"]
    settings = {key: value for key, value in given.items() if value is not None}
    seen = settings_seen(theirs, settings["name"], file.origin)
    check_hidden_settings(file.origin, seen | settings, "pretrained_window_size" in seen)


def check_backbone(file: WeightFile, weights: Weights, method: MoCo) -> None:
    """Raise InputError if the file's backbone does not fit the method's."""
    backbone = method.query_encoder.backbone
    theirs, _ = split(weights, BACKBONE)
    problem = misfit(theirs, backbone.state_dict())
    if problem is not None:
        name = method.hparams["backbone"]["name"]
        raise InputError(f"its weights do not fit backbone={name}: {problem}")
    if file.settings is None:
        return
    # These settings change the features, and the shapes of the tensors do not show them.
    outline = build_outline(file.settings)
    for key in ("pretrained_window_size", "num_heads"):
        there = getattr(outline, key, None)
        here = getattr(backbone, key, None)
        if there != here:
            raise InputError(
                f"backbone.{key}: {there} there, {here} here, which would change the features"
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
