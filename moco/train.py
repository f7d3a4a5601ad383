"""Pretrain a backbone: ``python -m moco.train +experiment=NAME [key=value ...]``."""

import dataclasses
import logging
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moco.cli.checks import (
    check_batch_norm,
    check_deterministic,
    check_devices,
    check_optimizer,
    check_resolution_ramp,
    check_resumable,
    check_run,
    check_same_images,
    num_processes,
    warn_of_negatives,
)
from moco.cli.launch import hydra_files, launch, set_up_logging
from moco.config.train import TrainConfig
from moco.errors import InputError, Interrupted, RunError
from moco.runs.run_folder import has_checkpoint

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from rich.console import Console

    from moco.data.loading.datamodule import PretrainingData
    from moco.evaluation.dense_features import DenseSet
    from moco.methods.moco import MoCo
    from moco.runs.interrupts import StopRequest

log = logging.getLogger("moco.train")  # __name__ is __main__ under python -m

DEFAULTS = dataclasses.asdict(TrainConfig())
DENSE_VOTE = (
    "every_n_epochs",
    "num_neighbors",
    "temperature",
)  # of monitor.dense, all other keys are its data's

# torch and Lightning are imported where they are first needed: a mistake in the config or a path shows in a second.


def run(config: TrainConfig, folder: Path) -> None:
    """Train as configured, in `folder`, on one process per device.

    Raises:
        InputError: something in the config does not fit the data or the folder.
        RunError: training failed.
        Interrupted: a signal ended it, checkpoint saved.
    """
    check_run(config.resume, config.trainer)
    check_optimizer(config.optimizer)
    check_devices(config.trainer)
    if config.init_from and not Path(config.init_from).is_file() and not has_checkpoint(folder):
        raise InputError(f"init_from={config.init_from}: no such file")
    data = build_data(config, folder)
    config.data.image_size = data.image_size

    from moco.runs.interrupts import StopRequest
    from moco.runs.run_folder import is_finished, last_good
    from moco.runs.run_status import state_now, write_ending
    from moco.runs.slurm import stop_signals
    from moco.training.distributed.collectives import environment_of
    from moco.training.distributed.processes import run_on_devices, starts_its_own

    if is_finished(folder, dataclasses.asdict(config), DEFAULTS):
        log.info("%s is finished; a larger trainer.max_epochs goes on", folder)
        return
    devices = config.trainer.devices
    arguments = (config, folder, hydra_files())
    with StopRequest(stop_signals(config.slurm.signal)) as stop:
        if starts_its_own(environment_of(devices, config.trainer.num_nodes), devices):
            try:
                run_on_devices(
                    train_on_one_of_several, arguments, devices, stop, partial(last_good, folder)
                )
            except RunError as error:
                if state_now(folder) == "crashed":  # no process was left to say it
                    write_ending(folder, error)
                raise
        else:
            train(*arguments, stop, data)


def train_on_one_of_several(
    config: TrainConfig, folder: Path, files: dict[str, str], stop: "StopRequest"
) -> None:
    """`train` in a process that has only just begun."""
    set_up_logging()
    train(config, folder, files, stop)


