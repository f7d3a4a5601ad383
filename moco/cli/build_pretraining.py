"""Build the parts of a pretraining from its config: data, method, Trainer.

The config ends here: what is built takes plain arguments.
"""

import dataclasses
import inspect
import logging
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moco.cli import training_run
from moco.cli.checks import num_processes
from moco.cli.resuming import Resumed
from moco.cli.training_run import Run
from moco.config.data import DataConfig
from moco.config.train import TrainConfig
from moco.errors import InputError
from moco.phases import LOADING, phase

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from torch import nn

    from moco.data.loading.datamodule import PretrainingData
    from moco.data.sources.source import DataSource
    from moco.evaluation.dense_features import DenseSet
    from moco.methods.moco import MoCo

log = logging.getLogger("moco.train")

kept_sources: dict[str, "DataSource"] = {}
"""The images that were listed to choose a preset, by their settings. See `listed_source`."""
# The settings of evaluation that the kNN monitor takes as they are.
KNN = (
    "num_neighbors",
    "temperature",
    "feature",
    "precision",
    "every_n_epochs",
    "baselines",
)
# The settings of monitor.dense that say when and how to vote. Its other settings describe the data.
DENSE_VOTE = ("every_n_epochs", "num_neighbors", "temperature")


def build_data(
    config: TrainConfig, folder: Path | None = None, source: "DataSource | None" = None
) -> "PretrainingData":
    """Return the loaders of the config's dataset and augmentation pair.

    Args:
        config: the config of the run.
        folder: where the list of the images is kept, for other processes and the next start.
        source: the images, in place of the config's dataset.
    """
    data = config.data
    if config.method.mask_own_group and data.group is None:
        raise InputError(
            "method.mask_own_group=true: needs data.group, which says what belongs together"
        )
    if source is None:
        source = listed_source(data, folder)
    if data.group is not None:
        from moco.data.sources.groups import with_groups

        source = with_groups(source, data.root, data.group)

    with phase(LOADING, unit=""):
        from moco.data.augment.resolution_ramp import ResolutionRamp
        from moco.data.augment.trial import try_own_steps
        from moco.data.augment.views import EvaluationView, ViewPair
        from moco.data.loading.datamodule import PretrainingData
        from moco.data.loading.loaders import choose_engine
        from moco.data.sources.sample import prepare_source
        from moco.training.hardware import choose_device

    pair = config.augmentation
    values = prepare_source(source, vars(data), pair.mean, config.preview.bands)
    kind: dict[str, Any] = {"bands": values.bands, "is_float": values.is_float}
    image_size = data.image_size or source.image_size
    device = choose_device(config.trainer.accelerator)
    ramp = ResolutionRamp(image_size, pair.start_image_size, pair.image_size_step, pair.ramp_epochs)
    views = ViewPair(
        pair.query, pair.key, pair.mean, pair.std, image_size, config.seed, ramp=ramp, **kind
    )
    full_views = views.views_of_size[image_size]
    engine = choose_engine(data.engine, source.train, image_size, device.type, full_views)
    views.engine = engine.name
    where = "in memory" if engine.in_memory else f"{data.num_workers} loader processes"
    log.info("augmentation: %s engine, %s (%s)", engine.name, where, engine.reason)
    loaders = PretrainingData(
        source,
        views,
        EvaluationView(image_size, data.crop_ratio, pair.mean, pair.std, **kind),
        image_size=image_size,
        batch_size=data.batch_size,
        batches_per_step=num_processes(config) * config.trainer.accumulate_grad_batches,
        evaluation_batch_size=config.evaluation.batch_size,
        num_workers=data.num_workers,
        max_bad_fraction=data.max_bad_fraction,
        seed=config.seed,
        in_memory=engine.in_memory,
        pair=data.pair,
    )
    if any(view.own_steps for view in full_views):
        for index, image, _ in loaders.first_images(1):
            try_own_steps(views, image.pixels(), index)
    return loaders


