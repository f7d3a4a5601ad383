"""What pretraining and segmentation share: the run folder, resuming, the Trainer and its end."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moco.cli.resuming import Resumed, TensorSettings, check_checkpoint
from moco.config.paths import with_absolute_paths
from moco.errors import Interrupted
from moco.runs.training_set import TrainingSet
from moco.screen import screen

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from pytorch_lightning.loggers import Logger
    from rich.console import Console

    from moco.callbacks.training_monitor import LossMonitor
    from moco.runs.interrupts import StopRequest

log = logging.getLogger(__name__)


@dataclass
class Run:
    """One process of a training."""

    config: Any
    """A `TrainConfig` or `SegmentConfig`."""
    folder: Path
    """The run folder."""
    stop: "StopRequest"
    """The request to save and stop."""
    files: dict[str, str] = field(default_factory=dict)
    """Hydra's files for the folder's ``.hydra``, by name."""
    console: "Console" = field(default_factory=lambda: screen.console)
    """Where the epochs and the closing table are printed."""
    callbacks: "Sequence[pl.Callback]" = ()
    """Of the user, as objects."""
    loggers: "Sequence[Logger]" = ()
    """Of the user, as objects."""
    figures: dict[str, Any] = field(default_factory=dict)
    """What becomes ``metrics.json``. Callbacks write into it."""
    training_set: TrainingSet | None = None
    """The images that it trains on."""

    def __post_init__(self) -> None:
        self.plain = with_absolute_paths(dataclasses.asdict(self.config))
        """The config as plain data, as the run folder and the checkpoints keep it."""
        # A run without any overrides. It completes the configs of older versions.
        self.defaults = dataclasses.asdict(type(self.config)())

    def is_finished(self) -> bool:
        """Return whether the folder holds this run and its end; log what goes on nevertheless."""
        from moco.runs.run_folder import is_finished

        if not is_finished(self.folder, self.plain, self.defaults):
            return False
        log.info("%s is finished; a larger trainer.max_epochs goes on", self.folder)
        return True


def take_folder(
    run: Run,
    stack: ExitStack,
    checkpoint: Path | None,
    hparams: Any,
    settings: TensorSettings,
) -> Resumed | None:
    """Lock the run folder for this process until `stack` closes, and check the checkpoint.

    Args:
        run: the run.
        stack: where the lock is entered.
        checkpoint: from `find_checkpoint`.
        hparams: the hyperparameters of the run's module.
        settings: names what must be equal in the checkpoint and in this run.

    Returns:
        What the run goes on from; None for a new run.

    Raises:
        InputError: the folder belongs to another run, or `check_checkpoint` refuses the checkpoint.
            The folder is then as it was.
    """
    from moco.runs.checkpoint_files import read_checkpoint, sound_checkpoint
    from moco.runs.run_folder import LAST_CHECKPOINT, claimed

    resumed: list[Resumed] = []

    def check() -> None:
        if checkpoint is None:
            return
        content: Any = None
        if checkpoint == run.folder / LAST_CHECKPOINT:
            content = sound_checkpoint(run.folder)  # not None: `find_checkpoint` has found one
        else:
            content = read_checkpoint(checkpoint)
        resumed.append(check_checkpoint(run, checkpoint, content, hparams, settings))

    if checkpoint == run.folder / LAST_CHECKPOINT:
        # Its own checkpoint is read inside the lock, because another process may write there.
        stack.enter_context(claimed(run.folder, run.plain, run.files, check))
    else:
        check()  # before anything is written to the folder
        stack.enter_context(claimed(run.folder, run.plain, run.files))
    if checkpoint is None:
        return None
    log.info("going on from %s", checkpoint)
    return resumed[0]


def build_trainer(
    run: Run,
    loss_monitor: "LossMonitor",
    monitors: "Sequence[pl.Callback]",
    scores: Sequence[tuple[str, str]],
    checkpoints: Mapping[str, Any],
    environment: "ClusterEnvironment | None" = None,
    resumed: Resumed | None = None,
) -> "pl.Trainer":
    """Return Lightning's Trainer with the callbacks of every training around its own.

    The user's callbacks come after those that measure, and before the checkpoints, which hold their
    states.

    Args:
        run: the run.
        loss_monitor: reports the loss.
        monitors: what else the run measures of itself.
        scores: figures that the progress bar shows, each with its name there. The first one decides
            which checkpoint is the best.
        checkpoints: further arguments of `Checkpoints`.
        environment: who started the processes.
        resumed: the checkpoint that the run goes on from.

    Raises:
        InputError: a callback or logger of the user cannot be used.
    """
    from moco.callbacks.bad_steps import BadSteps
    from moco.callbacks.busy_machine import BusyMachine
    from moco.callbacks.checkpoints import Checkpoints
    from moco.callbacks.progress import ProgressBar
    from moco.callbacks.resumed_schedule import ResumedSchedule
    from moco.cli.extensions import build_callbacks, build_loggers, logger_names
    from moco.runs.run_folder import last_good
    from moco.training import trainer

    settings = run.plain["trainer"]
    step = None if resumed is None else resumed.step
    score = scores[0][0]
    checkpoint_name = partial(last_good, run.folder)
    ours = [
        loss_monitor,
        BadSteps(
            run.figures, settings["max_bad_steps"], settings["log_every_n_steps"], checkpoint_name
        ),
        *monitors,
        BusyMachine(),
    ]
    if resumed is not None:
        ours.append(ResumedSchedule(resumed.has_other_steps, resumed.steps_in_epoch))
    callbacks = [
        *ours,
        *build_callbacks(run.plain["callbacks"], run.callbacks, ours),
        ProgressBar(run.figures, run.console, loss_monitor, *scores),
        # Last, so that a checkpoint holds what the other callbacks have written into `figures`.
        Checkpoints(
            run.folder,
            run.plain,
            run.figures,
            run.stop,
            monitor=score,
            training_set=run.training_set,
            takes_figures=resumed is None or resumed.has_own_figures,
            **checkpoints,
        ),
    ]
    loggers = build_loggers(
        logger_names(run.plain["logger"]),
        run.plain["logger_options"],
        run.folder,
        run.plain,
        [score, "epoch/loss"],
        step,
    )
    if step is None:
        for logger in run.loggers:
            logger.log_hyperparams(run.plain)
    loggers += run.loggers
    return trainer.build_trainer(settings, run.folder, loggers, callbacks, environment)


def fit(
    run: Run, trainer: "pl.Trainer", module: Any, data: "pl.LightningDataModule", path: Path | None
) -> None:
    """Train from the checkpoint at `path`, if there is one, to the end, and complete the figures.

    Raises:
        Interrupted: a signal came, perhaps before there was anything to save.
    """
    from moco.evaluation.features import EmbeddingStopped
    from moco.training.distributed.collectives import largest

    checkpoint = None if path is None else str(path)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except EmbeddingStopped as error:
        # The processes may have seen different signals, or none yet.
        number = largest([run.stop.signal_number or 0])[0]
        raise Interrupted(number, "before the first training step; nothing to save") from error
    # A run that had reached its last step within its first epoch ends at once when it is started
    # again. No epoch end has filled these in then.
    run.figures.setdefault("epoch", trainer.current_epoch)
    run.figures.setdefault("step", trainer.global_step)
