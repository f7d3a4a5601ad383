"""Checks before the first step of a run: settings that cannot work end it at once, in one line.

torch is imported inside the functions, as in the programs, so that a mistake in the command line
shows in a second.
"""

import hashlib
import importlib.util
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moco.cli.extensions import check_callbacks, check_loggers
from moco.config.segment import METRICS, METRICS_OF_A_CLASS, SegmentConfig
from moco.config.train import TrainConfig, TrainerConfig
from moco.errors import InputError, near_path, unknown_name
from moco.extras import install_command
from moco.phases import LOADING, phase
from moco.runs.run_folder import LAST_CHECKPOINT, as_override, has_checkpoint
from moco.segmentation.label_draw import label_draw
from moco.segmentation.loss_check import check_loss

if TYPE_CHECKING:
    from torch import nn

    from moco.data.augment.resolution_ramp import ResolutionRamp
    from moco.data.augment.views import ViewPair
    from moco.data.loading.datamodule import PretrainingData
    from moco.data.sources.source import Images
    from moco.methods.moco import MoCo
    from moco.models.encoder import Encoder

log = logging.getLogger(__name__)

NOTABLE_PADDING = 0.05  # cells of padding per cell of the maps
NUM_NEAR_RUNS = 5  # that are named where there is no such checkpoint
SMALLEST_QUEUE = 16  # keys; a smaller one would hold hardly more negatives than one batch


def check_run(config: TrainConfig | SegmentConfig) -> None:
    """Raise InputError for settings with which no training can start."""
    if config.resume not in (None, "auto") and not Path(str(config.resume)).is_file():
        of_run = Path(str(config.resume), LAST_CHECKPOINT)
        hint = near_path(str(config.resume))
        if of_run.is_file():
            hint = f"; {as_override('resume', of_run)} is there"
        raise InputError(f"resume={config.resume}: no such file{hint}")
    if config.trainer.max_steps == 0:
        raise InputError("trainer.max_steps=0: expected -1 for no limit, or at least 1")
    check_loggers(config.logger, vars(config.logger_options))
    check_callbacks(config.callbacks)


def check_pretraining(config: TrainConfig, folder: Path) -> None:
    """Raise InputError if a file, a library or a device is missing, before the data are read."""
    check_run(config)
    if config.optimizer.name == "lars" and importlib.util.find_spec("timm") is None:
        raise InputError(f"optimizer.name=lars needs timm: {install_command('lars')}")
    if config.init_from and not Path(config.init_from).is_file() and not has_checkpoint(folder):
        hint = near_path(config.init_from)
        raise InputError(f"init_from={config.init_from}: no such file{hint}")

    with phase(LOADING, unit=""):
        from moco.training.hardware import choose_device

        choose_device(config.trainer.accelerator, config.trainer.devices)


def check_segmentation(config: SegmentConfig) -> None:
    """Raise InputError for what is wrong with a segmentation before anything is read.

    What depends on the classes is checked later, in `moco.cli.segmentation_settings`.
    """
    check_run(config)
    trainer = config.trainer
    if trainer.devices * trainer.num_nodes > 1:
        raise InputError(f"trainer.devices={trainer.devices}: moco.segment trains on one device")
    for key in ("compile", "cuda_graphs"):
        if getattr(trainer, key):
            raise InputError(
                f"trainer.{key}=true: moco.segment does not compile its model; expected false"
            )
    label_draw(config.label_fraction, config.num_images, config.label_seed)
    check_loss(config.loss, config.class_weights)
    check_class_weights(config.class_weights)
    kind, _, name = config.evaluation.metric.partition("/")
    is_of_a_class = kind in METRICS_OF_A_CLASS and name
    if config.evaluation.metric not in METRICS and not is_of_a_class:
        choices = [*METRICS]
        choices += [f"{kind}/NAME" for kind in METRICS_OF_A_CLASS]
        problem = unknown_name("figure", config.evaluation.metric, choices)
        raise InputError(f"evaluation.metric: {problem}")
    check_weights(config.checkpoint)
    check_masked_data(config.data.name, config.data.root)


def check_class_weights(class_weights: Any, num_classes: int | None = None) -> None:
    """Raise InputError if the setting is not auto, null or a list of numbers above 0.

    Args:
        class_weights: the setting.
        num_classes: how many numbers there have to be; None: it is not known yet.
    """
    if class_weights in (None, "auto"):
        return
    numbers = "numbers" if num_classes is None else f"{num_classes} numbers"
    expected = f"expected auto, null or a list of {numbers} above 0"
    is_list = isinstance(class_weights, list)
    if not is_list or (num_classes is not None and len(class_weights) != num_classes):
        raise InputError(f"class_weights={class_weights}: {expected}, one for each class")
    for weight in class_weights:
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not is_number or not 0 < weight < math.inf:
            raise InputError(f"class_weights={class_weights}: {expected}; {weight} is none")


