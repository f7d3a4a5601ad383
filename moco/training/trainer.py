"""Lightning's Trainer, as every program that trains uses it."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from moco.runs.checkpoint_files import AtomicCheckpointIO
from moco.training.distributed.collectives import world_size
from moco.training.hardware import choose_device, choose_precision
from moco.training.hardware_fit import HardwareFit

OURS = ("compile", "cuda_graphs", "max_bad_steps", "memory_format", "timeout_minutes")
"""Fields of ``TrainerConfig`` that Lightning's Trainer does not have."""


def build_trainer(
    settings: Mapping[str, Any],
    folder: Path,
    loggers: Sequence[Logger],
    callbacks: Sequence[pl.Callback],
    environment: ClusterEnvironment | None = None,
) -> pl.Trainer:
    """Return Lightning's Trainer with our checkpoints, in the current process group.

    Args:
        settings: the fields of ``TrainerConfig``.
        folder: the run folder.
        loggers: all of them get every scalar.
        callbacks: in the order in which they are called.
        environment: who started the processes, see `environment_of`; None: this process is alone.
    """
    device = choose_device(settings["accelerator"], settings["devices"])
    precision = choose_precision(settings["precision"], device)
    ways = [settings[name] for name in ("memory_format", "compile", "cuda_graphs")]
    fit = HardwareFit(device, precision, *ways)
    options = {name: value for name, value in settings.items() if name not in OURS}
    options["precision"] = precision
    options["accelerator"] = device.type  # Lightning's own "auto" would take an Apple GPU
    if options["deterministic"]:
        options["benchmark"] = False  # cuDNN's benchmark chooses kernels by timing
    if world_size() > 1:
        ddp_options: dict[str, Any] = {buffers_switch(): False, "gradient_as_bucket_view": True}
        options["strategy"] = DDPStrategy(**ddp_options)
    trainer = pl.Trainer(
        **options,
        callbacks=[fit, *callbacks],
        logger=list(loggers) or False,  # Lightning takes no list for its default logger
        plugins=[AtomicCheckpointIO(), environment or LightningEnvironment()],
        default_root_dir=folder,
        use_distributed_sampler=False,  # EpochSampler gives each process its share
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    change_private_methods(trainer)
    return trainer


def change_private_methods(trainer: pl.Trainer) -> None:
    """Replace two methods of Lightning for which there is no public setting.

    tests/training/test_trainer.py fails if Lightning renames them.
    """
    # With max_steps, Lightning takes an epoch that ended before a resume for unfinished. It then
    # starts that epoch again, and all later epochs see other images than a straight run.
    trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]
    # With several devices, Lightning asks rank 0 in every step whether SIGTERM has come, and waits
    # for the answer on the device. `Checkpoints` receives the signal instead of Lightning, and lets
    # the processes agree without a wait.
    epoch_loop = trainer.fit_loop.epoch_loop
    epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def buffers_switch() -> str:
    """Return the name of DistributedDataParallel's argument that broadcasts buffers in every step.

    It has to be off: the queue is equal everywhere by construction, and running statistics matter
    only where they are measured or saved.
    """
    arguments = inspect.signature(DistributedDataParallel.__init__).parameters
    if "forward_sync_buffers" in arguments:
        return "forward_sync_buffers"
    return "broadcast_buffers"  # the older name