def train(
    config: TrainConfig,
    folder: Path,
    files: dict[str, str],
    stop: "StopRequest",
    data: "PretrainingData | None" = None,
) -> None:
    """Train on this process's device, with the other processes if there are any.

    Args:
        files: Hydra's own, for the run folder, by name.
        data: of `build_data`, if it is there already.
    """
    import pytorch_lightning as pl
    from rich.console import Console

    from moco.cli.closing_tables import close
    from moco.runs.atomic_files import write_json
    from moco.runs.failures import failures_named
    from moco.runs.run_folder import BACKBONE_FILE, find_checkpoint
    from moco.training.distributed.collectives import (
        environment_of,
        from_rank_zero,
        lost_peers_named,
        process_group,
        rank,
    )
    from moco.training.hardware import choose_device
    from moco.weights.init_from import start_from
    from moco.weights.weight_files import write_backbone_file

    environment = environment_of(config.trainer.devices, config.trainer.num_nodes)
    backend = "nccl" if choose_device(config.trainer.accelerator).type == "cuda" else "gloo"
    with (
        lost_peers_named(),
        process_group(environment, backend, config.trainer.timeout_minutes),
        ExitStack() as stack,
    ):
        if rank() > 0:
            logging.getLogger("moco").setLevel(logging.ERROR)  # what there is to say, rank 0 says
        stack.enter_context(failures_named(folder))
        plain = dataclasses.asdict(config)
        pl.seed_everything(config.seed, verbose=False)
        data, method = data or build_data(config, folder), build_method(plain)
        check_same_images(data)
        images = from_rank_zero(lambda: dense_set(config, data.image_size))
        check_batch_norm(method.query_encoder, config)
        check_deterministic(method, config, data.augment.ramp.sizes)
        check_resolution_ramp(
            data.augment.ramp, method.query_encoder.backbone, config.trainer.max_epochs
        )
        warn_of_negatives(config, len(data.source.train))
        is_new = (
            from_rank_zero(lambda: find_checkpoint(folder, plain, config.resume, DEFAULTS)) is None
        )
        if is_new and config.init_from is not None:
            start_from(method, config.init_from)
        elif config.init_from is not None:
            log.info(
                "init_from=%s is not read: the run goes on from a checkpoint", config.init_from
            )
        read: dict[Path, dict[str, Any]] = {}
        checkpoint, step = from_rank_zero(
            lambda: take_folder(stack, folder, plain, config.resume, files, read)
        )
        figures: dict[str, Any] = {}
        console = Console(quiet=rank() > 0)
        trainer = build_trainer(
            config, folder, plain, figures, console, stop, environment, step, images
        )
        with (
            failures_named(folder),
            lost_peers_named(),
        ):  # once more, for the line in the folder's status
            fit(trainer, method, data, checkpoint, stop, read)
            # A run that had reached its last step within its first epoch, and goes on, ends at once.
            figures.setdefault("epoch", trainer.current_epoch)
            figures.setdefault("step", trainer.global_step)
            if rank() == 0:
                write_backbone_file(folder / BACKBONE_FILE, method, plain, figures)
                write_json(folder / "metrics.json", figures)
        close(console, folder, figures, len(data.unreadable))


