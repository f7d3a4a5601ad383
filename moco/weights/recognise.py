"""State dicts of other projects: whose they are, and what their tensors are called here.

A state dict is recognised by its names alone. Its tensors get the names that they have in `moco.methods.moco.MoCo`, see
`moco.weights.layouts`; only the backbones keep those of their library until there is a backbone to compare them with: see
`backbone_weights`.

Letters: C embedding width, K queue size.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moco.errors import InputError
from moco.models.backbones import BACKBONES, build_backbone, settings_of_backbone
from moco.models.swin.attention import check_pretrained_windows, pretrained_window_of
from moco.models.swin.backbone import MAX_WINDOW_SIZE, Swin, clipped_windows
from moco.models.vit import learned_grid_side
from moco.weights.layouts import KEY, LAYOUTS, METHOD_PARTS, QUERY, QUEUES, SOLO_LEARN
from moco.weights.library_names import (
    CLASSIFIERS,
    COORDINATES,
    INDEX,
    POSITIONS,
    Weights,
    from_timm,
    from_torchvision,
    one_or_each,
)

HEADS = tuple(part for part in METHOD_PARTS if "projector" in part or part == "predictor.")
BACKBONE_CLASSIFIERS = tuple(
    f"{encoder}backbone.{name}" for encoder in (QUERY, KEY) for name in CLASSIFIERS
)
WRAPPERS = r"(?:module\.|_orig_mod\.)+"  # of DistributedDataParallel and torch.compile
COMPUTED = (
    f".{INDEX}",
    f".{COORDINATES}",
    ".attn_mask",
)  # of Swin's windows; some libraries save them
LONGEST_LIST = 6  # names in a line of the log


class Recognised(NamedTuple):
    """What a state dict holds."""

    origin: str
    weights: Weights
    """By the names of our method; of the backbones by the library's."""
    ignored: list[str]
    """Names of tensors that our methods have no place for."""


def tensors_in(content: Any, source: str) -> Weights:
    """The state dict in what a file holds, without the prefixes of wrappers around the model.

    Args:
        content: of `moco.runs.checkpoint_files.read_weights`.
        source: the key and the path, for the error.

    Raises:
        InputError: there is none.
    """
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    weights: Weights = {}
    for name, tensor in content.items() if isinstance(content, dict) else ():
        if isinstance(tensor, Tensor):
            put(weights, re.sub(f"^{WRAPPERS}", "", str(name)), tensor, source)
    if not weights:
        raise InputError(
            f"{source}: holds no tensors by name, neither directly nor in an item state_dict or model"
        )
    return weights


def recognise(weights: Weights, source: str) -> Recognised:
    """Whose weights they are, and which is which.

    Args:
        source: the key and the path, for the error.

    Raises:
        InputError: no project that is known here names its tensors so.
    """
    for layout in LAYOUTS:
        if all(any(re.match(mark, name) for name in weights) for mark in layout.marks):
            break
    else:
        raise InputError(
            f"{source}: tensors named {listed(weights)} are of no known format (known: "
            f"{', '.join(layout.origin for layout in LAYOUTS)})"
        )
    ours: Weights = {}
    ignored = []
    for name, tensor in weights.items():
        pattern = next((pattern for pattern in layout.names if re.match(pattern, name)), None)
        renamed = (
            "" if pattern is None else re.sub(f"^{pattern}", layout.names[pattern], name, count=1)
        )
        if pattern is None or renamed.startswith(BACKBONE_CLASSIFIERS):
            ignored.append(name)
        else:
            put(ours, renamed, tensor, source)
    ignored += drop_unusable_queues(ours)
    for part in HEADS:
        head, others = split(ours, part)
        inner = "layers." if "dense" in part else ""
        ours = others | {
            f"{part}{inner}{name}": x
            for name, x in in_our_order(head, is_dense=bool(inner)).items()
        }
    return Recognised(layout.origin, with_queues(ours), ignored)


