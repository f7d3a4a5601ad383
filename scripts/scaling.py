"""Compute the memory and network traffic of the large recipes, and their hours at a given speed.

    python scripts/scaling.py [--images-per-second 1500 --bandwidth 20]

Three figures are counted on the real models: the bytes of parameters, optimizer and queue; the
bytes that autograd keeps for one image in fp32 and in bf16 autocast (all storages that are saved
for backward, except parameters); and the bytes that a process receives in a step. The hours on 1, 8
and 64 devices are computed from them, with the communication either fully hidden behind the
backward pass or not at all.
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
from moco.methods.blocked_loss import efficient_info_nce
from moco.methods.moco import MoCo
from moco.models.encoder import has_batch_norm

RECIPES = ("imagenet_moco_v2_resnet50", "imagenet_moby_swin_v2_t")
IMAGENET = 1_281_167
DEVICES = (1, 8, 64)
GIB, MIB = 2**30, 2**20
COLUMNS = (
    "devices",
    "images each",
    "states",
    "kept fp32",
    "kept bf16",
    "gradients in",
    "keys in",
    "shuffled images in",
)


def composed(experiment: str) -> TrainConfig:
    """Return the config of the recipe."""
    register_schemas()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return parse(compose("train", [f"+experiment={experiment}", "data.root=."]), TrainConfig)


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def kept_bytes(method: MoCo, image_size: int, precision: str, batch: int = 8) -> float:
    """Return the bytes per image that the forward passes of a step keep for backward."""
    held = {parameter.untyped_storage().data_ptr() for parameter in method.parameters()}
    # It keeps the tensors, so that no storage is freed and its address used again.
    storages: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in held:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    images = torch.randn(batch, 3, image_size, image_size)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        views = [images] * (1 + method.symmetric)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            queries = method.encode_queries(views)
            keys = method.encode_keys(views)
        for query, key in zip(queries, keys, strict=True):
            # All images share the copy of the queue, which is counted with the states.
            efficient_info_nce(
                query.embedding, key.embedding, method.queue.keys[:1], method.temperature
            )
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values()) / batch


def measured(experiment: str) -> dict[str, float]:
    """Return the figures of a recipe that need no time measurement."""
    config = composed(experiment)
    torch.manual_seed(0)
    method = build_method(dataclasses.asdict(config))
    trainable = [parameter for parameter in method.parameters() if parameter.requires_grad]
    states = 2 if config.optimizer.name == "adamw" else 1
    directions = 1 + config.method.symmetric
    is_shuffled = config.method.batch_norm == "auto" and has_batch_norm(method.key_encoder)
    # Twice, because the loss of a step works on a copy.
    queues = 2 * bytes_of(queue.keys for queue in set(method.queues))
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
    """Return the bytes that one process receives in a step.

    They are the gradients of a ring all-reduce, the keys of the other processes, and its share of
    the shuffled images.
    """
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
        "--bandwidth", type=float, default=20.0, help="GB/s that a process receives"
    )
    arguments = parser.parse_args()
    console = Console(width=140)
    for experiment in RECIPES:
        figures = measured(experiment)
        parameters = f"{figures['parameters'] / 1e6:.1f} M parameters"
        title = f"{experiment}: {parameters}, batch {figures['batch']}"
        per_device = Table(*COLUMNS, title=title)
        if arguments.images_per_second:
            per_device.add_column("hours, hidden")
            per_device.add_column("hours, not hidden")
        for devices in DEVICES:
            each = figures["batch"] / devices
            traffic = received(figures, devices)
            row = [f"{devices}", f"{each:g}", f"{figures['states'] / GIB:.2f} GiB"]
            for precision in ("fp32", "bf16"):
                row.append(f"{each * figures[f'kept {precision}'] / GIB:.1f} GiB")
            for name in ("gradients", "keys", "images"):
                row.append(f"{traffic[name] / MIB:,.1f} MiB")
            if arguments.images_per_second:
                steps = figures["epochs"] * (IMAGENET // figures["batch"])
                computing = each / arguments.images_per_second
                sending = sum(traffic.values()) / (arguments.bandwidth * 1e9)
                row.append(f"{steps * max(computing, sending) / 3600:.1f}")
                row.append(f"{steps * (computing + sending) / 3600:.1f}")
            per_device.add_row(*row)
        console.print(per_device)


if __name__ == "__main__":
    main()
