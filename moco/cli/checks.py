"""Checks before the first step of a run: settings that cannot work end it at once, in one line.

torch is imported inside the functions, as in the programs, so that a mistake in the command line
shows in a second.
"""

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


def check_run(resume: str | None, trainer: TrainerConfig) -> None:
    """Raise InputError for settings with which no training can start."""
    if resume not in (None, "auto") and not Path(str(resume)).is_file():
        raise InputError(f"resume={resume}: no such file")
    if trainer.max_steps == 0:
        raise InputError("trainer.max_steps=0: expected -1 for no limit, or at least 1")


def check_output(output: Path) -> None:
    """Raise InputError if no file can be written to `output`. Nothing is created."""
    if output.is_dir():
        raise InputError(f"output={output}: a folder; expected the name of a file")
    existing = next(path for path in output.absolute().parents if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"output={output}: cannot write to {existing}")


def check_optimizer(optimizer: OptimizerConfig) -> None:
    """Raise InputError if the optimizer's library is not installed."""
    if optimizer.name == "lars" and importlib.util.find_spec("timm") is None:
        raise InputError("optimizer.name=lars needs timm: pip install 'moco-ssl[lars]'")


def check_devices(trainer: TrainerConfig) -> None:
    """Raise InputError if this machine lacks the accelerator, or has fewer GPUs than needed."""
    from moco.training.hardware import choose_device

    if trainer.accelerator != "cpu":
        choose_device(trainer.accelerator, trainer.devices)


def num_processes(config: TrainConfig) -> int:
    """Return the number of processes that train together."""
    return config.trainer.devices * config.trainer.num_nodes


def images_per_pass(config: TrainConfig) -> int:
    """Return the number of images that one device gets in one forward pass."""
    return config.data.batch_size // (
        num_processes(config) * config.trainer.accumulate_grad_batches
    )


def check_same_images(data: "PretrainingData") -> None:
    """Raise InputError if the processes of a training see different images or shards."""
    from moco.training.distributed.collectives import gather_objects, world_size

    if world_size() == 1:
        return
    identity = (len(data.source.train), hash_of_names(data))
    if len(set(gather_objects(identity))) > 1:
        raise InputError(
            "data.root: the processes of this run do not see the same images; "
            "is it the same folder on all nodes?"
        )


def hash_of_names(data: "PretrainingData") -> str:
    """Return a hash of the names of all training images, or of all shards."""
    from moco.data.sources.shards import ShardedImages

    train = data.source.train
    if isinstance(train, ShardedImages):
        # The images in shards have no names before they are read.
        names = list(train.shards)
    else:
        names = [train.name(index) for index in range(len(train))]
    digest = hashlib.blake2b()
    for name in names:
        digest.update(os.fsencode(name) + b"\0")
    return digest.hexdigest()


def check_batch_norm(encoder: "Encoder", config: TrainConfig) -> None:
    """Check that the batch-norm mode works with the number of devices and images.

    Raises:
        InputError: the mode does not fit the devices; the images of a device cannot be split into
            equal groups; or a group is one vector, which has no variance.
    """
    from torch.nn import BatchNorm1d

    from moco.methods.batch_norm import batch_norm_mode
    from moco.training.hardware import choose_device

    method = config.method
    splits = method.batch_norm_splits
    device_type = choose_device(config.trainer.accelerator).type
    mode = batch_norm_mode(
        method.batch_norm, encoder, num_processes(config), device_type, method.negatives
    )
    images = images_per_pass(config)
    setting = f"data.batch_size={config.data.batch_size}"
    if mode == "split" and images % splits:
        raise InputError(
            f"{setting}: a device gets {images} images at once, which is no multiple of "
            f"method.batch_norm_splits={splits}"
        )
    if mode == "split":
        images_per_group = images // splits
        group = f"each of method.batch_norm_splits={splits} groups"
    else:
        images_per_group = images
        group = "a device"
    normalises_vectors = any(isinstance(layer, BatchNorm1d) for layer in encoder.modules())
    if images_per_group == 1 and mode != "sync" and normalises_vectors:
        raise InputError(
            f"{setting}: {group} gets 1 image at once, which has no variance for the "
            "projector's BatchNorm"
        )