def put(weights: Weights, name: str, tensor: Tensor, source: str) -> None:
    """Add a tensor; the same under another name, which some projects save twice, may be there already.

    Raises:
        InputError: another tensor has that name.
    """
    there = weights.setdefault(name, tensor)
    if there.shape != tensor.shape or there.dtype != tensor.dtype or not torch.equal(there, tensor):
        raise InputError(f"{source}: two different tensors stand for {name}")


def split(weights: Weights, prefix: str) -> tuple[Weights, Weights]:
    """The tensors whose names begin so, without the beginning, and the others."""
    these = {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.items()
        if name.startswith(prefix)
    }
    return these, {name: tensor for name, tensor in weights.items() if not name.startswith(prefix)}


def in_our_order(head: Weights, is_dense: bool) -> Weights:
    """A head's tensors under the numbers that `moco.models.heads` gives its layers.

    Whatever the layers are called, their numbers say their order, one without a number is the last, and a linear layer comes
    before the BatchNorm of the same number. Between two linear layers is a ReLU.

    Args:
        is_dense: the linear layers are 1x1 convolutions, and not alone.
    """
    layers: dict[str, Weights] = {}
    for name, tensor in head.items():
        layer, _, parameter = name.rpartition(".")
        layers.setdefault(layer, {})[parameter] = tensor
    linear = {
        layer
        for layer, tensors in layers.items()
        if "weight" in tensors and tensors["weight"].ndim >= 2
    }
    order = sorted(layers, key=lambda layer: (number_in(layer), layer not in linear))
    ours: Weights = {}
    place = 0
    for count, layer in enumerate(order):
        place += layer in linear and count > 0
        prefix = f"{place}." if len(order) > 1 or is_dense else ""
        ours |= {prefix + parameter: tensor for parameter, tensor in layers[layer].items()}
        place += 1
    return {
        name: x[:, :, None, None] if is_dense and x.ndim == 2 else x for name, x in ours.items()
    }


def number_in(name: str) -> float:
    """The last number in a layer's name; infinity if it has none."""
    numbers = re.findall(r"\d+", name)
    return int(numbers[-1]) if numbers else float("inf")


def drop_unusable_queues(weights: Weights) -> list[str]:
    """Take out what stands in a queue's place and cannot be one; its names."""
    unusable = []
    for queue in QUEUES:
        keys, pointer = weights.get(queue + "keys"), weights.get(queue + "pointer")
        if keys is not None and not (
            keys.is_floating_point()
            and keys.numel()
            and (keys.ndim == 2 or keys.shape[:-2] == (2,))
        ):
            unusable.append(queue + "keys")
        if pointer is not None and pointer.numel() != 1:
            unusable.append(queue + "pointer")
    for name in unusable:
        del weights[name]
    return unusable


def with_queues(weights: Weights) -> Weights:
    """The weights with their queues in the form of `KeyQueue`: rows of keys, pointer, and all of them filled."""
    weights = dict(weights)
    keys = weights.get("queue.keys")
    if (
        keys is not None and keys.ndim == 3
    ):  # solo-learn's (2, C, K): the first view's keys, then the second's
        weights |= {"reverse_queue.keys": keys[0], "queue.keys": keys[1]}
    pointer = weights.get("queue.pointer", torch.zeros(1))
    for queue in QUEUES:
        if queue + "keys" in weights:
            rows = rows_of_unit_norm(weights[queue + "keys"])  # (K, C)
            weights |= {
                queue + "keys": rows,
                queue + "pointer": weights.get(queue + "pointer", pointer).reshape(()).long(),
                queue + "filled": torch.tensor(len(rows)),
            }
    return weights


def rows_of_unit_norm(keys: Tensor) -> Tensor:
    """A queue as (K, C), which nearly all projects store as (C, K)."""
    return (
        keys.T
        if (keys.norm(dim=0) - 1).abs().mean() < (keys.norm(dim=1) - 1).abs().mean()
        else keys
    ).contiguous()


