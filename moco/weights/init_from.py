"""A new run that begins with the weights of a file: ``init_from``."""

import logging
from typing import TYPE_CHECKING, Any

from moco.errors import InputError
from moco.weights.layouts import KEY, METHOD_PARTS, QUERY
from moco.weights.loading import check_what_shapes_hide
from moco.weights.reading import Held, described, named, read_held

if TYPE_CHECKING:
    from moco.methods.moco import MoCo
    from moco.weights.library_names import Weights

log = logging.getLogger(__name__)

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


def start_from(method: "MoCo", path: str) -> None:
    """Let a new method begin with the weights of a file, as many as fit; the log says what was taken.

    The backbone has to fit. Without the file's key encoder the key encoder is a copy of the query encoder; a queue is taken
    with the key encoder that has made it, or else begins as in any new run.

    Raises:
        InputError: the file cannot be read, is of an unknown format, or its backbone is another one.
    """
    from moco.weights.recognise import listed, listed_parts

    source = f"init_from={path}"
    held = read_held(path, source)
    weights = fitted_to(held, method, source)
    ours = method.state_dict()
    taken: set[str] = set()
    reasons = {}
    for part in METHOD_PARTS:
        reason = reason_against(part, weights, ours, taken)
        if reason is None:
            taken.add(part)
        elif any(name.startswith(part) for name in ours):
            reasons[part] = reason
    new = ours | {name: x for name, x in weights.items() if name.startswith(tuple(taken))}
    for part in reasons:
        if part.startswith(KEY):
            new |= {
                name: new[QUERY + name.removeprefix(KEY)] for name in ours if name.startswith(part)
            }
    method.load_state_dict(new)
    unused = {name: x for name, x in weights.items() if not name.startswith(tuple(taken))}
    log.info(
        "%s: %s; taken: %s",
        source,
        held.origin,
        listed_parts({n: weights[n] for n in weights.keys() - unused}),
    )
    for part, reason in reasons.items():
        log.info(
            "%s: %s; %s",
            METHOD_PARTS[part],
            reason,
            "as the query's" if part.startswith(KEY) else "begins anew",
        )
    if unused or held.ignored:
        log.info(
            "not used: %s", "; ".join(filter(None, [listed_parts(unused), listed(held.ignored)]))
        )


def fitted_to(held: Held, method: "MoCo", source: str) -> "Weights":
    """The weights of a file with the backbones' under our names, their shapes held to those of the method.

    Raises:
        InputError: the query encoder's backbone is another one than the method's.
    """
    from moco.weights.recognise import backbone_weights, misfit, settings_seen, split

    backbone: Any = method.query_encoder.backbone
    settings = {
        key: value for key, value in method.hparams["backbone"].items() if value is not None
    }
    weights = held.weights
    for encoder in (QUERY, KEY):
        theirs, others = split(weights, f"{encoder}backbone.")
        if held.settings is None and theirs:
            with named(source):
                if encoder == QUERY:
                    seen = settings_seen(theirs, settings["name"], held.origin)
                    is_saved = "pretrained_window_size" in seen
                    is_v2 = settings["name"].startswith("swin_v2")
                    if is_v2 and not is_saved and held.named_windows:
                        pretrained = backbone.pretrained_window_size
                        check_named_windows(held.named_windows, settings, pretrained)
                        seen |= held.named_windows
                    check_what_shapes_hide(held.origin, seen | settings, source, is_saved)
                theirs = backbone_weights(theirs, backbone)
            weights = others | {
                f"{encoder}backbone.{name}": tensor for name, tensor in theirs.items()
            }
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


def check_named_windows(
    named: dict[str, Any], settings: dict[str, Any], pretrained: tuple[int, ...]
) -> None:
    """Hold a Swin V2 to the windows that the name of the file says, unless its config says others.

    Args:
        named: of `windows_in_name`.
        settings: of the backbone, those that are not null.
        pretrained: its pretraining windows.

    Raises:
        InputError: they differ, and the config says nothing of the pretraining.
    """
    from moco.models.swin.backbone import windows_of

    there = list(windows_of("pretrained_window_size", named["pretrained_window_size"]))
    is_given = "pretrained_window_size" in settings or "pretrained_image_size" in settings
    if is_given or there == list(pretrained):
        return
    raise InputError(
        f"by its name it was pretrained with windows of {there} cells, and this backbone's are "
        f"{list(pretrained)}; set backbone.window_size={named['window_size']} "
        f"backbone.pretrained_window_size={str(there).replace(' ', '')}"
    )


def reason_against(part: str, weights: "Weights", ours: "Weights", taken: set[str]) -> str | None:
    """Why a method with the state dict `ours` cannot take one of its parts from a file's weights; None if it can.

    Args:
        taken: the parts before it that it takes.
    """
    from moco.weights.recognise import misfit, split

    theirs, own = split(weights, part)[0], split(ours, part)[0]
    if not theirs or not own:
        return "not in the file"
    if part in NEEDS and NEEDS[part] not in taken:
        return f"of no use without the file's {METHOD_PARTS[NEEDS[part]]}"
    problem = misfit(theirs, own)
    return problem and f"does not fit: {problem}"
