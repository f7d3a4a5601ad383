"""Weights & Biases and MLflow: programs and servers that know a run by an id.

A run keeps its ids in its folder, so that it is the same run after a resume. Without an account or
a server both write into the run folder.
"""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import MLFlowLogger, WandbLogger

from moco.runs.atomic_files import write_json

log = logging.getLogger(__name__)

IDS = "logger_ids.json"
PROJECT = "moco"


class WandbRun(WandbLogger):
    """Lightning's WandbLogger, which also ends the run of W&B when the training ends.

    Otherwise the next training in this process would go into the same run.
    """

    def finalize(self, status: str) -> None:
        super().finalize(status)
        self.experiment.finish(exit_code=0 if status == "success" else 1)


def start_wandb(folder: Path, config: Mapping[str, Any], options: Mapping[str, Any]) -> WandbLogger:
    """Start a run of W&B, or go on with that of the run folder.

    It is offline, unless the options or ``WANDB_MODE`` say otherwise. ``wandb sync`` uploads it.

    Args:
        folder: the run folder. W&B writes into its sub-folder ``wandb``.
        config: of the run, as plain data.
        options: of Lightning's WandbLogger and of ``wandb.init``, in place of ours.
    """
    settings: dict[str, Any] = {
        "name": run_name(folder),
        "project": os.environ.get("WANDB_PROJECT", PROJECT),
        # With "console" W&B would keep every frame of the progress bar as text.
        "settings": {"console": "off"},
    }
    if "dir" not in options:
        settings["save_dir"] = str(folder)
    is_own = not {"id", "version"} & options.keys()
    if is_own:
        settings["id"] = known_id(folder, "wandb")
    if not {"mode", "offline"} & options.keys() and "WANDB_MODE" not in os.environ:
        settings["mode"] = "offline"
        settings["settings"]["silent"] = True
        log.info(
            "wandb: offline, in %s; 'wandb sync' uploads it, WANDB_MODE=online sends it at once",
            folder / "wandb",
        )
    logger = WandbRun(**{**settings, **options})
    logger.log_hyperparams(dict(config))
    if is_own:
        keep_id(folder, "wandb", logger.experiment.id)
    return logger


def start_mlflow(
    folder: Path, config: Mapping[str, Any], options: Mapping[str, Any]
) -> MLFlowLogger:
    """Start a run of MLflow, or go on with that of the run folder.

    It is in the SQLite file ``mlflow.db`` of the run folder, unless the options or
    ``MLFLOW_TRACKING_URI`` name another place.

    Args:
        folder: the run folder.
        config: of the run, as plain data.
        options: of Lightning's MLFlowLogger, in place of ours.
    """
    place = folder.absolute()
    settings: dict[str, Any] = {
        "experiment_name": os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT),
        "run_name": run_name(folder),
        # Waiting for the database would take 30 ms each time.
        "synchronous": False,
        "run_id": known_id(folder, "mlflow"),
    }
    if "MLFLOW_TRACKING_URI" in os.environ:
        settings["tracking_uri"] = os.environ["MLFLOW_TRACKING_URI"]
    elif not {"tracking_uri", "save_dir"} & options.keys():
        settings["tracking_uri"] = f"sqlite:///{place / 'mlflow.db'}"
        settings["artifact_location"] = str(place / "mlflow_artifacts")
    settings |= options
    logger = MLFlowLogger(**settings)
    run_id = logger.run_id  # starts the run
    if settings["run_id"] is None:
        # MLflow refuses to change a parameter, and a resumed run may have more epochs.
        logger.log_hyperparams(dict(config))
        keep_id(folder, "mlflow", str(run_id))
    else:
        logger.experiment.update_run(run_id, status="RUNNING")
    return logger


def run_name(folder: Path) -> str:
    """Return what a tracker calls the run: the last two parts of its folder."""
    return "/".join(folder.absolute().parts[-2:])


def known_ids(folder: Path) -> dict[str, str]:
    """Return the ids of the run in `folder`, by logger."""
    path = folder / IDS
    ids: dict[str, str] = {}
    if path.is_file():
        ids = json.loads(path.read_text())
    return ids


def known_id(folder: Path, name: str) -> str | None:
    """Return the id that a logger gave the run in `folder`; None for a new run."""
    return known_ids(folder).get(name)


def keep_id(folder: Path, name: str, run_id: str) -> None:
    """Remember the id that a logger gave the run in `folder`."""
    write_json(folder / IDS, {**known_ids(folder), name: run_id})
