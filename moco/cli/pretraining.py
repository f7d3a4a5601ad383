"""What one process of a pretraining does, from an empty process to the closing table."""

import dataclasses
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moco.cli import checks
from moco.cli.build_pretraining import build_data, build_dense_set, build_method, build_trainer
from moco.cli.log_setup import set_up_logging
from moco.cli.resuming import DEFAULTS, take_folder
from moco.config.train import TrainConfig
from moco.errors import Interrupted

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from moco.data.loading.datamodule import PretrainingData
    from moco.methods.moco import MoCo
    from moco.runs.interrupts import StopRequest

log = logging.getLogger("moco.train")


def train_in_new_process(
    config: TrainConfig, folder: Path, files: dict[str, str], stop: "StopRequest"
) -> None:
    """Call `train` in a process that has just started."""
    set_up_logging()
    train(config, folder, files, stop)


def train(
    config: TrainConfig,
    folder: Path,
    files: dict[str, str],
    stop: "StopRequest",
    data: "PretrainingData | None" = None,
) -> None:
    """Train on this process's device, together with the other processes if there are any.

    Args:
        config: the config of the run.
        folder: the run folder.
        files: Hydra's files for the run folder, by name.
        stop: the request to save and stop.
        data: from `build_data`, if it is built already.
    """
    import pytorch_lightning as pl
    from rich.console import Console

    from moco.cli.closing_tables import print_pretraining
    from moco.runs.faults import failures_named
    from moco.runs.run_folder import BACKBONE_FILE, find_checkpoint, write_json
    from moco.training.distributed import collectives
    from moco.training.hardware import choose_device
    from moco.weights.init_from import start_from
    from moco.weights.weight_files import write_backbone_file

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
        stack.enter_context(failures_named(folder))
        plain = dataclasses.asdict(config)
        pl.seed_everything(config.seed, verbose=False)
        data = data or build_data(config, folder)
        method = build_method(plain)
        image_size = data.image_size
        dense_set = collectives.from_rank_zero(lambda: build_dense_set(config, image_size))
        check_before_training(config, data, method)

        saved = collectives.from_rank_zero(
            lambda: find_checkpoint(folder, plain, config.resume, DEFAULTS)
        )
        if config.init_from is not None:
            if saved is None:
                start_from(method, config.init_from)
            else:
                log.info(
                    "init_from=%s is not read: the run goes on from a checkpoint", config.init_from
                )
        read: dict[Path, dict[str, Any]] = {}
        checkpoint, step = collectives.from_rank_zero(
            lambda: take_folder(stack, folder, plain, config.resume, files, read)
        )
        figures: dict[str, Any] = {}
        console = Console(quiet=not is_first)
        trainer = build_trainer(
            config, folder, plain, figures, console, stop, environment, step, dense_set
        )
        # Named once more inside the folder's lock, so that the status holds the line too.
        with failures_named(folder), collectives.lost_peers_named():
            fit(trainer, method, data, checkpoint, stop, read)
            # A run that had reached its last step within its first epoch ends at once when it is
            # started again. No epoch end has filled these in then.
            figures.setdefault("epoch", trainer.current_epoch)
            figures.setdefault("step", trainer.global_step)
            if is_first:
                write_backbone_file(folder / BACKBONE_FILE, method, plain, figures)
                write_json(folder / "metrics.json", figures)
        print_pretraining(console, folder, figures, len(data.unreadable))


def check_before_training(config: TrainConfig, data: "PretrainingData", method: "MoCo") -> None:
    """Run the checks that need the data and the method."""
    ramp = data.augment.ramp
    encoder = method.query_encoder
    checks.check_same_images(data)
    checks.check_batch_norm(encoder, config)
    checks.check_deterministic(method, config, ramp.sizes)
    checks.check_resolution_ramp(ramp, encoder.backbone, config.trainer.max_epochs)
    checks.warn_of_negatives(config, len(data.source.train))


def fit(
    trainer: "pl.Trainer",
    method: "MoCo",
    data: "PretrainingData",
    checkpoint: Path | None,
    stop: "StopRequest",
    read: dict[Path, dict[str, Any]],
) -> None:
    """Train from the checkpoint, if there is one, to the end.

    Args:
        trainer: from `build_trainer`.
        method: from `build_method`.
        data: from `build_data`.
        checkpoint: where to go on from.
        stop: the request to save and stop.
        read: the content of `checkpoint` under its path, if this process has read it.

    Raises:
        Interrupted: a signal came, perhaps before there was anything to save.
    """
    from moco.evaluation.features import EmbeddingStopped
    from moco.runs.checkpoint_files import AtomicCheckpointIO
    from moco.training.distributed.collectives import largest

    checkpoint_io = trainer.strategy.checkpoint_io
    assert isinstance(checkpoint_io, AtomicCheckpointIO)
    checkpoint_io.read = read
    path = str(checkpoint) if checkpoint else None
    try:
        trainer.fit(method, datamodule=data, ckpt_path=path, weights_only=True)
    except EmbeddingStopped as error:
        # The processes may have seen different signals, or none yet.
        number = largest([stop.signal_number or 0])[0]
        raise Interrupted(number, "before the first training step; nothing to save") from error
