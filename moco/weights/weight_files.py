"""Read any file of weights, whoever wrote it, to a state dict under our names.

A file of another project is recognised by the names of its tensors alone, see
`moco.weights.other_projects`, or by those of timm's network that the user names. Tensors of a
backbone keep the names of their library until there is a backbone to compare them with, see
`moco.weights.library_names.to_our_names`.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moco.errors import InputError
from moco.models.timm_backbone import TimmBackbone
from moco.runs.checkpoint_files import (
    CHECKPOINT_PARTS,
    check_parts,
    read_torch_archive,
    read_torch_file,
)
from moco.weights.architecture import build_outline
from moco.weights.backbone_files import BACKBONE_PARTS, read_safetensors
from moco.weights.library_names import CLASSIFIERS, Weights
from moco.weights.other_projects import (
    BACKBONE,
    HEADS,
    KEY_BACKBONE,
    LAYOUTS,
    METHOD_PARTS,
    QUEUES,
    TIMM,
    Layout,
)

log = logging.getLogger(__name__)

ZIP_START = b"PK\x03\x04"
# DistributedDataParallel and torch.compile put these before the names of the model they wrap.
WRAPPERS = r"^(?:module\.|_orig_mod\.)+"
LONGEST_LIST = 6  # names in a line of the log
# The settings of the data that say how files become pixels.
OF_PIXELS = ("bands", "value_range", "nodata", "dicom_window")


@contextmanager
def source_in_errors(source: str) -> Iterator[None]:
    """Begin each error about a file of weights with the key and the path of the file."""
    try:
        yield
    except InputError as error:
        if str(error).startswith(source):
            raise
        raise InputError(f"{source}: {error}") from error


class WeightFile(NamedTuple):
    """What a file of weights holds.

    Attributes:
        origin: who wrote it, for the log.
        weights: under the names of `MoCo`. If `settings` is None, those of the backbones keep the
            names of their library behind the prefix.
        config: the config of the run that made it, as much as is known.
        ignored: the names of tensors that our methods have no place for.
        epoch: epochs that were trained; 0 if the file does not say.
        step: optimizer steps that were trained; 0 if the file does not say.
        settings: the arguments of `build_backbone`; None if the file does not say.
        hyper_parameters: the arguments of `MoCo`, if it is a checkpoint of moco.train.
        encoder: ``query`` or ``key``, if it is one backbone that we wrote.
    """

    origin: str
    weights: Weights
    config: dict[str, Any]
    ignored: Sequence[str] = ()
    epoch: int = 0
    step: int = 0
    settings: dict[str, Any] | None = None
    hyper_parameters: dict[str, Any] | None = None
    encoder: str | None = None


def read_weight_file(path: str, source: str, backbone: nn.Module | None = None) -> WeightFile:
    """Return what a file of weights holds.

    Args:
        source: the key and the path that errors begin with.
        backbone: the one that the user asked for, if any; see `recognise`.

    Raises:
        InputError: the file cannot be read, or its format is unknown.
    """
    content = read_content(path, source)
    if not isinstance(content, dict):
        content = {}  # which holds no tensors by name, as `tensors_in` says
    if content.keys() >= CHECKPOINT_PARTS.keys():
        return from_checkpoint(content, source)
    if content.keys() >= BACKBONE_PARTS.keys():
        return from_backbone_file(content, source)
    # Everything else is another project's.
    file = recognise(tensors_in(content), backbone)
    if isinstance(content.get("epoch"), int):
        file = file._replace(epoch=content["epoch"])
    return file


def from_checkpoint(content: dict[str, Any], source: str) -> WeightFile:
    """Return the content of a checkpoint of moco.train, or the backbone in one of moco.segment.

    Raises:
        InputError: a part is missing.
    """
    check_parts(content, source, CHECKPOINT_PARTS)
    hyper_parameters = content["hyper_parameters"]
    if not isinstance(hyper_parameters.get("backbone"), dict):
        raise InputError("not written by moco.train (its hyper_parameters have no backbone)")
    if is_segmenter(hyper_parameters):
        return from_segmenter(content)
    epoch = content["figures"].get("epoch", 0)
    return WeightFile(
        origin=f"a checkpoint of moco.train, epoch {epoch}",
        weights=content["state_dict"],
        config=content["config"],
        epoch=epoch,
        step=content["global_step"],
        settings=hyper_parameters["backbone"],
        hyper_parameters=hyper_parameters,
    )


def is_segmenter(hyper_parameters: dict[str, Any]) -> bool:
    """Whether a checkpoint with these hyperparameters is of moco.segment, not of moco.train.

    Both may name a decoder: moco.segment with its settings, moco.train by its name alone.
    """
    return isinstance(hyper_parameters.get("decoder"), dict)


def from_segmenter(content: dict[str, Any]) -> WeightFile:
    """Return the fine-tuned backbone in a checkpoint of moco.segment."""
    learned = content["hyper_parameters"]
    epoch = content["figures"].get("epoch", 0)
    of_run = content["config"].get("data", {})
    about_images: dict[str, Any] = {"image_size": learned["image_size"]}
    for key in OF_PIXELS:
        if of_run.get(key) is not None:
            about_images[key] = of_run[key]
    log.info(
        "a checkpoint of moco.segment, epoch %s: its fine-tuned backbone is used, without the "
        "decoder (moco.evaluate evaluation=segmentation measures both)",
        epoch,
    )
    weights = part_of(content["state_dict"], "model.backbone.")
    return WeightFile(
        origin=f"a checkpoint of moco.segment, epoch {epoch}",
        weights={BACKBONE + name: tensor for name, tensor in weights.items()},
        config={
            "data": about_images,
            "augmentation": {"mean": learned["mean"], "std": learned["std"]},
        },
        epoch=epoch,
        step=content["global_step"],
        settings=learned["backbone"],
        encoder=content["config"].get("encoder", "query"),
    )


def from_backbone_file(content: dict[str, Any], source: str) -> WeightFile:
    """Return the content of ``backbone.pth``, or of a safetensors file of moco.export.

    Raises:
        InputError: a part has the wrong type, or the settings are of no backbone.
    """
    content = {"config": {}, **content}
    check_parts(content, source, BACKBONE_PARTS | {"config": dict})
    build_outline(content["backbone"])
    weights = {}
    for name, tensor in content["state_dict"].items():
        weights[BACKBONE + name] = tensor
    about_images = {
        "data": {"image_size": content["image_size"]},
        "augmentation": {"mean": content["mean"], "std": content["std"]},
    }
    return WeightFile(
        origin=f"a backbone of moco.train, epoch {content['epoch']}",
        weights=weights,
        config=about_images | content["config"],
        epoch=content["epoch"],
        step=content["step"],
        settings=content["backbone"],
        encoder=content["encoder"],
    )


def read_content(path: str | Path, source: str) -> Any:
    """Return the content of any project's file of weights: plain data, and tensors on the CPU.

    The file may be of any version of torch.save, or of safetensors. Tensors of safetensors are the
    item ``state_dict``; what `moco.export` wrote about them are the other items. No code in the
    file is run.

    Args:
        source: the key and the path that errors begin with.

    Raises:
        InputError: there is no such file, it is damaged or of another kind, loading it would run
            code, or safetensors is not installed.
    """
    if not Path(path).is_file():
        raise InputError(f"{source}: no such file")
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except PermissionError as error:
        raise InputError(f"{source}: no permission to read it") from error
    if start.startswith(ZIP_START):
        return read_torch_archive(path, source)
    # safetensors begins with the length of its header in 8 bytes, and the header is JSON.
    if start[8:] == b"{":
        return read_safetensors(path, source)
    return read_torch_file(path, source)


def tensors_in(content: dict[str, Any]) -> Weights:
    """Return the state dict in a file's content, without the prefixes of wrappers.

    Raises:
        InputError: the content has no state dict.
    """
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
    weights: Weights = {}
    for name, value in content.items():
        if isinstance(value, Tensor):
            add_tensor(weights, re.sub(WRAPPERS, "", str(name)), value)
    if not weights:
        raise InputError(
            "holds no tensors by name, neither directly nor in an item state_dict or model"
        )
    return weights


def recognise(weights: Weights, backbone: nn.Module | None = None) -> WeightFile:
    """Return whose weights these are, and the tensors under our names.

    Args:
        backbone: the one that the user asked for. A network of timm tells the names of its tensors
            and of its classifier.

    Raises:
        InputError: no known project names its tensors like this.
    """
    if isinstance(backbone, TimmBackbone):
        timms_names = set(backbone.net.state_dict())
        classifier = tuple(backbone.classifier_names())
    else:
        timms_names = set()
        classifier = CLASSIFIERS
    if weights.keys() & timms_names:
        layout = TIMM
    else:
        layout = layout_of(weights)
    ours: Weights = {}
    ignored = []
    for name, tensor in weights.items():
        our_name = renamed(name, layout, classifier)
        if our_name is None:
            ignored.append(name)
        else:
            add_tensor(ours, our_name, tensor)

    ignored += use_our_queues(ours)
    for part in HEADS:
        head, ours = split(ours, part)
        is_dense = "dense" in part
        prefix = part
        if is_dense:  # a dense projector of ours has its layers in a submodule
            prefix += "layers."
        for name, tensor in renumber_layers(head, is_dense).items():
            ours[prefix + name] = tensor
    return WeightFile(layout.origin, ours, {}, ignored)


def layout_of(weights: Weights) -> Layout:
    """Return the first layout all of whose marks are found in the names.

    Raises:
        InputError: there is none.
    """
    names = "\n".join(weights)  # one a line, so that ^ and $ are the ends of a name
    for layout in LAYOUTS:
        if all(re.search(rf"^(?:{mark})", names, re.MULTILINE) for mark in layout.marks):
            return layout
    known = ", ".join(layout.origin for layout in LAYOUTS)
    raise InputError(
        f"tensors named {listed(weights)} are of no known format (known: {known}; for a network of "
        "timm give backbone=timm backbone.model=NAME)"
    )


def renamed(name: str, layout: Layout, classifier: tuple[str, ...]) -> str | None:
    """Return our name of a project's tensor; None for a classifier and for unused tensors.

    Args:
        classifier: how the names of a classifier's tensors begin, behind those of the backbone.
    """
    for pattern, part in layout.names.items():
        found = re.match(pattern, name)
        if found is None:
            continue
        rest = name[found.end() :]
        if part in (BACKBONE, KEY_BACKBONE) and rest.startswith(classifier):
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


def part_of(weights: Weights, prefix: str) -> Weights:
    """Return the tensors whose names begin with a prefix, without that prefix."""
    return split(weights, prefix)[0]


def split(weights: Weights, prefix: str) -> tuple[Weights, Weights]:
    """Return `part_of`, and the other tensors."""
    part = {}
    others = {}
    for name, tensor in weights.items():
        if name.startswith(prefix):
            part[name.removeprefix(prefix)] = tensor
        else:
            others[name] = tensor
    return part, others


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
        if count > 1:
            group += f".* ({count})"
        shown.append(group)
    if len(groups) > LONGEST_LIST:
        shown.append("...")
    return ", ".join(shown)


def listed_parts(names: Iterable[str]) -> str:
    """Return the parts of a method that tensors are of, with the number of tensors of each."""
    names = list(names)
    shown = []
    for prefix, part in METHOD_PARTS.items():
        count = sum(name.startswith(prefix) for name in names)
        if count:
            shown.append(f"{part.title} ({count})")
    return ", ".join(shown)


def log_unused(unused: Iterable[str], file: WeightFile) -> None:
    """Log what a file holds and nobody takes."""
    lists = [listed_parts(unused), listed(file.ignored)]
    if any(lists):
        log.info("not used: %s", "; ".join(filter(None, lists)))