def check_masked_data(name: str | None, root: Any, *, is_trained_on: bool = True) -> None:
    """Raise InputError if a dataset with masks has no folder, or folders of other names in it.

    Args:
        name, root: of the dataset. Others than ``segmentation_folder`` are not looked at.
        is_trained_on: see `check_layout`.
    """
    if name != "segmentation_folder":
        return
    from moco.segmentation.mask_layout import check_layout

    if not isinstance(root, str):
        raise InputError(f"data.root={root}: expected the dataset's folder; give data.root=PATH")
    check_layout(root, is_trained_on=is_trained_on)


def check_weights(checkpoint: str | None) -> None:
    """Raise InputError if there is no such checkpoint; name what is near, or the newest runs."""
    if checkpoint is None or os.path.exists(checkpoint):
        return
    hint = near_path(checkpoint)
    if not hint:
        paths = list(Path("runs").glob(f"*/{LAST_CHECKPOINT}"))
        paths += Path("runs").glob(f"*/*/{LAST_CHECKPOINT}")
        paths.sort(key=os.path.getmtime, reverse=True)
        newest = [str(path.parent.parent) for path in paths[:NUM_NEAR_RUNS]]
        if newest:
            hint = f"; runs here, newest first: {', '.join(newest)}"
    raise InputError(f"checkpoint={checkpoint}: no such file{hint}")


def check_output(output: Path) -> None:
    """Raise InputError if no file can be written to `output`. Nothing is created."""
    if output.is_dir():
        raise InputError(f"output={output}: a folder; expected the name of a file")
    existing = next(path for path in output.absolute().parents if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"output={output}: cannot write to {existing}")


def num_processes(config: TrainConfig) -> int:
    """Return the number of processes that train together."""
    return config.trainer.devices * config.trainer.num_nodes


def check_same_images(data: "PretrainingData") -> None:
    """Raise InputError if the processes of a training see different images or shards."""
    from moco.training.distributed.collectives import gather_objects, world_size

    if world_size() == 1:
        return
    train = data.source.train
    names = names_of(train)
    identity = (len(train), hashlib.blake2b(os.fsencode("\0".join(names))).digest())
    if len(set(gather_objects(identity))) > 1:
        raise InputError(
            "data.root: the processes of this run do not see the same images; "
            "is it the same folder on all nodes?"
        )


def names_of(images: "Images") -> list[str]:
    """Return names that tell the images of a dataset from others.

    They are the paths of its files where it has files. Images in shards have no names before they
    are read, so their shards stand for them.
    """
    from moco.data.sources.shards import ShardedImages
    from moco.data.sources.source import FileImages

    if isinstance(images, ShardedImages):
        return list(images.shards)
    if isinstance(images, FileImages):
        return list(images.files())
    return [images.name(index) for index in range(len(images))]


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
    images = config.data.batch_size // (
        num_processes(config) * config.trainer.accumulate_grad_batches
    )
    setting = f"data.batch_size={config.data.batch_size}"
    group = "a device"
    if mode == "split":
        if images % splits:
            raise InputError(
                f"{setting}: a device gets {images} images at once, which is no multiple of "
                f"method.batch_norm_splits={splits}"
            )
        images //= splits
        group = f"each of method.batch_norm_splits={splits} groups"
    normalises_vectors = any(isinstance(layer, BatchNorm1d) for layer in encoder.modules())
    if images == 1 and mode != "sync" and normalises_vectors:
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
    encoder = method.query_encoder
    backbone: Any = encoder.backbone
    obstacles = resized_positions(backbone, image_sizes)
    if encoder.dense_projector is not None:
        grid = config.method.dense_grid
        stride = backbone.feature_map_strides[-1]
        if encoder.decoder is not None:
            stride = encoder.decoder.stride
        side = max(map_side(backbone, size, stride) for size in image_sizes)
        if side > grid > 1:
            obstacles.append(
                f"the dense term's pooling of a map of {side} x {side} cells to "
                f"method.dense_grid={grid} (a grid of {side} needs no pooling)"
            )
    refuse_nondeterministic(config.trainer, obstacles)


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
    obstacles = [] if is_frozen else resized_positions(backbone, [image_size])
    if decoder == "upernet":
        obstacles.append("the pooling of decoder=upernet (decoder=fpn pools nothing)")
    refuse_nondeterministic(trainer, obstacles)


