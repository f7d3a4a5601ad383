"""Start a new run with the weights of a file: the setting ``init_from``."""

import logging

from moco.errors import InputError
from moco.methods.moco import MoCo
from moco.weights.architecture import build_outline, check_hidden_settings, misfit, settings_seen
from moco.weights.library_names import Weights, to_our_names
from moco.weights.other_projects import BACKBONE, KEY, KEY_BACKBONE, METHOD_PARTS, QUERY
from moco.weights.weight_files import (
    WeightFile,
    listed_parts,
    log_unused,
    read_weight_file,
    source_in_errors,
    split,
)

log = logging.getLogger(__name__)


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

    state = method.state_dict()
    loaded_parts: set[str] = set()
    reasons = {}
    for part in METHOD_PARTS:
        reason = reason_against(part, weights, state, loaded_parts)
        if reason is None:
            loaded_parts.add(part)
        elif any(name.startswith(part) for name in state):
            reasons[part] = reason

    loaded = {name for name in weights if name.startswith(tuple(loaded_parts))}
    state |= {name: weights[name] for name in loaded}
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
        log.info("%s: %s; %s", METHOD_PARTS[part].title, reason, remedy)
    log_unused(weights.keys() - loaded, file)


def with_our_backbones(file: WeightFile, method: MoCo) -> Weights:
    """Return the weights of a file, with the backbones' tensors under our names.

    Raises:
        InputError: they were pretrained with other windows or positions than the method has, or
            a setting is neither in the file nor in the config.
    """
    weights = file.weights
    if file.settings is not None:
        return weights
    given = {key: x for key, x in method.hparams["backbone"].items() if x is not None}
    seen = settings_seen(split(weights, BACKBONE)[0], given["name"], file.origin)
    check_hidden_settings(file.origin, seen | given, "pretrained_window_size" in seen)
    for prefix in (BACKBONE, KEY_BACKBONE):
        theirs, weights = split(weights, prefix)
        if theirs:
            for name, tensor in to_our_names(theirs, method.query_encoder.backbone).items():
                weights[prefix + name] = tensor
    return weights


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
    needs = METHOD_PARTS[part].needs
    if needs and needs not in loaded_parts:
        return f"of no use without the file's {METHOD_PARTS[needs].title}"
    problem = misfit(theirs, own)
    if problem is not None:
        return f"does not fit: {problem}"
    return None