def check_deterministic(method: "MoCo", config: TrainConfig, image_sizes: Sequence[int]) -> None:
    """Check that ``trainer.deterministic=true`` can work on a GPU.

    PyTorch has no deterministic backward pass of adaptive average pooling and of bicubic resizing
    there, see ``torch.use_deterministic_algorithms``. Pooling to one cell is a plain mean. A map or
    grid that fits is neither pooled nor resized.

    Args:
        method: the method of the run.
        config: the config of the run.
        image_sizes: sides of all views of the run, px.

    Raises:
        InputError: names the operations that would end the run.
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
                f"the dense term's pooling of a map of {side} x {side} cells to "
                f"method.dense_grid={grid} (a grid of {side} needs no pooling)"
            )
    refuse_nondeterministic(obstacles)


def check_deterministic_segmentation(
    trainer: TrainerConfig, backbone: "nn.Module", decoder: str, image_size: int, is_frozen: bool
) -> None:
    """Raise InputError as `check_deterministic` does, for a backbone that learns to segment.

    Args:
        trainer: the settings of the Trainer.
        backbone: the backbone.
        decoder: its name. UPerNet pools feature maps to small grids.
        image_size: side of the images, px.
        is_frozen: the backbone is not trained.
    """
    if not must_be_deterministic_on_gpu(trainer):
        return
    obstacles = []
    if not is_frozen:
        obstacles += resized_positions(backbone, [image_size])
    if decoder == "upernet":
        obstacles.append("the pooling of decoder=upernet (decoder=fpn pools nothing)")
    refuse_nondeterministic(obstacles)


def last_map_side(backbone: Any, image_size: int) -> int:
    """Return the side of a backbone's last feature map, cells, for square images.

    Args:
        backbone: under the backbone contract.
        image_size: side of the images, px.
    """
    if getattr(backbone, "partial_patches", None) == "drop":
        image_size = image_size // backbone.patch_size * backbone.patch_size
    stride = backbone.feature_map_strides[-1]
    return int(-(-image_size // stride))  # rounded up


def must_be_deterministic_on_gpu(trainer: TrainerConfig) -> bool:
    """Whether an operation without a deterministic form on a GPU would end the run."""
    from moco.training.hardware import choose_device

    return trainer.deterministic and choose_device(trainer.accelerator).type != "cpu"


def resized_positions(backbone: "nn.Module", image_sizes: Sequence[int]) -> list[str]:
    """Return a description of the learned positions of a ViT that such images resize.

    Args:
        backbone: any backbone; only a ViT has learned positions.
        image_sizes: sides of the images, px.

    Returns:
        One description, or none if nothing is resized.
    """
    from moco.models.vit import VisionTransformer

    if not isinstance(backbone, VisionTransformer) or not backbone.learned_positions:
        return []
    learned = backbone.learned_positions
    for size in image_sizes:
        cells = backbone.cells(size)
        if cells != learned:
            return [
                f"the resizing of backbone.learned_positions={learned} to the {cells} x {cells} "
                f"patches of images of {size} px"
            ]
    return []


def refuse_nondeterministic(obstacles: Sequence[str]) -> None:
    """Raise InputError if there are obstacles to a deterministic run."""
    if obstacles:
        raise InputError(
            "trainer.deterministic=true: a GPU has no deterministic form of "
            f"{'; nor of '.join(obstacles)}; trainer.deterministic=false runs it"
        )


def check_resolution_ramp(ramp: "ResolutionRamp", backbone: "nn.Module", max_epochs: int) -> None:
    """Check and log how the views grow. Warn if the run ends before they have.

    Raises:
        InputError: a smaller view is no whole number of the backbone's patches.
    """
    if ramp.start_image_size is None:
        return
    patch = getattr(backbone, "patch_size", 1)
    for size in ramp.sizes[:-1]:
        if size % patch:
            raise InputError(
                "augmentation.start_image_size, augmentation.image_size_step: views of "
                f"{size} px are no multiple of the backbone's patches of {patch} px"
            )
    log.info("views grow over %d epochs: %s", ramp.ramp_epochs, ramp.in_words())
    if ramp.ramp_epochs is not None and ramp.ramp_epochs >= max_epochs:
        log.warning(
            "augmentation.ramp_epochs=%d: the run has only %d epochs, so no view ever has %d px, "
            "the size at which the run is evaluated",
            ramp.ramp_epochs,
            max_epochs,
            ramp.image_size,
        )


def warn_of_negatives(config: TrainConfig, num_images: int) -> None:
    """Warn if the number of negatives does not fit the dataset or the batch.

    With a queue: if it holds more keys than a tenth of the images, or more than the run ever
    produces. The largest power of two within a tenth is the queue size of both official recipes:
    65,536 for ImageNet and 4,096 for CIFAR-10.

    Without a queue: if the batch is accumulated, because each part has only its own negatives.
    """
    if config.method.queue_size is None:
        num_parts = config.trainer.accumulate_grad_batches
        if num_parts > 1:
            log.warning(
                "method.negatives=batch: with trainer.accumulate_grad_batches=%d each query is "
                "compared with only the %d keys of its part of the batch",
                num_parts,
                config.data.batch_size // num_parts,
            )
        return
    queue_size = config.method.queue_size
    tenth = num_images // 10
    num_keys = num_keys_of_run(config, num_images)
    reasons = []
    if queue_size > tenth:
        reasons.append(
            f"more than a tenth of the {num_images} images (older keys of a query's own image are "
            "then often among its negatives)"
        )
    if queue_size > num_keys:
        reasons.append(f"more than the {num_keys} keys that this run produces")
    if reasons:
        limit = max(min(tenth, num_keys), 1)
        fitting = 2 ** (limit.bit_length() - 1)
        log.warning(
            "method.queue_size=%d is %s; %d would fit", queue_size, ", and ".join(reasons), fitting
        )


def num_keys_of_run(config: TrainConfig, num_images: int) -> int:
    """Return the number of keys that one queue gets from the first to the last step."""
    batch_size = config.data.batch_size
    num_steps = config.trainer.max_epochs * (num_images // batch_size)
    if config.trainer.max_steps > 0:
        num_steps = min(num_steps, config.trainer.max_steps)
    num_keys = num_steps * batch_size
    if config.method.symmetric and config.method.num_queues == 1:
        num_keys *= 2
    return num_keys
