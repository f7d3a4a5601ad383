"""Lightning's Trainer as every program that trains uses it."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from moco.runs.checkpoint_files import AtomicCheckpointIO
from moco.training.distributed.collectives import world_size
from moco.training.hardware import choose_device, choose_precision
from moco.training.hardware_fit import HardwareFit
from moco.training.logger import RunLogger
from moco.training.unprofiled import Unprofiled

OURS = ("compile", "cuda_graphs", "max_bad_steps", "memory_format", "timeout_minutes")
"""Fields of ``TrainerConfig`` that Lightning's Trainer does not know."""


def build_trainer(
    settings: Mapping[str, Any],
    folder: Path,
    callbacks: Sequence[pl.Callback],
    environment: ClusterEnvironment | None = None,
    purge_step: int | None = None,
) -> pl.Trainer:
    """Lightning's Trainer with our checkpoints and logger, in the process group that is there.

    Args:
        settings: the fields of ``TrainerConfig``.
        folder: the run folder.
        callbacks: in the order in which they are called.
        environment: who started the processes, see `environment_of`; None: this process is alone.
        purge_step: see `RunLogger`.
    """
    device = choose_device(settings["accelerator"], settings["devices"])
    precision = choose_precision(settings["precision"], device)
    fit = HardwareFit(
        device, precision, settings["memory_format"], settings["compile"], settings["cuda_graphs"]
    )
    settings = {name: value for name, value in settings.items() if name not in OURS}
    settings |= {
        "precision": precision,
        "accelerator": device.type,
    }  # Lightning's own auto would take an Apple GPU
    settings["benchmark"] &= not settings["deterministic"]  # cuDNN's trials choose by timing
    if world_size() > 1:
        options: dict[str, Any] = {buffers_switch(): False, "gradient_as_bucket_view": True}
        settings["strategy"] = DDPStrategy(**options)
    trainer = pl.Trainer(
        **settings,
        callbacks=[fit, *callbacks],
        logger=RunLogger(folder, purge_step),
        profiler=Unprofiled(),
        plugins=[AtomicCheckpointIO(), environment or LightningEnvironment()],
        default_root_dir=folder,
        use_distributed_sampler=False,  # EpochSampler shares the images out itself
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # With max_steps Lightning takes an epoch that had ended before a resume for unfinished, and its data shift.
    trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]
    # Over several devices Lightning asks rank 0 in every step, and waits for the devices, whether SIGTERM has come. It never
    # hears of it: `Checkpoints` takes the signal, and has the processes agree without a wait.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer


def buffers_switch() -> str:
    """The name of DistributedDataParallel's switch that sends rank 0's buffers to the others in every step.

    We need it off: queue and pointer are equal everywhere by construction, and running statistics matter only where they
    are measured or saved.
    """
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    return (
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    )  # its older name


def steps_per_epoch(trainer: pl.Trainer) -> int:
    """Optimizer steps in one epoch of a running training."""
    return -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)


def num_steps(trainer: pl.Trainer) -> int:
    """Optimizer steps in the whole of a running training."""
    steps = (trainer.max_epochs or 1) * steps_per_epoch(trainer)
    return steps if trainer.max_steps < 0 else min(steps, trainer.max_steps)
