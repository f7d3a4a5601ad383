"""Build the parts of a pretraining from its config: data, method, Trainer.

The config ends here: what is built takes plain arguments.
"""

import dataclasses
import logging
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moco.cli.checks import num_processes
from moco.config.train import TrainConfig
from moco.errors import InputError

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from rich.console import Console

    from moco.data.loading.datamodule import PretrainingData
    from moco.data.sources.source import DataSource
    from moco.evaluation.dense_features import DenseSet
    from moco.methods.moco import MoCo
    from moco.runs.interrupts import StopRequest

log = logging.getLogger("moco.train")

# The settings of monitor.dense that say when and how to vote. Its other settings describe the data.
DENSE_VOTE = ("every_n_epochs", "num_neighbors", "temperature")


def build_source(config: TrainConfig, folder: Path | None = None) -> "DataSource":
    """Return the images of the config.

    Args:
        config: the config of the run.
        folder: where the list of the images is kept, for other processes and the next start.
    """
    from moco.data.sources import registry

    data = config.data
    listing = None
    if folder is not None:
        listing = folder / "images.npz"
    return registry.build_source(
        data.name,
        data.root,
        download=data.download,
        num_images=data.num_images,
        max_image_pixels=data.max_image_pixels,
        listing=listing,
        held_out=data.held_out,
        streams=data.streams,
        shuffle_buffer=data.shuffle_buffer,
        image_column=data.image_column,
        label_column=data.label_column,
        pages=data.pages,
    )


def build_data(config: TrainConfig, folder: Path | None = None) -> "PretrainingData":
    """Return the loaders of the config's dataset and augmentation pair.

    Args:
        config: the config of the run.
        folder: see `build_source`.
    """
    source = build_source(config, folder)

    from moco.data.augment.resolution_ramp import ResolutionRamp
    from moco.data.augment.views import EvaluationView, ViewPair
    from moco.data.loading.datamodule import PretrainingData
    from moco.data.loading.loaders import choose_engine
    from moco.training.hardware import choose_device

    data = config.data
    pair = config.augmentation
    image_size = data.image_size or source.image_size
    device = choose_device(config.trainer.accelerator)
    engine = choose_engine(data.engine, source.train, image_size, device.type)
    if engine.in_memory:
        where = ", in memory"
    else:
        where = f", {data.num_workers} loader processes"
    log.info("augmentation: %s engine%s (%s)", engine.name, where, engine.reason)
    ramp = ResolutionRamp(image_size, pair.start_image_size, pair.image_size_step, pair.ramp_epochs)
    views = ViewPair(
        pair.query, pair.key, pair.mean, pair.std, image_size, config.seed, engine.name, ramp
    )
    return PretrainingData(
        source,
        views,
        EvaluationView(image_size, data.crop_ratio, pair.mean, pair.std),
        image_size=image_size,
        batch_size=data.batch_size,
        batches_per_step=num_processes(config) * config.trainer.accumulate_grad_batches,
        evaluation_batch_size=config.evaluation.batch_size,
        num_workers=data.num_workers,
        max_bad_fraction=data.max_bad_fraction,
        seed=config.seed,
        in_memory=engine.in_memory,
    )


def build_method(plain: dict[str, Any]) -> "MoCo":
    """Return the method of a config, with learning rates scaled to the batch size.

    Args:
        plain: a `TrainConfig` as plain data.
    """
    from moco.methods.moco import MoCo
    from moco.training.schedules import scaled_to_batch

    batch_size = plain["data"]["batch_size"]
    given = plain["optimizer"]
    optimizer = scaled_to_batch(given, batch_size)
    if given["lr_for_batch_size"] is not None:
        log.info(
            "learning rate %.6g for batch %d, %.6g at this run's %d; "
            "warm-up from %.6g, end at %.6g",
            given["lr"],
            given["lr_for_batch_size"],
            optimizer["lr"],
            batch_size,
            optimizer["warmup_start_lr"],
            optimizer["final_lr"],
        )
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
    dense_set: "DenseSet | None" = None,
) -> "pl.Trainer":
    """Return Lightning's Trainer with the callbacks of pretraining.

    Args:
        config: the config of the run.
        folder: the run folder.
        plain: `config` as plain data.
        figures: the flat dict that becomes ``metrics.json``; callbacks write into it.
        console: where the progress bar is drawn.
        stop: the request to save and stop.
        environment: who started the processes.
        step: number of optimizer steps of the checkpoint that the run goes on from.
        dense_set: the images of ``monitor.dense``, from `build_dense_set`.
    """
    from moco.training import trainer

    callbacks = build_callbacks(config, folder, plain, figures, console, stop, dense_set)
    # A process that died without a checkpoint may have logged beyond the step from which this run
    # goes on. TensorBoard hides what was logged at `purge_step` and later.
    purge_step = 0
    if step is not None:
        purge_step = step + 1
    settings = dataclasses.asdict(config.trainer)
    return trainer.build_trainer(settings, folder, callbacks, environment, purge_step)