def backbone_weights(weights: Weights, backbone: nn.Module) -> Weights:
    """The state dict that `backbone` should load, of one under the names of another library, or ours.

    Nothing makes sure that it fits: see `misfit`.

    Raises:
        InputError: they were pretrained with another window, or other positions, than the backbone has.
    """
    weights = merging_before_its_stage(from_sequential(weights))
    if isinstance(backbone, Swin):
        tables = first_of_each_stage(weights, COORDINATES)
        if len(tables) == len(backbone.pretrained_window_size):
            check_pretrained_windows(tables, backbone.pretrained_window_size)
    weights = {name: x for name, x in weights.items() if not name.endswith(COMPUTED)}
    if any(name.startswith("patch_embed.") for name in weights):
        try:
            weights = from_timm(weights, backbone)
        except KeyError:
            # A Swin V2's biases, or half of them, and a backbone without a place for such, as a ResNet is. `misfit` names
            # what does not fit of the weights as they are.
            return weights
    else:
        weights = from_torchvision(weights, backbone)
    # Files from before PyTorch 0.4.1 have no such counters.
    counters = {
        name: x for name, x in backbone.state_dict().items() if name.endswith("num_batches_tracked")
    }
    return {
        name: torch.zeros_like(x, device="cpu")
        for name, x in counters.items()
        if name not in weights
    } | weights


def from_sequential(weights: Weights) -> Weights:
    """Return a ResNet's names, where it was made an nn.Sequential of its children.

    The first two are conv1 and bn1. The four layers are those that hold blocks. Where they begin
    depends on the modules without tensors before them: torchvision's children have ReLU and
    max-pool there (lightly's examples), the official notebook has ReLU alone, and lightly's own
    ResNet has neither. The last one calls a downsample shortcut.
    """
    if "0.weight" not in weights:
        return weights
    stages = [int(name.partition(".")[0]) for name in weights if re.match(r"\d+\.\d+\.", name)]
    first = min(stages, default=4)
    children = {"0": "conv1", "1": "bn1"}
    for number in range(4):
        children[str(first + number)] = f"layer{number + 1}"
    renamed = {}
    for name, tensor in weights.items():
        child, _, rest = name.partition(".")
        renamed[f"{children.get(child, child)}.{rest.replace('shortcut.', 'downsample.')}"] = tensor
    return renamed


def merging_before_its_stage(weights: Weights) -> Weights:
    """A Swin's names as in timm since 0.9: Microsoft and older timm count a merging to the stage before it."""
    if not any(name.startswith("layers.0.downsample.") for name in weights):
        return weights
    moved = re.compile(r"^layers\.(\d)\.downsample\.")
    return {
        moved.sub(lambda found: f"layers.{int(found[1]) + 1}.downsample.", name): x
        for name, x in weights.items()
    }


def misfit(weights: Weights, expected: Weights) -> str | None:
    """In which first tensor the weights differ from a module's state dict, and how many more do; None if in none."""
    shapes = {name: tuple(x.shape) for name, x in expected.items()}
    found = [
        f"{name} is {tuple(x.shape)} and should be {shapes[name]}"
        for name, x in weights.items()
        if name in shapes and x.shape != shapes[name]
    ]
    found += [f"{name} {shape} is missing" for name, shape in shapes.items() if name not in weights]
    found += [
        f"{name} {tuple(x.shape)} has no counterpart"
        for name, x in weights.items()
        if name not in shapes
    ]
    more = f", and {len(found) - 1} more differ" if len(found) > 1 else ""
    return found[0] + more if found else None


