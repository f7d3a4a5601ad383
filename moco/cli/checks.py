"""What a run is held to before its first step."""

import dataclasses
import hashlib
import importlib.util
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moco.config.train import OptimizerConfig, TrainConfig, TrainerConfig
from moco.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from moco.data.augment.resolution_ramp import ResolutionRamp
    from moco.data.loading.datamodule import PretrainingData
    from moco.methods.moco import MoCo
    from moco.models.encoder import Encoder

log = logging.getLogger(__name__)

# torch is imported where it is first needed, as in the programs.


def check_run(resume: str | None, trainer: TrainerConfig) -> None:
    """Raises InputError for what no training can do, whatever the data."""
    if resume not in (None, "auto") and not Path(str(resume)).is_file():
        raise InputError(f"resume={resume}: no such file")
    if trainer.max_steps == 0:
        raise InputError("trainer.max_steps=0: expected -1 for no limit, or at least 1")


def check_output(output: Path) -> None:
    """Raises InputError if no file can be written there; makes nothing."""
    if output.is_dir():
        raise InputError(f"output={output}: a folder; expected the name of a file")
    existing = next(path for path in output.absolute().parents if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"output={output}: cannot write to {existing}")


def check_optimizer(optimizer: OptimizerConfig) -> None:
    """Raises InputError if the optimizer's library is not installed."""
    if optimizer.name == "lars" and importlib.util.find_spec("timm") is None:
        raise InputError("optimizer.name=lars needs timm: pip install 'moco-ssl[lars]'")


def check_devices(trainer: TrainerConfig) -> None:
    """Raise InputError if this machine has no such accelerator, or fewer GPUs than the run wants."""
    from moco.training.hardware import choose_device

    if trainer.accelerator != "cpu":
        choose_device(trainer.accelerator, trainer.devices)


def num_processes(config: TrainConfig) -> int:
    """Processes that train together."""
    return config.trainer.devices * config.trainer.num_nodes


def check_same_images(data: "PretrainingData") -> None:
    """Raises InputError if the processes of a training do not see the same images, or the same shards."""
    from moco.data.loading.streams import ShardedImages
    from moco.training.distributed.collectives import gather_objects, world_size

    if world_size() == 1:
        return
    train = data.source.train
    # Images of shards have no names before they are read.
    names = train.shards if isinstance(train, ShardedImages) else map(train.name, range(len(train)))
    digest = hashlib.blake2b()
    for name in names:
        digest.update(os.fsencode(name) + b"\0")
    if len({*gather_objects((len(train), digest.hexdigest()))}) > 1:
        raise InputError(
            "data.root: the processes of this run do not see the same images; is it the same folder on all nodes?"
        )


def check_batch_norm(encoder: "Encoder", config: TrainConfig) -> None:
    """Raises InputError if its mode is not for these devices, or its groups do not divide the images of one at once.

    Also if what is normalised together is one vector, which has no variance.
    """
    from torch.nn import BatchNorm1d

    from moco.methods.batch_norm import batch_norm_mode
    from moco.training.hardware import choose_device

    method, devices, splits = config.method, num_processes(config), config.method.batch_norm_splits
    device_type = choose_device(config.trainer.accelerator).type
    mode = batch_norm_mode(method.batch_norm, encoder, devices, device_type, method.negatives)
    at_once = config.data.batch_size // (devices * config.trainer.accumulate_grad_batches)
    if mode == "split" and at_once % splits:
        raise InputError(
            f"data.batch_size={config.data.batch_size}: the {at_once} images that a device gets at once are no multiple "
            f"of method.batch_norm_splits={splits}"
        )
    images = at_once // splits if mode == "split" else at_once
    if (
        images == 1
        and mode != "sync"
        and any(isinstance(layer, BatchNorm1d) for layer in encoder.modules())
    ):
        where = (
            f"each of method.batch_norm_splits={splits} groups" if mode == "split" else "a device"
        )
        raise InputError(
            f"data.batch_size={config.data.batch_size}: {where} gets 1 image at once, which has no variance for the "
            "projector's BatchNorm"
        )


def check_deterministic(method: "MoCo", config: TrainConfig, image_sizes: Sequence[int]) -> None:
    """Raise InputError if trainer.deterministic=true would end the run at its first backward pass on a GPU.

    PyTorch refuses adaptive average pooling and bicubic resizing there, see ``torch.use_deterministic_algorithms``. Pooling
    to one cell is a plain mean, and a map or grid that fits is neither pooled nor resized.

    Args:
        image_sizes: sides of all views of the run, px.
    """
    if not must_be_deterministic_on_gpu(config.trainer):
        return
    encoder = method.query_encoder
    backbone: Any = encoder.backbone
    obstacles = resized_positions(backbone, image_sizes)
    if encoder.dense_projector is not None:
        grid = config.method.dense_grid
        side = max(last_map_side(backbone, size) for size in image_sizes)
        if side > grid > 1:
            obstacles.append(
                f"the dense term's pooling of a map of {side} x {side} cells to method.dense_grid={grid} (a grid of {side} "
                "needs no pooling)"
            )
    refuse_nondeterministic(obstacles)


def check_deterministic_segmentation(
    trainer: TrainerConfig, backbone: "nn.Module", decoder: str, image_size: int, is_frozen: bool
) -> None:
    """Raise InputError as `check_deterministic` does, for a backbone that learns to segment.

    Args:
        decoder: its name; UPerNet pools maps to small grids.
        image_size: side of the images, px.
        is_frozen: the backbone is not trained.
    """
    if not must_be_deterministic_on_gpu(trainer):
        return
    obstacles = [] if is_frozen else resized_positions(backbone, [image_size])
    if decoder == "upernet":
        obstacles.append("the pooling of decoder=upernet (decoder=fpn pools nothing)")
    refuse_nondeterministic(obstacles)


