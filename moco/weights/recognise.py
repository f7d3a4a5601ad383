"""Recognise whose state dict it is, and give its tensors the names of `moco.methods.moco.MoCo`.

A state dict is recognised by its names alone, see `moco.weights.other_projects`. Tensors of a
backbone keep the names of their library until there is a backbone to compare them with, see
`moco.weights.library_names.to_our_names`.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moco.errors import InputError
from moco.weights.library_names import CLASSIFIERS, Weights
from moco.weights.other_projects import (
    BACKBONE,
    HEADS,
    KEY_BACKBONE,
    LAYOUTS,
    METHOD_PARTS,
    QUEUES,
    Layout,
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


def tensors_in(content: Any) -> Weights:
    """Return the state dict in a file's content, without the prefixes of wrappers.

    Args:
        content: what `moco.weights.weight_files.read_content` returns.

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
                add_tensor(weights, re.sub(WRAPPERS, "", str(name)), value)
    if not weights:
        raise InputError(
            "holds no tensors by name, neither directly nor in an item state_dict or model"
        )
    return weights


def recognise(weights: Weights) -> Recognised:
    """Return whose weights these are, and the tensors under our names.

    Raises:
        InputError: no known project names its tensors like this.
    """
    layout = layout_of(weights)
    ours: Weights = {}
    ignored = []
    for name, tensor in weights.items():
        our_name = renamed(name, layout)
        if our_name is None:
            ignored.append(name)
        else:
            add_tensor(ours, our_name, tensor)

    ignored += use_our_queues(ours)
    for part in HEADS:
        head, ours = split(ours, part)
        is_dense = "dense" in part
        # A dense projector of ours has its layers in a submodule.
        prefix = part + "layers." if is_dense else part
        for name, tensor in renumber_layers(head, is_dense).items():
            ours[prefix + name] = tensor
    return Recognised(layout.origin, ours, ignored)


def layout_of(weights: Weights) -> Layout:
    """Return the first layout all of whose marks are found in the names.

    Raises:
        InputError: there is none.
    """
    for layout in LAYOUTS:
        if all(any(re.match(mark, name) for name in weights) for mark in layout.marks):
            return layout
    known = ", ".join(layout.origin for layout in LAYOUTS)
    raise InputError(f"tensors named {listed(weights)} are of no known format (known: {known})")


def renamed(name: str, layout: Layout) -> str | None:
    """Return our name of a project's tensor; None for a classifier and for unused tensors."""
    for pattern, part in layout.names.items():
        found = re.match(pattern, name)
        if found is None:
            continue
        rest = name[found.end() :]
        if part in (BACKBONE, KEY_BACKBONE) and rest.startswith(CLASSIFIERS):
            return None
        return part + rest
    return None


def add_tensor(weights: Weights, name: str, tensor: Tensor) -> None:
    """Add a tensor. Some projects save the same tensor under two names, which is allowed.

    Raises:
        InputError: another tensor has that name already.
    """
    there = weights.setdefault(name, tensor)
    if there is tensor:
        return
    if there.dtype != tensor.dtype or not torch.equal(there, tensor):
        raise InputError(f"two different tensors stand for {name}")


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


def use_our_queues(weights: Weights) -> list[str]:
    """Give the queues the form of `KeyQueue`: keys, pointer and filled.

    Returns:
        The names of empty queues, which are removed.
    """
    keys = weights.get("queue.keys")
    if keys is not None and keys.ndim == 3:
        # solo-learn's (2, embedding width, queue size): first the first view's keys.
        weights["reverse_queue.keys"], weights["queue.keys"] = keys
    # Projects with two queues fill them in step, so one pointer serves both.
    shared_pointer = weights.get("queue.pointer", torch.zeros(1))
    removed = []
    for queue in QUEUES:
        name = queue + "keys"
        if name not in weights:
            continue
        if weights[name].ndim != 2 or weights[name].numel() == 0:
            removed.append(name)
            del weights[name]
            continue
        rows = rows_of_unit_norm(weights[name])
        pointer = weights.get(queue + "pointer", shared_pointer)
        weights[name] = rows
        weights[queue + "pointer"] = pointer.reshape(()).long()
        weights[queue + "filled"] = torch.tensor(len(rows))
    return removed


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
