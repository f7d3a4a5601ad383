"""Lightning's Trainer as every program that trains uses it, and what it fails with in one line."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from moco.errors import RunError
from moco.training.checkpoint_files import AtomicCheckpointIO
from moco.training.hardware import choose_device, choose_precision
from moco.training.logger import RunLogger
from moco.training.run_folder import last_good


def build_trainer(settings: Mapping[str, Any], folder: Path, callbacks: Sequence[pl.Callback]) -> pl.Trainer:
    """Lightning's Trainer with our checkpoints and logger.

    Args:
        settings: the fields of ``TrainerConfig``.
        folder: the run folder.
        callbacks: in the order in which they are called.
    """
    settings = dict(settings)
    settings["precision"] = choose_precision(settings["precision"], choose_device(settings["accelerator"]))
    settings["benchmark"] &= not settings["deterministic"]  # cuDNN's trials choose by timing
    trainer = pl.Trainer(
        **settings,
        callbacks=list(callbacks),
        logger=RunLogger(folder),
        plugins=[AtomicCheckpointIO()],
        default_root_dir=folder,
        use_distributed_sampler=False,  # EpochSampler shares the pictures out itself
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # With max_steps Lightning takes an epoch that had ended before a resume for unfinished, and its data shift.
    trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]
    return trainer


@contextmanager
def failures_named(folder: Path) -> Iterator[None]:
    """Inside, a full GPU or disk becomes a `RunError` that names the run's last good checkpoint."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(
            "the GPU is out of memory; a smaller data.batch_size or more trainer.accumulate_grad_batches needs less; "
            f"{last_good(folder)}"
        ) from error
    except OSError as error:  # the disk is full or gone
        raise RunError(f"{error}, in the run {folder}; {last_good(folder)}") from error


def steps_per_epoch(trainer: pl.Trainer) -> int:
    """Optimizer steps in one epoch of a running training."""
    return -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)


def num_steps(trainer: pl.Trainer) -> int:
    """Optimizer steps in the whole of a running training."""
    steps = (trainer.max_epochs or 1) * steps_per_epoch(trainer)
    return steps if trainer.max_steps < 0 else min(steps, trainer.max_steps)
