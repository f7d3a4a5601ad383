"""What a file of weights holds, whoever has written it; and the file of a run's backbone alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moco.errors import InputError
from moco.weights.layouts import QUERY

if TYPE_CHECKING:
    from torch import nn

    from moco.methods.moco import MoCo
    from moco.weights.library_names import Weights

# torch is imported where it is first needed: what only names these functions starts in a moment.

# What a file of the backbone alone has, and of which kind it is.
BACKBONE_PARTS = {
    "state_dict": dict, "backbone": dict, "encoder": str, "image_size": int, "mean": list, "std": list, "epoch": int,
    "step": int,
}  # fmt: skip


class Held(NamedTuple):
    """What is in a file."""

    origin: str
    weights: "Weights"
    """By the names of `MoCo`; of the backbones by their library's, where `settings` is None."""
    ignored: list[str]
    """Names of tensors that have no place here."""
    settings: dict[str, Any] | None
    """The arguments of `build_backbone`; None: the file does not say."""
    config: dict[str, Any]
    """Of the run that made it, as much as is known."""
    epoch: int
    step: int
    checkpoint: dict[str, Any] | None = None
    """All of it, if it is a whole checkpoint of ours."""
    encoder: str | None = None
    """``query`` or ``key``, if it is one backbone that we have written."""
    named_windows: dict[str, Any] | None = None
    """What the name of another project's file says of windows, see `windows_in_name`."""


def read_held(path: str, source: str) -> Held:
    """What is in a file of weights, whoever has written it.

    Args:
        source: the key and the path, for the errors.

    Raises:
        InputError: it cannot be read, or is of an unknown format.
    """
    from moco.runs.checkpoint_files import CHECKPOINT_PARTS, check_parts, read_weights
    from moco.weights.foreign import recognise, tensors_in, windows_in_name

    content = read_weights(path, source)
    keys = content.keys() if isinstance(content, dict) else set()
    if keys >= CHECKPOINT_PARTS.keys():
        check_parts(content, source)
        hyper_parameters = content["hyper_parameters"]
        if "decoder" in hyper_parameters:
            raise InputError(
                f"{source}: written by moco.segment, and expected is one of moco.train"
            )
        if not isinstance(hyper_parameters.get("backbone"), dict):
            raise InputError(
                f"{source}: not written by moco.train (its hyper_parameters have no backbone)"
            )
        epoch, step = content["figures"].get("epoch", 0), content["global_step"]
        origin = f"a checkpoint of moco.train, epoch {epoch}"
        weights, settings = content["state_dict"], hyper_parameters["backbone"]
        return Held(
            origin, weights, [], settings, content["config"], epoch, step, checkpoint=content
        )
    if keys >= BACKBONE_PARTS.keys():
        check_parts({"config": {}, **content}, source, BACKBONE_PARTS | {"config": dict})
        described(content["backbone"], source)
        of_images = {
            "data": {"image_size": content["image_size"]},
            "augmentation": {"mean": content["mean"], "std": content["std"]},
        }
        return Held(
            f"a backbone of moco.train, epoch {content['epoch']}",
            {f"{QUERY}backbone.{name}": tensor for name, tensor in content["state_dict"].items()},
            [],
            content["backbone"],
            of_images | content.get("config", {}),
            content["epoch"],
            content["step"],
            encoder=content["encoder"],
        )
    origin, weights, ignored = recognise(tensors_in(content, source), source)
    epoch = content.get("epoch") if isinstance(content, dict) else None
    return Held(
        origin,
        weights,
        ignored,
        None,
        {},
        epoch if isinstance(epoch, int) else 0,
        0,
        named_windows=windows_in_name(Path(path).name),
    )


def described(settings: dict[str, Any], source: str) -> "nn.Module":
    """The backbone of a file's settings, without memory for its tensors.

    Raises:
        InputError: they are no settings of a backbone.
    """
    import torch

    from moco.models.backbones import build_backbone

    try:
        with torch.device("meta"):
            return build_backbone(**settings)
    except (TypeError, InputError) as error:
        raise InputError(f"{source}: its settings are of no backbone ({error})") from error


@contextmanager
def named(source: str) -> Iterator[None]:
    """Inside, an error about the weights of a file says which file."""
    try:
        yield
    except InputError as error:
        raise (
            error if str(error).startswith(source) else InputError(f"{source}: {error}")
        ) from error


def write_backbone_file(
    path: Path, method: "MoCo", config: dict[str, Any], figures: dict[str, Any]
) -> None:
    """Write the query encoder's backbone and what is to be known of it: plain data, for `load_pretrained` and anyone else.

    Args:
        config: of the run, as plain data.
        figures: of the run, under the names of ``metrics.json``.
    """
    import torch

    from moco.runs.atomic_files import write_atomically
    from moco.weights.library_names import settings_of

    backbone: Any = method.query_encoder.backbone
    content = {
        "state_dict": {name: tensor.cpu() for name, tensor in backbone.state_dict().items()},
        "backbone": settings_of(backbone, method.hparams["backbone"]),
        "encoder": "query",
        "image_size": config["data"]["image_size"],
        "mean": config["augmentation"]["mean"],
        "std": config["augmentation"]["std"],
        "epoch": figures["epoch"],
        "step": figures["step"],
        "config": config,
    }
    write_atomically(path, lambda file: torch.save(content, file))
