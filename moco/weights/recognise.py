"""Recognise whose state dict it is, and give its tensors the names of `moco.methods.moco.MoCo`.

A state dict is recognised by its names alone, see `moco.weights.layouts`. Tensors of a backbone
keep the names of their library until there is a backbone to compare them with, see
`moco.weights.library_names.to_our_names`.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moco.errors import InputError
from moco.weights.layouts import KEY, LAYOUTS, METHOD_PARTS, QUERY, QUEUES, Layout
from moco.weights.library_names import CLASSIFIERS, Weights

HEADS = (
    "query_encoder.projector.",
    "query_encoder.dense_projector.",
    "predictor.",
    "key_encoder.projector.",
    "key_encoder.dense_projector.",
)
# DistributedDataParallel and torch.compile put these before the names of the model they wrap.
WRAPPERS = r"^(?:module\.|_orig_mod\.)+"
LONGEST_LIST = 6  # names in a line of the log


class Recognised(NamedTuple):
    """A state dict whose origin is known.

    Attributes:
        origin: the project that wrote it.
        weights: the tensors under the names of our method. Those of a backbone keep the names of
            their library behind the prefix.
        ignored: the names of tensors that our methods have no place for.
    """

    origin: str
    weights: Weights
    ignored: list[str]


def tensors_in(content: Any, source: str) -> Weights:
    """Return the state dict in a file's content, without the prefixes of wrappers.

    Args:
        content: what `moco.weights.reading.read_content` returns.
        source: the key and the path that errors begin with.

    Raises:
        InputError: the content has no state dict.
    """
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    weights: Weights = {}
    if isinstance(content, dict):
        for name, value in content.items():
            if isinstance(value, Tensor):
                add_tensor(weights, re.sub(WRAPPERS, "", str(name)), value, source)
    if not weights:
        raise InputError(
            f"{source}: holds no tensors by name, "
            "neither directly nor in an item state_dict or model"
        )
    return weights


def recognise(weights: Weights, source: str) -> Recognised:
    """Return whose weights these are, and the tensors under our names.

    Args:
        source: the key and the path that errors begin with.

    Raises:
        InputError: no known project names its tensors like this.
    """
    layout = layout_of(weights, source)
    ours: Weights = {}
    ignored = []
    for name, tensor in weights.items():
        our_name = renamed(name, layout)
        if our_name is None or is_classifier(our_name):
            ignored.append(name)
        else:
            add_tensor(ours, our_name, tensor, source)

    # A tensor that is only named like a queue would break the code below.
    ignored += remove_unusable_queues(ours)
    for part in HEADS:
        head, ours = split(ours, part)
        is_dense = "dense" in part
        # A dense projector of ours has its layers in a submodule.
        prefix = part + "layers." if is_dense else part
        for name, tensor in renumber_layers(head, is_dense).items():
            ours[prefix + name] = tensor
    return Recognised(layout.origin, with_our_queues(ours), ignored)


def layout_of(weights: Weights, source: str) -> Layout:
    """Return the first layout all of whose marks are found in the names.

    Raises:
        InputError: there is none.
    """
    for layout in LAYOUTS:
        found = [any(re.match(mark, name) for name in weights) for mark in layout.marks]
        if all(found):
            return layout
    known = ", ".join(layout.origin for layout in LAYOUTS)
    raise InputError(
        f"{source}: tensors named {listed(weights)} are of no known format (known: {known})"
    )


def renamed(name: str, layout: Layout) -> str | None:
    """Return our name of a project's tensor, or None if we have no place for it."""
    for pattern, replacement in layout.names.items():
        if re.match(pattern, name):
            return re.sub(f"^{pattern}", replacement, name, count=1)
    return None


def is_classifier(our_name: str) -> bool:
    """Return whether a tensor is of a classifier on top of a backbone."""
    for encoder in (QUERY, KEY):
        name = our_name.removeprefix(f"{encoder}backbone.")
        if name != our_name:
            return name.startswith(CLASSIFIERS)
    return False


def add_tensor(weights: Weights, name: str, tensor: Tensor, source: str) -> None:
    """Add a tensor. Some projects save the same tensor under two names, which is allowed.

    Raises:
        InputError: another tensor has that name already.
    """
    there = weights.setdefault(name, tensor)
    if there is tensor:
        return
    is_same_kind = there.shape == tensor.shape and there.dtype == tensor.dtype
    if not is_same_kind or not torch.equal(there, tensor):
        raise InputError(f"{source}: two different tensors stand for {name}")


def split(weights: Weights, prefix: str) -> tuple[Weights, Weights]:
    """Return the tensors whose names begin with a prefix, without that prefix, and the others."""
    these = {}
    others = {}
    for name, tensor in weights.items():
        if name.startswith(prefix):
            these[name.removeprefix(prefix)] = tensor
        else:
            others[name] = tensor
    return these, others


