"""What a run is held to before its first step."""

import importlib.util
from pathlib import Path

from moco.config.train import OptimizerConfig, TrainerConfig
from moco.errors import InputError


def check_run(resume: str | None, trainer: TrainerConfig) -> None:
    """Raises InputError for what no training can do, whatever the data."""
    if resume not in (None, "auto") and not Path(str(resume)).is_file():
        raise InputError(f"resume={resume}: no such file")
    if trainer.max_steps == 0:
        raise InputError("trainer.max_steps=0: expected -1 for no limit, or at least 1")


def check_optimizer(optimizer: OptimizerConfig) -> None:
    """Raises InputError if the optimizer's library is not installed."""
    if optimizer.name == "lars" and importlib.util.find_spec("timm") is None:
        raise InputError("optimizer.name=lars needs timm: pip install 'moco-ssl[lars]'")
