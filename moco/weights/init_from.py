"""Start a new run with the weights of a file: the setting ``init_from``."""

import logging
from typing import Any

import torch

from moco.errors import InputError
from moco.methods.moco import MoCo
from moco.models.swin.backbone import Swin
from moco.weights.architecture import build_outline, complete_settings, misfit, without_none
from moco.weights.inflation import fit_bands
from moco.weights.library_names import Weights, check_switches, to_our_names
from moco.weights.other_projects import BACKBONE, KEY, KEY_BACKBONE, METHOD_PARTS, QUERY
from moco.weights.weight_files import (
    WeightFile,
    listed_parts,
    log_unused,
    part_of,
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
        file = read_weight_file(path, source, method.query_encoder.backbone)
        weights = with_bands_of(with_our_backbones(file, method), method)
        check_backbone(file, weights, method)

    state = method.state_dict()
    loaded_parts: set[str] = set()
    reasons = {}
    for part, (_, needs) in METHOD_PARTS.items():
        theirs, own = part_of(weights, part), part_of(state, part)
        if not own:
            continue
        problem = misfit(theirs, own)
        if not theirs:
            reasons[part] = "not in the file"
        elif needs and needs not in loaded_parts:
            reasons[part] = f"of no use without the file's {METHOD_PARTS[needs].title}"
        elif problem is not None:
            reasons[part] = f"does not fit: {problem}"
        else:
            loaded_parts.add(part)

    loaded = {name for name in weights if name.startswith(tuple(loaded_parts))}
    for name in loaded:
        state[name] = weights[name]
        if name.endswith("queue.groups"):
            # Its numbers are those of the file's dataset.
            state[name] = torch.full_like(weights[name], -1)
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
    if file.settings is not None:
        return file.weights
    weights = file.weights
    given = without_none(method.hparams["backbone"])
    complete_settings(part_of(weights, BACKBONE), file.origin, given)  # for its errors
    for prefix in (BACKBONE, KEY_BACKBONE):
        theirs, weights = split(weights, prefix)
        if theirs:
            for name, tensor in to_our_names(theirs, method.query_encoder.backbone).items():
                weights[prefix + name] = tensor
    return weights


def with_bands_of(weights: Weights, method: MoCo) -> Weights:
    """Return the weights with RGB backbones inflated to the bands of the method's images."""
    for prefix in (BACKBONE, KEY_BACKBONE):
        theirs, others = split(weights, prefix)
        # Both encoders have the same first convolution, so the log says it once.
        is_first = prefix == BACKBONE
        fitting = fit_bands(theirs, method.query_encoder.backbone, is_logged=is_first)
        if fitting is not theirs:
            weights = others
            for name, tensor in fitting.items():
                weights[prefix + name] = tensor
    return weights


def check_backbone(file: WeightFile, weights: Weights, method: MoCo) -> None:
    """Raise InputError if the file's backbone does not fit the method's."""
    backbone: Any = method.query_encoder.backbone
    outline = None
    if file.settings is not None:
        outline = build_outline(file.settings)
    if isinstance(outline, Swin) and isinstance(backbone, Swin):
        check_switches(outline.switches, backbone.switches)
    problem = misfit(part_of(weights, BACKBONE), backbone.state_dict())
    if problem is not None:
        name = method.hparams["backbone"]["name"]
        raise InputError(f"its weights do not fit backbone={name}: {problem}")
    if outline is None:
        return
    # These settings change the features, and the shapes of the tensors do not show them.
    for key in ("pretrained_window_size", "num_heads"):
        there = getattr(outline, key, None)
        here = getattr(backbone, key, None)
        if there != here:
            raise InputError(
                f"backbone.{key}: {there} there, {here} here, which would change the features"
            )