def settings_seen(weights: Weights, name: str, origin: str = "") -> dict[str, Any]:
    """The arguments of `build_backbone` that show in a backbone's weights, under any library's names.

    Args:
        name: of the backbone; what it has no setting for is left out.
        origin: whose weights they are, which decides how a 3x3 stem pads.
    """
    weights = from_sequential(weights)
    seen: dict[str, Any] = {}
    if "conv1.weight" in weights and weights["conv1.weight"].shape[-1] == 3:
        seen["stem"] = "solo_cifar" if origin == SOLO_LEARN else "cifar"
    for positions in ("pos_embed", POSITIONS):
        if positions in weights and (side := learned_grid_side(weights[positions])):
            seen["learned_positions"] = side
    if tables := first_of_each_stage(weights, "relative_position_bias_table"):
        seen["window_size"] = one_or_each([(round(len(table) ** 0.5) + 1) // 2 for table in tables])
    if tables := first_of_each_stage(weights, COORDINATES):
        windows = [(table.shape[1] + 1) // 2 for table in tables]
        seen["window_size"] = one_or_each(windows)
        pretrained = [pretrained_window_of(table) for table in tables]
        seen["pretrained_window_size"] = one_or_each(
            [
                normaliser[0] if normaliser else window
                for normaliser, window in zip(pretrained, windows, strict=True)
            ]
        )
    return {key: value for key, value in seen.items() if key in settings_of_backbone(name)}


def windows_in_name(file_name: str) -> dict[str, Any]:
    """The arguments of `build_backbone` for the windows that the name of a Swin V2's file says.

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
        return {}  # no name that timm or Microsoft gave
    return {
        "window_size": windows[1],
        "pretrained_window_size": list(clipped_windows(int(image_size), windows[0])),
    }


def first_of_each_stage(weights: Weights, ending: str) -> list[Tensor]:
    """Of the tensors in a Swin's blocks whose names end so, the first of each stage."""
    names = sorted(
        name for name in weights if re.match(rf"(features|layers)\.\d\..*\.{ending}$", name)
    )
    return [
        weights[next(stage)] for _, stage in groupby(names, key=lambda name: name.split(".")[1])
    ]


def fitting_backbones(weights: Weights) -> list[dict[str, Any]]:
    """The arguments of `build_backbone`, for every backbone whose tensors have the same names and shapes."""
    fitting = []
    for name in BACKBONES:
        settings = {"name": name, **settings_seen(weights, name)}
        try:
            backbone = outline(
                **{key: tuple(x) if isinstance(x, list) else x for key, x in settings.items()}
            )
            is_fitting = misfit(backbone_weights(weights, backbone), backbone.state_dict()) is None
        except InputError:  # Swin V1 has no pretraining window
            continue
        if is_fitting:
            fitting.append(settings)
    return fitting


@functools.cache
def outline(**settings: Any) -> Any:
    """The backbone of these settings without memory for its tensors. All of them take a second, so they are kept."""
    with torch.device("meta"):
        return build_backbone(**settings)


def head_settings(head: Weights) -> dict[str, Any]:
    """The arguments of `build_head`, but the input's width, that make such a head, under our names.

    A head that `build_head` cannot make, as one with a scale in its last BatchNorm, is not told from a similar one: see
    `misfit`.
    """
    linear = {name: x for name, x in head.items() if name.endswith("weight") and x.ndim >= 2}
    widths = [len(x) for x in linear.values()]
    means = [number_in(name) for name in head if name.endswith("running_mean")]
    last = max(map(number_in, linear))
    return {
        "output_dim": widths[-1],
        "num_layers": len(linear),
        "hidden_dim": widths[0] if len(widths) > 1 else None,
        "hidden_batch_norm": any(number < last for number in means),
        "last_batch_norm": any(number > last for number in means),
        "bias": any(name.replace("weight", "bias") in head for name in linear),
    }


def listed(names: Iterable[str]) -> str:
    """Names for a line: all if they are few, else how many begin with which word."""
    names = list(names)
    if len(names) <= LONGEST_LIST:
        return ", ".join(names)
    groups = Counter(name.partition(".")[0] for name in names)
    shown = [
        f"{group}.* ({count})" if count > 1 else group
        for group, count in groups.most_common(LONGEST_LIST)
    ]
    return ", ".join(shown) + (", ..." if len(groups) > LONGEST_LIST else "")


def listed_parts(weights: Weights) -> str:
    """The parts of a method that weights under our names are of, and how many tensors each has."""
    counts = {part: sum(name.startswith(part) for name in weights) for part in METHOD_PARTS}
    return ", ".join(f"{METHOD_PARTS[part]} ({count})" for part, count in counts.items() if count)
