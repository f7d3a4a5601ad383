"""The files that this project writes of a backbone alone, and how to read them.

``backbone.pth`` is what every run leaves behind; a safetensors file is what `moco.export` writes.
Both describe their backbone, so it can be built again without any other file.
"""

import json
from pathlib import Path
from typing import Any

import torch

from moco.errors import InputError
from moco.extras import install_command
from moco.runs.atomic_files import write_atomically
from moco.weights.architecture import settings_of
from moco.weights.library_names import Weights

# What a file of a backbone alone holds, and the type of each part.
BACKBONE_PARTS = {
    "state_dict": dict,
    "backbone": dict,
    "encoder": str,
    "image_size": int,
    "mean": list,
    "std": list,
    "epoch": int,
    "step": int,
}
NOT_INSTALLED = "safetensors is not installed: "


def write_backbone_file(
    path: Path, method: Any, config: dict[str, Any], figures: dict[str, Any]
) -> None:
    """Write the query encoder's backbone with torch.save, as plain data that describes itself.

    Args:
        method: a `MoCo`.
        config: the run's config as plain data.
        figures: the run's figures, under the names of ``metrics.json``.
    """
    backbone = method.query_encoder.backbone
    weights = {}
    for name, tensor in backbone.state_dict().items():
        weights[name] = tensor.cpu()
    content = {
        "state_dict": weights,
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


def as_safetensors(weights: Weights, about: dict[str, Any]) -> bytes:
    """Return the content of a safetensors file.

    Args:
        about: plain data to keep beside the weights, as JSON, because metadata are strings.

    Raises:
        InputError: safetensors is not installed.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise InputError(NOT_INSTALLED + install_command("export")) from error
    metadata = {key: json.dumps(value) for key, value in about.items()}
    # Other readers of the format look for "pt".
    return save(weights, {"format": "pt", **metadata})


def read_safetensors(path: str | Path, source: str) -> dict[str, Any]:
    """Return the tensors of a safetensors file as ``state_dict``, on the CPU.

    If `moco.export` wrote the file, the other items are what it wrote about the tensors.

    Args:
        source: what the errors begin with.

    Raises:
        InputError: the file is damaged, or safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        command = install_command("export")
        raise InputError(f"{source}: {NOT_INSTALLED}{command}") from error
    content: dict[str, Any] = {}
    weights = {}
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            for name in file.keys():  # noqa: SIM118 (the file is no dict)
                weights[name] = file.get_tensor(name)
        metadata.pop("format", None)
        # Metadata of other programs need not be JSON.
        if "backbone" in metadata:
            content = {key: json.loads(value) for key, value in metadata.items()}
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{source}: damaged, or no safetensors file ({error})") from error
    return content | {"state_dict": weights}
