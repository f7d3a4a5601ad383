"""Take a run folder: find the checkpoint to resume from, and check that it fits the config."""

import dataclasses
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from moco.config.train import TrainConfig
from moco.errors import InputError

log = logging.getLogger("moco.train")

DEFAULTS = dataclasses.asdict(TrainConfig())
"""The config of a run without any overrides. It completes the configs of older versions."""

# The settings of the method that decide the shapes of a checkpoint's tensors.
METHOD_SHAPES = ("projector", "predictor", "embedding_dim", "queue_size", "num_queues")


def take_folder(
    stack: ExitStack,
    folder: Path,
    plain: dict[str, Any],
    resume: str | None,
    files: dict[str, str],
    read: dict[Path, dict[str, Any]],
) -> tuple[Path | None, int | None]:
    """Lock the run folder for this process until `stack` closes, and read the checkpoint.

    Args:
        stack: where the lock is entered.
        folder: the run folder.
        plain: the config as plain data.
        resume: the setting of the same name.
        files: Hydra's files for the folder's ``.hydra``, by name.
        read: gets the content of the checkpoint under its path.

    Returns:
        The checkpoint to go on from and its number of optimizer steps; two None for a new run.

    Raises:
        InputError: the folder belongs to another run, or the checkpoint does not fit the config.
    """
    from moco.runs.checkpoint_files import read_checkpoint, sound_checkpoint
    from moco.runs.run_folder import LAST_CHECKPOINT, claimed, find_checkpoint

    checkpoint = find_checkpoint(folder, plain, resume, DEFAULTS)
    is_of_other_run = checkpoint is not None and checkpoint != folder / LAST_CHECKPOINT
    step = None
    if checkpoint is not None and is_of_other_run:
        # Checked before anything is written to the folder.
        read[checkpoint] = read_checkpoint(checkpoint)
        step = check_resumable(checkpoint, read[checkpoint], plain)
    stack.enter_context(claimed(folder, plain))
    for name, text in files.items():
        (folder / ".hydra" / name).write_text(text)
    if checkpoint is None:
        return None, None
    if not is_of_other_run:
        content = sound_checkpoint(folder)
        assert content is not None  # `find_checkpoint` has found one
        read[checkpoint] = content
        step = check_resumable(checkpoint, content, plain)
    log.info("going on from %s", checkpoint)
    return checkpoint, step


def check_resumable(path: Path, checkpoint: dict[str, Any], plain: dict[str, Any]) -> int:
    """Return the number of optimizer steps of a checkpoint, after comparing it with the config.

    Args:
        path: where the checkpoint was read.
        checkpoint: its content.
        plain: the config of the run as plain data.

    Raises:
        InputError: the checkpoint holds other tensors than the run; names the settings.
    """
    from moco.runs.run_folder import completed, differences

    of_checkpoint = tensor_settings(completed(checkpoint["config"], DEFAULTS))
    of_run = tensor_settings(plain)
    differing = differences(of_checkpoint, of_run)
    if differing:
        raise InputError(
            f"resume={path}: the checkpoint has another architecture or optimizer: "
            f"{'; '.join(differing)}"
        )
    return int(checkpoint["global_step"])


def tensor_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that decide which tensors a checkpoint holds, and their shapes."""
    method = {key: config["method"][key] for key in METHOD_SHAPES}
    has_dense_term = config["method"]["dense_weight"] > 0
    method["dense_weight"] = "above 0" if has_dense_term else 0
    optimizer = {key: config["optimizer"][key] for key in ("name", "decay_all")}
    return {"backbone": config["backbone"], "method": method, "optimizer": optimizer}