def listed_source(data: DataConfig, folder: Path | None, *, is_kept: bool = False) -> "DataSource":
    """Return the images of a config.

    Args:
        data: which images.
        folder: where the list of the images is kept, for other processes and the next start.
        is_kept: the next call with the same settings returns the same images without listing them
            again.

    Raises:
        InputError: the images cannot be listed.
    """
    # The rest is imported afterwards: a mistake in data.root shows at once.
    with phase(LOADING, unit=""):
        from moco.data.sources.registry import build_source

    arguments = inspect.signature(build_source).parameters
    settings = {key: value for key, value in vars(data).items() if key in arguments}
    kept = kept_sources.pop(repr(settings), None)
    if kept is not None:
        return kept
    listing = folder / "images.npz" if folder is not None and folder.is_dir() else None
    source = build_source(**settings, listing=listing)
    kept_sources.clear()
    if is_kept:
        kept_sources[repr(settings)] = source
    return source


def build_method(plain: dict[str, Any], backbone: "nn.Module | None" = None) -> "MoCo":
    """Return the method of a config, with learning rates scaled to the batch size.

    Args:
        plain: a `TrainConfig` as plain data.
        backbone: a module in place of the config's.
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
    # A module can be false: its length may be 0.
    chosen = plain["backbone"] if backbone is None else backbone
    return MoCo(chosen, optimizer, **plain["method"])


def build_trainer(
    run: Run,
    environment: "ClusterEnvironment | None" = None,
    resumed: Resumed | None = None,
    dense_set: "DenseSet | None" = None,
) -> "pl.Trainer":
    """Return Lightning's Trainer with the callbacks of pretraining.

    Args:
        run: the run.
        environment: who started the processes.
        resumed: the checkpoint that the run goes on from.
        dense_set: the images of ``monitor.dense``, from `build_dense_set`.
    """
    from moco.callbacks.collapse_watch import CollapseWatch
    from moco.callbacks.dense_monitor import DenseMonitor
    from moco.callbacks.feature_plots import FeaturePlots
    from moco.callbacks.knn_monitor import KNNMonitor
    from moco.callbacks.label_free_monitor import LabelFreeMonitor
    from moco.callbacks.learning_verdict import LearningVerdict
    from moco.callbacks.long_run import LongRun
    from moco.callbacks.online_probe import OnlineProbe
    from moco.callbacks.training_monitor import TrainingMonitor
    from moco.callbacks.unreadable_images import UnreadableList
    from moco.callbacks.view_pairs import ViewPairPlot

    config: TrainConfig = run.config
    figures = run.figures
    evaluation = config.evaluation
    log_every_n_steps = config.trainer.log_every_n_steps
    is_stopping = partial(bool, run.stop)
    monitors: list[pl.Callback] = [
        KNNMonitor(
            figures,
            **{key: getattr(evaluation, key) for key in KNN},
            is_untrained=config.init_from is None,
            should_stop=is_stopping,
            plots=FeaturePlots(evaluation.plots_every_n_epochs, evaluation.projector_images),
        ),
        CollapseWatch(),
        LongRun(),
    ]
    if evaluation.diagnostics_every_n_steps:
        monitors.append(LabelFreeMonitor(evaluation.diagnostics_every_n_steps))
    if dense_set is not None:
        vote = {key: getattr(config.monitor.dense, key) for key in DENSE_VOTE}
        monitors.append(DenseMonitor(figures, dense_set, **vote, should_stop=is_stopping))
    if evaluation.online_probe:
        monitors.append(OnlineProbe(figures, log_every_n_steps))
    if evaluation.plots_every_n_epochs:
        monitors.append(ViewPairPlot(evaluation.plots_every_n_epochs))
    monitors += [
        UnreadableList(run.folder, figures),
        # After the monitors whose figures it judges.
        LearningVerdict(figures),
    ]
    return training_run.build_trainer(
        run,
        TrainingMonitor(figures, log_every_n_steps),
        monitors,
        (("knn/top1", "kNN"), ("dense/knn_miou", "dense mIoU")),
        run.plain["checkpoint"],
        environment,
        resumed,
    )


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

    from moco.data.sources.source import PIXEL_SETTINGS
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
            pixel_settings={key: getattr(config.data, key) for key in PIXEL_SETTINGS},
        )
    except InputError as error:
        # The message names keys below data, as moco.segment has them.
        message = re.sub(r"\bdata\.(root|ignore_index)\b", r"monitor.dense.\1", str(error))
        raise InputError(message) from error
