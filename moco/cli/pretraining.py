"""What one process of a pretraining does, from an empty process to the closing table."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moco.cli import checks
from moco.cli.build_pretraining import build_data, build_dense_set, build_method, build_trainer
from moco.cli.log_setup import set_up_logging
from moco.cli.training_run import Run, fit, take_folder
from moco.config.train import BackboneConfig, TrainConfig
from moco.errors import InputError
from moco.screen import new_console, screen
from moco.targets import GIVEN

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from pytorch_lightning.loggers import Logger
    from torch import nn

    from moco.data.loading.datamodule import PretrainingData
    from moco.methods.moco import MoCo
    from moco.runs.interrupts import StopRequest

log = logging.getLogger("moco.train")

RGB_BANDS = 3
# The settings of the method that decide the shapes of a checkpoint's tensors.
METHOD_SHAPES = (
    "projector",
    "predictor",
    "embedding_dim",
    "queue_size",
    "num_queues",
    "mask_own_group",
    "decoder",
    "decoder_channels",
)


@dataclass
class Given:
    """What a pretraining takes as objects, in place of building it from the config."""

    data: "PretrainingData | None" = None
    backbone: "nn.Module | None" = None
    callbacks: "Sequence[pl.Callback]" = ()
    """Besides those of the config."""
    loggers: "Sequence[Logger]" = ()
    """Besides those of the config."""


def train_in_new_process(
    config: TrainConfig, folder: Path, files: dict[str, str], stop: "StopRequest"
) -> None:
    """Call `train` in a process that has just started."""
    set_up_logging("train")
    train(config, folder, files, stop)


def train(
    config: TrainConfig,
    folder: Path,
    files: dict[str, str],
    stop: "StopRequest",
    given: Given | None = None,
) -> "MoCo":
    """Train on this process's device, together with the other processes if there are any.

    Args:
        config: the config of the run.
        folder: the run folder.
        files: Hydra's files for the run folder, by name.
        stop: the request to save and stop.
        given: what is built already.
    """
    import pytorch_lightning as pl

    from moco.cli.closing_tables import print_pretraining
    from moco.cli.start_panel import print_start
    from moco.runs.atomic_files import write_json
    from moco.runs.failures import failures_named
    from moco.runs.run_folder import BACKBONE_FILE, find_checkpoint
    from moco.runs.training_set import training_set
    from moco.training.distributed import collectives
    from moco.training.hardware import choose_device
    from moco.weights.backbone_files import write_backbone_file
    from moco.weights.init_from import start_from

    given = given or Given()
    environment = collectives.environment_of(config.trainer.devices, config.trainer.num_nodes)
    device = choose_device(config.trainer.accelerator)
    backend = "nccl" if device.type == "cuda" else "gloo"
    with ExitStack() as stack:
        stack.enter_context(collectives.lost_peers_named())
        stack.enter_context(
            collectives.process_group(environment, backend, config.trainer.timeout_minutes)
        )
        is_first = collectives.rank() == 0
        if not is_first:
            # Rank 0 speaks for all.
            logging.getLogger("moco").setLevel(logging.ERROR)
            screen.turn_off()
        stack.enter_context(failures_named(folder))
        console = screen.console if is_first else new_console(quiet=True)
        run = Run(config, folder, stop, files, console, given.callbacks, given.loggers)
        pl.seed_everything(config.seed, verbose=False)
        data = given.data or build_data(config, folder)
        method = build_method(run.plain, given.backbone)
        image_size = data.image_size
        dense_set = collectives.from_rank_zero(lambda: build_dense_set(config, image_size))
        check_before_training(config, data, method)

        checkpoint = collectives.from_rank_zero(
            lambda: find_checkpoint(folder, run.plain, run.defaults)
        )
        if config.init_from is not None:
            if checkpoint is None:
                start_from(method, config.init_from)
            else:
                log.info(
                    "init_from=%s is not read: the run goes on from a checkpoint", config.init_from
                )
        train = data.source.train
        size, root = config.data.batch_size, config.data.root
        run.training_set = collectives.from_rank_zero(
            lambda: training_set(lambda: checks.names_of(train), len(train), size, root)
        )
        resumed = collectives.from_rank_zero(
            lambda: take_folder(run, stack, checkpoint, method.hparams, tensor_settings)
        )
        trainer = build_trainer(run, environment, resumed, dense_set)
        print_start(run, trainer, method, data, None if resumed is None else resumed.step)
        # Named once more inside the folder's lock, so that the status holds the line too.
        with failures_named(folder), collectives.lost_peers_named():
            fit(run, trainer, method, data, checkpoint)
            if is_first:
                write_backbone_file(folder / BACKBONE_FILE, method, run.plain, run.figures)
                write_json(folder / "metrics.json", run.figures)
        print_pretraining(run, data.source, len(data.unreadable))
    return method


def fill_in_from_data(config: TrainConfig, data: "PretrainingData") -> None:
    """Put the side of the views, px, and their bands where the config leaves them open.

    Raises:
        InputError: the config says another number of bands.
    """
    from moco.models.backbones import settings_of_backbone

    config.data.image_size = data.image_size
    if "image_size" in settings_of_backbone(config.backbone.name):
        config.backbone.image_size = config.backbone.image_size or data.image_size
    bands = data.augment.kind.bands
    given = config.backbone.in_channels
    if given not in (None, bands):
        raise InputError(
            f"backbone.in_channels={given}: the images have {bands} bands; data.bands=[...] "
            "chooses bands"
        )
    # A backbone of RGB images has the same settings as before there were others.
    if bands != RGB_BANDS:
        config.backbone.in_channels = bands


def given_backbone(backbone: "nn.Module") -> BackboneConfig:
    """Return the config of a backbone that was given as a module."""
    kind = type(backbone)
    return BackboneConfig(name=GIVEN, target=f"{kind.__module__}:{kind.__qualname__}")


def check_before_training(config: TrainConfig, data: "PretrainingData", method: "MoCo") -> None:
    """Run the checks that need the data and the method."""
    from moco.models.contract import check_feature_maps

    ramp = data.augment.ramp
    encoder = method.query_encoder
    if config.monitor.dense.data is not None:
        check_feature_maps(encoder.backbone, "monitor.dense")
    checks.check_same_images(data)
    checks.check_batch_norm(encoder, config)
    checks.check_deterministic(method, config, ramp.sizes)
    checks.advise_window(encoder.backbone, ramp.image_size)
    checks.check_resolution_ramp(ramp, encoder.backbone, config.trainer.max_epochs)
    checks.check_local_crops(encoder.backbone, data.augment)
    checks.warn_of_negatives(config, len(data.source.train))
    checks.warn_of_neighbours(config, len(data.source.train))


def tensor_settings(config: Mapping[str, Any], hparams: Any) -> dict[str, Any]:
    """Return the settings that decide which tensors a checkpoint holds, and their shapes."""
    method = {key: config["method"][key] for key in METHOD_SHAPES}
    has_dense_term = config["method"]["dense_weight"] > 0
    method["dense_weight"] = "above 0" if has_dense_term else 0
    optimizer = {key: config["optimizer"][key] for key in ("name", "decay_all")}
    return {"backbone": config["backbone"], "method": method, "optimizer": optimizer}