def take_folder(
    stack: ExitStack,
    folder: Path,
    plain: dict[str, Any],
    resume: str | None,
    files: dict[str, str],
    read: dict[Path, dict[str, Any]],
) -> tuple[Path | None, int | None]:
    """Make `folder` this process's alone until `stack` closes.

    Args:
        read: gets the checkpoint's content.

    Returns:
        The checkpoint to go on from, and the optimizer steps that it has behind it; None and None to start.
    """
    from moco.runs.checkpoint_files import read_checkpoint, sound_checkpoint
    from moco.runs.run_folder import LAST_CHECKPOINT, claimed, find_checkpoint

    checkpoint = find_checkpoint(folder, plain, resume, DEFAULTS)
    is_other_run = checkpoint is not None and checkpoint != folder / LAST_CHECKPOINT
    if checkpoint and is_other_run:
        read[checkpoint] = read_checkpoint(checkpoint)
        step = check_resumable(checkpoint, read[checkpoint], plain)  # before anything is written
    stack.enter_context(claimed(folder, plain))
    for name, text in files.items():
        (folder / ".hydra" / name).write_text(text)
    if checkpoint and not is_other_run:
        content = sound_checkpoint(folder)
        assert content is not None
        read[checkpoint] = content
        step = check_resumable(checkpoint, content, plain)
    if checkpoint is None:
        return None, None
    log.info("going on from %s", checkpoint)
    return checkpoint, step


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
        read: what this process has read of it already.

    Raises:
        Interrupted: a signal came; also when it came before there was anything to save.
    """
    from moco.evaluation.features import EmbeddingStopped
    from moco.runs.checkpoint_files import AtomicCheckpointIO
    from moco.training.distributed.collectives import largest

    assert isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    trainer.strategy.checkpoint_io.read = read
    try:
        trainer.fit(
            method,
            datamodule=data,
            ckpt_path=str(checkpoint) if checkpoint else None,
            weights_only=True,
        )
    except EmbeddingStopped as error:
        number = largest([stop.signal_number or 0])[0]
        raise Interrupted(number, "before the first training step; nothing to save") from error


def build_data(config: TrainConfig, folder: Path | None = None) -> "PretrainingData":
    """The loaders for the config's data set and augmentation pair.

    Args:
        folder: where a list of the images below a folder is kept for the run's other processes and its next start.
    """
    from moco.data.sources.registry import build_source

    data, pair = config.data, config.augmentation
    source = build_source(
        data.name,
        data.root,
        download=data.download,
        num_images=data.num_images,
        max_image_pixels=data.max_image_pixels,
        listing=folder / "images.npz" if folder else None,
        held_out=data.held_out,
        streams=data.streams,
        shuffle_buffer=data.shuffle_buffer,
        image_column=data.image_column,
        label_column=data.label_column,
        pages=data.pages,
    )

    from moco.data.augment.resolution_ramp import ResolutionRamp
    from moco.data.augment.views import ViewPair, build_evaluation_view
    from moco.data.loading.datamodule import PretrainingData, choose_engine
    from moco.training.hardware import choose_device

    image_size = data.image_size or source.image_size
    device = choose_device(config.trainer.accelerator)
    engine = choose_engine(data.engine, source.train, image_size, device.type)
    ramp = ResolutionRamp(image_size, pair.start_image_size, pair.image_size_step, pair.ramp_epochs)
    where = ", in memory" if engine.in_memory else f", {data.num_workers} loader processes"
    log.info("augmentation: %s engine%s (%s)", engine.name, where, engine.reason)
    return PretrainingData(
        source,
        ViewPair(
            pair.query, pair.key, pair.mean, pair.std, image_size, config.seed, engine.name, ramp
        ),
        build_evaluation_view(image_size, data.crop_ratio, pair.mean, pair.std),
        image_size=image_size,
        batch_size=data.batch_size,
        batches_per_step=num_processes(config) * config.trainer.accumulate_grad_batches,
        evaluation_batch_size=config.evaluation.batch_size,
        num_workers=data.num_workers,
        max_bad_fraction=data.max_bad_fraction,
        seed=config.seed,
        engine=engine,
    )


def build_method(plain: dict[str, Any]) -> "MoCo":
    """The method of a config as plain data, its learning rates scaled to the batch."""
    from moco.methods.moco import MoCo
    from moco.training.optimizers import scaled_to_batch

    batch_size, given = plain["data"]["batch_size"], plain["optimizer"]
    optimizer = scaled_to_batch(given, batch_size)
    if given["lr_for_batch_size"] is not None:
        log.info(
            "learning rate %.6g for batch %d, %.6g at this run's %d; warm-up from %.6g, end at %.6g",
            given["lr"], given["lr_for_batch_size"], optimizer["lr"], batch_size,
            optimizer["warmup_start_lr"], optimizer["final_lr"],
        )  # fmt: skip
    return MoCo(backbone=plain["backbone"], optimizer=optimizer, **plain["method"])


def build_trainer(
    config: TrainConfig,
    folder: Path,
    plain: dict[str, Any],
    figures: dict[str, Any],
    console: "Console",
    stop: "StopRequest",
    environment: "ClusterEnvironment | None" = None,
    step: int | None = None,
    images: "DenseSet | None" = None,
) -> "pl.Trainer":
    """Lightning's Trainer with the callbacks of pretraining; `figures` is what they report into.

    Args:
        environment: who started the processes.
        step: optimizer steps behind the checkpoint that the run goes on from.
        images: of `dense_set`.
    """
    from moco.callbacks.bad_steps import BadSteps
    from moco.callbacks.checkpoints import Checkpoints
    from moco.callbacks.collapse_watch import CollapseWatch, LabelFreeMonitor
    from moco.callbacks.dense_monitor import DenseMonitor
    from moco.callbacks.feature_plots import FeaturePlots
    from moco.callbacks.monitors import KNNMonitor, TrainingMonitor
    from moco.callbacks.online_probe import OnlineProbe
    from moco.callbacks.unreadable_images import UnreadableList
    from moco.callbacks.view_pairs import ViewPairPlot
    from moco.cli.progress import ProgressBar
    from moco.runs.run_folder import last_good
    from moco.training import trainer
    from moco.training.logger import RunDescription

    checkpoints = Checkpoints(folder, plain, figures, stop, **dataclasses.asdict(config.checkpoint))
    knn = config.evaluation
    vote = {key: getattr(config.monitor.dense, key) for key in DENSE_VOTE}
    callbacks = [
        TrainingMonitor(figures, config.trainer.log_every_n_steps),
        BadSteps(
            figures,
            config.trainer.max_bad_steps,
            config.trainer.log_every_n_steps,
            partial(last_good, folder),
        ),
        KNNMonitor(
            figures,
            num_neighbors=knn.num_neighbors,
            temperature=knn.temperature,
            feature=knn.feature,
            precision=knn.precision,
            every_n_epochs=knn.every_n_epochs,
            baselines=knn.baselines,
            is_untrained=config.init_from is None,
            should_stop=lambda: bool(stop),
            images=FeaturePlots(knn.plots_every_n_epochs, knn.projector_images),
        ),
        CollapseWatch(),
        LabelFreeMonitor(knn.diagnostics_every_n_steps),
        *(
            [DenseMonitor(figures, images, **vote, should_stop=lambda: bool(stop))]
            if images
            else []
        ),
        *([OnlineProbe(figures, config.trainer.log_every_n_steps)] if knn.online_probe else []),
        ViewPairPlot(knn.plots_every_n_epochs),
        RunDescription(folder, plain, ["knn/top1", "epoch/loss"]),
        UnreadableList(folder, figures),
        ProgressBar(figures, console, ("knn/top1", "kNN"), ("dense/knn_miou", "dense mIoU")),
        checkpoints,
    ]
    purge_step = (
        0 if step is None else step + 1
    )  # 0: a process before this one may have died without a checkpoint
    return trainer.build_trainer(
        dataclasses.asdict(config.trainer), folder, callbacks, environment, purge_step
    )


def dense_set(config: TrainConfig, image_size: int) -> "DenseSet | None":
    """The images with masks of ``monitor.dense``, if there are any; errors of `build_dense_set`."""
    dense = config.monitor.dense
    if dense.data is None:
        if dense.root is not None:
            raise InputError(
                f"monitor.dense.root={dense.root}: without monitor.dense.data it has no effect"
            )
        return None

    from moco.callbacks.dense_monitor import build_dense_set

    settings = {
        key: value for key, value in dataclasses.asdict(dense).items() if key not in DENSE_VOTE
    }
    return build_dense_set(
        **settings | {"image_size": settings["image_size"] or image_size},
        mean=config.augmentation.mean,
        std=config.augmentation.std,
        seed=config.seed,
        num_workers=config.data.num_workers,
        max_bad_fraction=config.data.max_bad_fraction,
        max_image_pixels=config.data.max_image_pixels,
    )


def main() -> None:
    """Entry point of ``moco-train``."""
    launch(run, TrainConfig, "train")


if __name__ == "__main__":
    main()