def build_callbacks(
    config: TrainConfig,
    folder: Path,
    plain: dict[str, Any],
    figures: dict[str, Any],
    console: "Console",
    stop: "StopRequest",
    dense_set: "DenseSet | None" = None,
) -> "list[pl.Callback]":
    """Return the callbacks of pretraining in the order in which Lightning calls them.

    Args: as in `build_trainer`.
    """
    from moco.callbacks.bad_steps import BadSteps
    from moco.callbacks.checkpoints import Checkpoints
    from moco.callbacks.collapse_watch import CollapseWatch
    from moco.callbacks.dense_monitor import DenseMonitor
    from moco.callbacks.feature_plots import FeaturePlots
    from moco.callbacks.knn_monitor import KNNMonitor
    from moco.callbacks.label_free_monitor import LabelFreeMonitor
    from moco.callbacks.online_probe import OnlineProbe
    from moco.callbacks.progress import ProgressBar
    from moco.callbacks.training_monitor import TrainingMonitor
    from moco.callbacks.unreadable_images import UnreadableList
    from moco.callbacks.view_pairs import ViewPairPlot
    from moco.runs.run_folder import last_good
    from moco.training.logger import RunDescription

    evaluation = config.evaluation
    log_every_n_steps = config.trainer.log_every_n_steps

    def is_stopping() -> bool:
        return bool(stop)

    callbacks: list[pl.Callback] = [
        TrainingMonitor(figures, log_every_n_steps),
        BadSteps(
            figures, config.trainer.max_bad_steps, log_every_n_steps, partial(last_good, folder)
        ),
        KNNMonitor(
            figures,
            num_neighbors=evaluation.num_neighbors,
            temperature=evaluation.temperature,
            feature=evaluation.feature,
            precision=evaluation.precision,
            every_n_epochs=evaluation.every_n_epochs,
            baselines=evaluation.baselines,
            is_untrained=config.init_from is None,
            should_stop=is_stopping,
            plots=FeaturePlots(evaluation.plots_every_n_epochs, evaluation.projector_images),
        ),
        CollapseWatch(),
    ]
    if evaluation.diagnostics_every_n_steps:
        callbacks.append(LabelFreeMonitor(evaluation.diagnostics_every_n_steps))
    if dense_set is not None:
        vote = {key: getattr(config.monitor.dense, key) for key in DENSE_VOTE}
        callbacks.append(DenseMonitor(figures, dense_set, **vote, should_stop=is_stopping))
    if evaluation.online_probe:
        callbacks.append(OnlineProbe(figures, log_every_n_steps))
    if evaluation.plots_every_n_epochs:
        callbacks.append(ViewPairPlot(evaluation.plots_every_n_epochs))
    callbacks += [
        RunDescription(folder, plain, ["knn/top1", "epoch/loss"]),
        UnreadableList(folder, figures),
        ProgressBar(figures, console, ("knn/top1", "kNN"), ("dense/knn_miou", "dense mIoU")),
        # Last, so that a checkpoint holds what the other callbacks have written into `figures`.
        Checkpoints(folder, plain, figures, stop, **dataclasses.asdict(config.checkpoint)),
    ]
    return callbacks


def build_dense_set(config: TrainConfig, image_size: int) -> "DenseSet | None":
    """Return the images with masks of ``monitor.dense``, or None if there are none.

    Args:
        config: the config of the run.
        image_size: shorter side of the images if the config does not say, px.

    Raises:
        InputError: the images cannot be used.
    """
    dense = config.monitor.dense
    if dense.data is None:
        if dense.root is not None:
            raise InputError(
                f"monitor.dense.root={dense.root}: without monitor.dense.data it has no effect"
            )
        return None

    from moco.evaluation import dense_features

    settings = dataclasses.asdict(dense)
    for key in DENSE_VOTE:
        del settings[key]
    settings["name"] = settings.pop("data")
    settings["image_size"] = dense.image_size or image_size
    try:
        return dense_features.build_dense_set(
            "monitor.dense",
            **settings,
            mean=config.augmentation.mean,
            std=config.augmentation.std,
            seed=config.seed,
            num_workers=config.data.num_workers,
            max_bad_fraction=config.data.max_bad_fraction,
            max_image_pixels=config.data.max_image_pixels,
        )
    except InputError as error:
        # The message names keys below data, as moco.segment has them.
        message = re.sub(r"\bdata\.(root|ignore_index)\b", r"monitor.dense.\1", str(error))
        raise InputError(message) from error