def last_map_side(backbone: Any, image_size: int) -> int:
    """Side of a backbone's last map, cells, for square images of `image_size` px."""
    if getattr(backbone, "partial_patches", None) == "drop":
        image_size = image_size // backbone.patch_size * backbone.patch_size
    return int(-(-image_size // backbone.feature_map_strides[-1]))


def must_be_deterministic_on_gpu(trainer: TrainerConfig) -> bool:
    """Whether operations without a deterministic form on a GPU would end the run."""
    from moco.training.hardware import choose_device

    return trainer.deterministic and choose_device(trainer.accelerator).type != "cpu"


def resized_positions(backbone: "nn.Module", image_sizes: Sequence[int]) -> list[str]:
    """Say which learned positions of a ViT are resized for images of these sizes, px; nothing where none are."""
    from moco.models.vit import VisionTransformer

    if not isinstance(backbone, VisionTransformer) or not backbone.learned_positions:
        return []
    learned = backbone.learned_positions
    for size in image_sizes:
        cells = backbone.cells(size)
        if cells != learned:
            return [
                f"the resizing of backbone.learned_positions={learned} to the {cells} x {cells} patches of images of "
                f"{size} px"
            ]
    return []


def refuse_nondeterministic(obstacles: Sequence[str]) -> None:
    """Raise InputError if there are any."""
    if obstacles:
        raise InputError(
            f"trainer.deterministic=true: a GPU has no deterministic form of {'; nor of '.join(obstacles)}; "
            "trainer.deterministic=false runs it"
        )


def check_resolution_ramp(ramp: "ResolutionRamp", backbone: "nn.Module", max_epochs: int) -> None:
    """Say how views grow, and if the run ends before they have.

    Raises:
        InputError: a smaller view is no whole number of the backbone's patches.
    """
    if ramp.start_image_size is None:
        return
    patch = getattr(backbone, "patch_size", 1)
    if broken := [size for size in ramp.sizes[:-1] if size % patch]:
        raise InputError(
            f"augmentation.start_image_size, augmentation.image_size_step: views of {broken[0]} px are no multiple of the "
            f"backbone's patches of {patch} px"
        )
    log.info("views grow over %d epochs: %s", ramp.ramp_epochs, ramp.in_words())
    if ramp.ramp_epochs is not None and ramp.ramp_epochs >= max_epochs:
        log.warning(
            "augmentation.ramp_epochs=%d: the run has %d epochs and no view of %d px, at which it is evaluated",
            ramp.ramp_epochs, max_epochs, ramp.image_size,
        )  # fmt: skip


def warn_of_negatives(config: TrainConfig, num_images: int) -> None:
    """Say if K is more than a tenth of the images, or more than the keys that the run will ever put in.

    Without a queue, say if the batch is taken in parts: each has only its own negatives.

    The largest power of two within a tenth is K of both official recipes: 65,536 for ImageNet, 4,096 for CIFAR-10.
    """
    size, tenth = config.method.queue_size, num_images // 10
    if size is None:
        if (parts := config.trainer.accumulate_grad_batches) > 1:
            log.warning(
                "method.negatives=batch: with trainer.accumulate_grad_batches=%d a query is compared with the %d keys of "
                "its own part of the batch", parts, config.data.batch_size // parts,
            )  # fmt: skip
        return
    num_keys = num_keys_of_run(config, num_images)
    reasons = []
    if size > tenth:
        reasons.append(
            f"more than a tenth of the {num_images} images (older keys of a query's own image are then often among "
            "its negatives)"
        )
    if size > num_keys:
        reasons.append(f"more than the {num_keys} keys that this run will ever put in")
    if reasons:
        fitting = 2 ** (max(min(tenth, num_keys), 1).bit_length() - 1)
        log.warning(
            "method.queue_size=%d is %s; %d would fit", size, ", and ".join(reasons), fitting
        )


def num_keys_of_run(config: TrainConfig, num_images: int) -> int:
    """The keys that one queue is given from the first to the last step."""
    method, trainer, batch_size = config.method, config.trainer, config.data.batch_size
    steps = trainer.max_epochs * (num_images // batch_size)
    if trainer.max_steps > 0:
        steps = min(steps, trainer.max_steps)
    return steps * batch_size * (2 if method.symmetric and method.num_queues == 1 else 1)


def check_resumable(path: Path, checkpoint: dict[str, Any], plain: dict[str, Any]) -> int:
    """The optimizer steps that a checkpoint has behind it.

    Args:
        path: where it was read.
        plain: the run's config as plain data.

    Raises:
        InputError: it holds other tensors than the config's run has; it names the keys.
    """
    from moco.runs.config_changes import completed, differences

    stored = completed(checkpoint["config"], dataclasses.asdict(TrainConfig()))
    there, here = (tensor_settings(config) for config in (stored, plain))
    if differing := differences(there, here):
        raise InputError(
            f"resume={path}: the checkpoint is of another architecture or optimizer: {'; '.join(differing)}"
        )
    return int(checkpoint["global_step"])


def tensor_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide which tensors a run's checkpoint holds, and their shapes."""
    method, optimizer = config["method"], config["optimizer"]
    shapes = ("projector", "predictor", "embedding_dim", "queue_size", "num_queues")
    return {
        "backbone": config["backbone"],
        "method": {key: method[key] for key in shapes}
        | {"dense_weight": "above 0" if method["dense_weight"] else 0},
        "optimizer": {key: optimizer[key] for key in ("name", "decay_all")},
    }
