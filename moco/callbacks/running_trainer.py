"""What several callbacks ask a running Trainer."""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger

from moco.data.loading.datamodule import PretrainingData


def data_of(trainer: pl.Trainer) -> PretrainingData:
    """Return the data module of the running pretraining."""
    return trainer.datamodule  # type: ignore[attr-defined]


def is_end(trainer: pl.Trainer, epoch: int) -> bool:
    """Return whether the training ends with this epoch, counted from 1."""
    return epoch == trainer.max_epochs or trainer.global_step == trainer.max_steps


def is_step_end(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Return whether the optimizer took a step after this batch."""
    is_last = batch_idx + 1 == trainer.num_training_batches
    return is_last or (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def is_logged_step(trainer: pl.Trainer, batch_idx: int, every_n_steps: int) -> bool:
    """Return whether the optimizer took its every n-th step after this batch."""
    return is_step_end(trainer, batch_idx) and trainer.global_step % every_n_steps == 0


def log_scalars(
    trainer: pl.Trainer, scalars: Mapping[str, float | None], step: int | None = None
) -> None:
    """Give the scalars of a step to all loggers of the run.

    Args:
        trainer: of the run.
        scalars: by name. One that is None was not measured, and is left out.
        step: number of optimizer steps; None: of the latest one.
    """
    if step is None:
        step = trainer.global_step
    measured = {name: scalar for name, scalar in scalars.items() if scalar is not None}
    for logger in trainer.loggers:
        logger.log_metrics(dict(measured), step=step)


def board_of(trainer: pl.Trainer) -> Any:
    """Return the ``SummaryWriter`` of the run's TensorBoard logger, or None if there is none.

    Images, histograms and the projector go there. The other loggers get only scalars.
    """
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            return logger.experiment
    return None
