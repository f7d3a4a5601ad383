"""What a step of the large recipes keeps and sends, per device, and how long the recipes take at a measured speed.

    python scripts/scaling.py [--images-per-second 1500 --bandwidth 20]

Counted on the real models: parameters, optimizer and queue in bytes; what autograd keeps for one image (every storage that
is saved for backward, parameters left out), in fp32 and under bf16 autocast; bytes that a process receives in a step.
Computed from them: hours on 1, 8 and 64 devices, the network either hidden behind the backward pass or not at all.
"""

import argparse
import dataclasses
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moco.cli.build_pretraining import build_method
from moco.config.parsing import CONFIG_DIR, parse, register_schemas
from moco.config.train import TrainConfig
from moco.methods.losses import info_nce
from moco.methods.moco import MoCo
from moco.models.encoder import has_batch_norm

RECIPES = ("imagenet_moco_v2_resnet50", "imagenet_moby_swin_v2_t")
IMAGENET = 1_281_167
DEVICES = (1, 8, 64)
GIB, MIB = 2**30, 2**20


def composed(experiment: str) -> TrainConfig:
    """The recipe's config."""
    register_schemas()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return parse(compose("train", [f"+experiment={experiment}", "data.root=."]), TrainConfig)


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def kept_bytes(method: MoCo, image_size: int, precision: str, batch: int = 8) -> float:
    """Bytes per image that the forward passes of a step keep for backward."""
    held = {parameter.untyped_storage().data_ptr() for parameter in method.parameters()}
    storages: dict[
        int, Tensor
    ] = {}  # the tensors too, so that no storage is freed and its address used again

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in held:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    images = torch.randn(batch, 3, image_size, image_size)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        views = [images] * (1 + method.symmetric)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            queries, keys = method.encode_queries(views), method.encode_keys(views)
        for query, key in zip(queries, keys, strict=True):
            # The queue's copy is one for all images, and counted with the states.
            info_nce(query.embedding, key.embedding, method.queue.keys[:1], method.temperature)
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values()) / batch


def measured(experiment: str) -> dict[str, float]:
    """The figures of a recipe that need no clock."""
    config = composed(experiment)
    torch.manual_seed(0)
    method = build_method(dataclasses.asdict(config))
    trainable = [parameter for parameter in method.parameters() if parameter.requires_grad]
    states = 2 if config.optimizer.name == "adamw" else 1
    directions = 1 + config.method.symmetric
    is_shuffled = config.method.batch_norm == "auto" and has_batch_norm(method.key_encoder)
    queues = (
        bytes_of(queue.keys for queue in set(method.queues)) * 2
    )  # and the copy that a step's loss works on
    return {
        "batch": config.data.batch_size,
        "epochs": config.trainer.max_epochs,
        "parameters": sum(parameter.numel() for parameter in trainable),
        "states": bytes_of(method.parameters()) + bytes_of(trainable) * (1 + states) + queues,
        "kept fp32": kept_bytes(method, 224, "fp32"),
        "kept bf16": kept_bytes(method, 224, "bf16"),
        "gradients": bytes_of(trainable),
        "keys": directions * config.data.batch_size * config.method.embedding_dim * 4,
        "images": directions * config.data.batch_size * 3 * 224 * 224 * 4 if is_shuffled else 0,
    }


def received(figures: dict[str, float], devices: int) -> dict[str, float]:
    """Bytes that one process receives in a step: a ring's all-reduce, keys of the others, its share of shuffled images."""
    others = (devices - 1) / devices
    return {
        "gradients": 2 * others * figures["gradients"],
        "keys": others * figures["keys"],
        "images": others * figures["images"] / devices,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images-per-second", type=float, help="of one device, measured by a run")
    parser.add_argument(
        "--bandwidth", type=float, default=20.0, help="GB/s that a process receives with"
    )
    arguments = parser.parse_args()
    console = Console(width=140)
    for experiment in RECIPES:
        figures = measured(experiment)
        per_device = Table(
            "devices", "images each", "states", "kept fp32", "kept bf16", "gradients in", "keys in", "shuffled images in",
            *(["hours, hidden", "hours, not hidden"] if arguments.images_per_second else []),
            title=f"{experiment}: {figures['parameters'] / 1e6:.1f} M parameters, batch {figures['batch']}",
        )  # fmt: skip
        for devices in DEVICES:
            each = figures["batch"] / devices
            traffic = received(figures, devices)
            row = [
                f"{devices}", f"{each:g}", f"{figures['states'] / GIB:.2f} GiB",
                *(f"{each * figures[f'kept {precision}'] / GIB:.1f} GiB" for precision in ("fp32", "bf16")),
                *(f"{traffic[name] / MIB:,.1f} MiB" for name in ("gradients", "keys", "images")),
            ]  # fmt: skip
            if speed := arguments.images_per_second:
                steps = figures["epochs"] * (IMAGENET // figures["batch"])
                computing, sending = (
                    each / speed,
                    sum(traffic.values()) / (arguments.bandwidth * 1e9),
                )
                row += [
                    f"{steps * seconds / 3600:.1f}"
                    for seconds in (max(computing, sending), computing + sending)
                ]
            per_device.add_row(*row)
        console.print(per_device)


if __name__ == "__main__":
    main()