def renumber_layers(head: Weights, is_dense: bool) -> Weights:
    """Return a head's tensors under the numbers that `moco.models.heads` gives its layers.

    Whatever the layers are called, their numbers say their order. A layer without a number is the
    last one. A linear layer comes before the BatchNorm of the same number, and there is a ReLU
    before every linear layer but the first.

    Args:
        is_dense: the linear layers are 1x1 convolutions, and are numbered even if there is one.
    """
    layers: dict[str, Weights] = {}
    linear_layers = set()
    # Group the tensors by layer: weight and bias, or the statistics of a BatchNorm.
    for name, tensor in head.items():
        layer, _, parameter = name.rpartition(".")
        layers.setdefault(layer, {})[parameter] = tensor
        if parameter == "weight" and tensor.ndim >= 2:
            linear_layers.add(layer)

    in_order = sorted(layers, key=lambda layer: (last_number(layer), layer not in linear_layers))
    ours: Weights = {}
    number = 0
    for layer in in_order:
        if layer in linear_layers and number > 0:
            number += 1  # The ReLU has no tensors.
        for parameter, tensor in layers[layer].items():
            if is_dense and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
            if len(layers) > 1 or is_dense:
                parameter = f"{number}.{parameter}"
            ours[parameter] = tensor
        number += 1
    return ours


def last_number(name: str) -> float:
    """Return the last number in a layer's name, infinity if it has none."""
    numbers = re.findall(r"\d+", name)
    if not numbers:
        return float("inf")
    return int(numbers[-1])


def remove_unusable_queues(weights: Weights) -> list[str]:
    """Remove what is named like a queue but cannot be one, and return its names."""
    removed = []
    for queue in QUEUES:
        keys = weights.get(queue + "keys")
        if keys is not None and not is_queue(keys, queue):
            removed.append(queue + "keys")
        pointer = weights.get(queue + "pointer")
        if pointer is not None and pointer.numel() != 1:
            removed.append(queue + "pointer")
    for name in removed:
        del weights[name]
    return removed


def is_queue(keys: Tensor, queue: str) -> bool:
    """Return whether the tensor can hold a queue's keys: a matrix, or two as solo-learn has."""
    if not keys.is_floating_point() or keys.numel() == 0:
        return False
    if queue == "queue." and keys.ndim == 3:
        return len(keys) == 2
    return keys.ndim == 2


def with_our_queues(weights: Weights) -> Weights:
    """Return the weights with their queues in the form of `KeyQueue`: keys, pointer and filled."""
    weights = dict(weights)
    keys = weights.get("queue.keys")
    if keys is not None and keys.ndim == 3:
        # solo-learn's (2, embedding width, queue size): first the first view's keys.
        weights["reverse_queue.keys"] = keys[0]
        weights["queue.keys"] = keys[1]
    # Projects with two queues fill them in step, so one pointer serves both.
    shared_pointer = weights.get("queue.pointer", torch.zeros(1))
    for queue in QUEUES:
        if queue + "keys" not in weights:
            continue
        rows = rows_of_unit_norm(weights[queue + "keys"])
        pointer = weights.get(queue + "pointer", shared_pointer)
        weights[queue + "keys"] = rows
        weights[queue + "pointer"] = pointer.reshape(()).long()
        weights[queue + "filled"] = torch.tensor(len(rows))
    return weights


def rows_of_unit_norm(keys: Tensor) -> Tensor:
    """Return a queue as (queue size, embedding width). Nearly all projects store it transposed.

    The keys have unit norm, which tells rows from columns.
    """
    error_of_rows = (keys.norm(dim=1) - 1).abs().mean()
    error_of_columns = (keys.norm(dim=0) - 1).abs().mean()
    if error_of_columns < error_of_rows:
        keys = keys.T
    return keys.contiguous()


def listed(names: Iterable[str]) -> str:
    """Return names for one line: all if they are few, else how many begin with which word."""
    names = list(names)
    if len(names) <= LONGEST_LIST:
        return ", ".join(names)
    groups = Counter(name.partition(".")[0] for name in names)
    shown = []
    for group, count in groups.most_common(LONGEST_LIST):
        shown.append(f"{group}.* ({count})" if count > 1 else group)
    if len(groups) > LONGEST_LIST:
        shown.append("...")
    return ", ".join(shown)


def listed_parts(weights: Weights) -> str:
    """Return the parts of a method that the tensors are of, with the number of tensors of each."""
    shown = []
    for prefix, part in METHOD_PARTS.items():
        count = sum(name.startswith(prefix) for name in weights)
        if count:
            shown.append(f"{part} ({count})")
    return ", ".join(shown)


def listed_unused(unused: Weights, ignored: list[str]) -> str:
    """Return for one line what a file holds and nobody takes; an empty string if there is none."""
    lists = [listed_parts(unused), listed(ignored)]
    return "; ".join(text for text in lists if text)