def map_side(backbone: Any, image_size: int, stride: int) -> int:
    """Return the side of a feature map, cells, for square images.

    Args:
        backbone: under the backbone contract.
        image_size: side of the images, px.
        stride: px of the image per cell of the map.
    """
    if getattr(backbone, "partial_patches", None) == "drop":
        image_size = image_size // backbone.patch_size * backbone.patch_size
    return int(-(-image_size // stride))  # rounded up


def resized_positions(backbone: "nn.Module", image_sizes: Sequence[int]) -> list[str]:
    """Return a description of the learned positions of a ViT that such images resize.

    Args:
        backbone: any backbone; only a ViT has learned positions.
        image_sizes: sides of the images, px.

    Returns:
        One description, or none if nothing is resized.
    """
    from moco.models.vit import VisionTransformer

    if isinstance(backbone, VisionTransformer) and backbone.learned_positions:
        learned = backbone.learned_positions
        for size in image_sizes:
            cells = backbone.cells(size)
            if cells != learned:
                return [
                    f"the resizing of backbone.learned_positions={learned} to the {cells} x "
                    f"{cells} patches of images of {size} px"
                ]
    return []


def refuse_nondeterministic(trainer: TrainerConfig, obstacles: Sequence[str]) -> None:
    """Raise InputError if there are obstacles to a deterministic run on a GPU."""
    from moco.training.hardware import choose_device

    if trainer.deterministic and obstacles and choose_device(trainer.accelerator).type != "cpu":
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


def check_local_crops(backbone: "nn.Module", augment: "ViewPair") -> None:
    """Raise InputError if a backbone cannot take the local crops of a run.

    They are smaller than the views, and some networks take images of one size alone.
    """
    from moco.models.contract import check_contract

    local = augment.local
    if local is None:
        return
    sides = sorted({local.side(size) for size in augment.ramp.sizes})
    for side in sides:
        check_contract(backbone, f"method.local_crops={local.count}", side, augment.kind.bands)
    log.info("local crops: %d of %s px", local.count, ", ".join(map(str, sides)))


def advise_window(backbone: "nn.Module", image_size: int) -> None:
    """Log which attention window suits the images, if a Swin's own one pads its maps much.

    Args:
        backbone: any backbone; only a Swin has windows.
        image_size: side of the views, px.
    """
    from moco.models.swin.backbone import Swin
    from moco.models.swin.window_change import WindowSuggestion, fitting_window

    if not isinstance(backbone, Swin) or len(set(backbone.window_size)) > 1:
        return
    window, patch = backbone.window_size[0], backbone.patch_size
    own = WindowSuggestion(window, image_size, patch)
    better = fitting_window(image_size, window, patch)
    if own.padding - better.padding < NOTABLE_PADDING:
        return
    log.info(
        "%s; %s: backbone.window_size=%d computes less for nothing", own, better, better.window_size
    )


def keys_of_run(config: TrainConfig, num_images: int) -> int:
    """Return how many keys the queue gets in the whole run."""
    num_steps = config.trainer.max_epochs * (num_images // config.data.batch_size)
    if config.trainer.max_steps > 0:
        num_steps = min(num_steps, config.trainer.max_steps)
    num_keys = num_steps * config.data.batch_size
    if config.method.symmetric and config.method.num_queues == 1:
        num_keys *= 2  # one queue gets the keys of both views
    return num_keys


def warn_of_neighbours(config: TrainConfig, num_images: int) -> None:
    """Warn if ``method.neighbours`` has no effect in this run, because it ends too early."""
    method = config.method
    if method.neighbours == 0 or method.queue_size is None:
        return
    num_keys = keys_of_run(config, num_images)
    if method.queue_size >= num_keys:
        log.warning(
            "method.neighbours=%d: there are none before the queue is full, and this run produces "
            "only %d keys for method.queue_size=%d; reduce the queue or train longer",
            method.neighbours,
            num_keys,
            method.queue_size,
        )
    elif method.neighbours_from_epoch >= config.trainer.max_epochs:
        log.warning(
            "method.neighbours_from_epoch=%d: the run has only %d epochs, so it has no neighbours",
            method.neighbours_from_epoch,
            config.trainer.max_epochs,
        )


def warn_of_negatives(config: TrainConfig, num_images: int) -> None:
    """Warn if the number of negatives does not fit the dataset or the batch.

    With a queue: if it holds more keys than a tenth of the images, or more than the run ever
    produces. The largest power of two within a tenth is the queue size of both official recipes:
    65,536 for ImageNet and 4,096 for CIFAR-10. Where no queue of a useful size fits, the warning
    says so.

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
    num_keys = keys_of_run(config, num_images)
    limit = min(num_images // 10, num_keys)
    if config.method.queue_size <= limit:
        return
    if num_images // 10 < SMALLEST_QUEUE:
        log.warning(
            "method.queue_size=%d: with only %d images, older keys of a query's own image are "
            "often among its negatives, whatever the size of the queue. Such a run shows that "
            "everything works, but it learns little: more images are needed, or weights that are "
            "pretrained elsewhere (init_from=PATH)",
            config.method.queue_size,
            num_images,
        )
    elif num_keys < SMALLEST_QUEUE:
        log.warning(
            "method.queue_size=%d: this run is so short that it produces only %d keys, and the "
            "queue keeps its random start. It shows that everything works, but it learns little",
            config.method.queue_size,
            num_keys,
        )
    else:
        log.warning(
            "method.queue_size=%d is more than a tenth of the %d images (older keys of a query's "
            "own image are then often among its negatives), or more than the %d keys that this "
            "run produces; %d would fit",
            config.method.queue_size,
            num_images,
            num_keys,
            2 ** (limit.bit_length() - 1),
        )
