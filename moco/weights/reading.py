"""Read any file of weights, whoever wrote it, to a state dict under our names."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from moco.errors import InputError
from moco.runs.checkpoint_files import (
    CHECKPOINT_PARTS,
    check_parts,
    read_torch_archive,
    read_torch_file,
)
from moco.weights.architecture import build_outline
from moco.weights.backbone_files import BACKBONE_PARTS, read_safetensors
from moco.weights.layouts import BACKBONE
from moco.weights.library_names import Weights
from moco.weights.recognise import recognise, tensors_in

ZIP_START = b"PK\x03\x04"


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
        ignored: the names of tensors that our methods have no place for.
        epoch: epochs that were trained; 0 if the file does not say.
        step: optimizer steps that were trained; 0 if the file does not say.
        config: the config of the run that made it, as much as is known.
        settings: the arguments of `build_backbone`; None if the file does not say.
        checkpoint: the whole content, if it is a checkpoint of moco.train.
        encoder: ``query`` or ``key``, if it is one backbone that we wrote.
    """

    origin: str
    weights: Weights
    ignored: list[str]
    epoch: int
    step: int
    config: dict[str, Any]
    settings: dict[str, Any] | None = None
    checkpoint: dict[str, Any] | None = None
    encoder: str | None = None


def read_weight_file(path: str, source: str) -> WeightFile:
    """Return what a file of weights holds.

    Args:
        source: the key and the path that errors begin with.

    Raises:
        InputError: the file cannot be read, or its format is unknown.
    """
    content = read_content(path, source)
    keys = content.keys() if isinstance(content, dict) else set()
    if keys >= CHECKPOINT_PARTS.keys():
        return from_checkpoint(content, source)
    if keys >= BACKBONE_PARTS.keys():
        return from_backbone_file(content, source)

    # Everything else is another project's, and is recognised by the names of its tensors.
    recognised = recognise(tensors_in(content))
    epoch = content.get("epoch")
    return WeightFile(
        origin=recognised.origin,
        weights=recognised.weights,
        ignored=recognised.ignored,
        config={},
        epoch=epoch if isinstance(epoch, int) else 0,
        step=0,
    )


def from_checkpoint(content: dict[str, Any], source: str) -> WeightFile:
    """Return the content of a checkpoint of moco.train.

    Raises:
        InputError: another program of ours wrote it, or a part is missing.
    """
    check_parts(content, source, CHECKPOINT_PARTS)
    hyper_parameters = content["hyper_parameters"]
    if "decoder" in hyper_parameters:
        raise InputError("written by moco.segment; expected a checkpoint of moco.train")
    if not isinstance(hyper_parameters.get("backbone"), dict):
        raise InputError("not written by moco.train (its hyper_parameters have no backbone)")
    epoch = content["figures"].get("epoch", 0)
    return WeightFile(
        origin=f"a checkpoint of moco.train, epoch {epoch}",
        weights=content["state_dict"],
        ignored=[],
        settings=hyper_parameters["backbone"],
        config=content["config"],
        epoch=epoch,
        step=content["global_step"],
        checkpoint=content,
    )


def from_backbone_file(content: dict[str, Any], source: str) -> WeightFile:
    """Return the content of ``backbone.pth``, or of a safetensors file of moco.export.

    Raises:
        InputError: a part has the wrong type, or the settings are of no backbone.
    """
    content = {"config": {}, **content}
    check_parts(content, source, BACKBONE_PARTS | {"config": dict})
    build_outline(content["backbone"])
    about_images = {
        "data": {"image_size": content["image_size"]},
        "augmentation": {"mean": content["mean"], "std": content["std"]},
    }
    return WeightFile(
        origin=f"a backbone of moco.train, epoch {content['epoch']}",
        weights={BACKBONE + name: tensor for name, tensor in content["state_dict"].items()},
        ignored=[],
        settings=content["backbone"],
        config=about_images | content["config"],
        epoch=content["epoch"],
        step=content["step"],
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
