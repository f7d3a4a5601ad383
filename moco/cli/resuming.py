"""What a training checks of the checkpoint that it goes on from, and what it says about it."""

import json
import logging
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moco.config.segment import SegmentConfig
from moco.errors import InputError
from moco.runs.config_changes import completed, differing, flattened
from moco.runs.run_folder import CONFIG, LAST_CHECKPOINT, as_override
from moco.runs.run_status import read_status
from moco.runs.training_set import TrainingSet, change_in_words, counted, from_checkpoint

log = logging.getLogger(__name__)

TensorSettings = Callable[[Mapping[str, Any], Any], dict[str, Any]]
"""From a run's config and its module's hyperparameters, both as plain data, it returns the settings
that decide which tensors a checkpoint holds, and their shapes."""


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a run goes on from."""

    step: int
    """Its optimizer steps."""
    has_own_figures: bool
    """Its figures are of this run, and of the same images."""
    has_other_steps: bool
    """An epoch had another number of steps."""
    steps_in_epoch: int
    """Steps done of an unfinished epoch; 0 at the end of an epoch."""


def check_checkpoint(
    run: Any,
    path: Path,
    content: dict[str, Any],
    hparams: Any,
    settings: TensorSettings,
) -> Resumed:
    """Return what a run goes on from, and log what has changed about its images.

    Args:
        run: the `Run`. Without a training set, the images are not compared.
        path: of the checkpoint.
        content: of the checkpoint.
        hparams: the hyperparameters of the run's module.
        settings: names what must be equal in the checkpoint and in this run.

    Raises:
        InputError: the checkpoint holds other tensors than the run, for which the error names the
            settings and the command that works; or the dataset has changed so much that an epoch
            has other steps, and nobody has allowed it.
    """
    config_there = completed(content["config"], run.defaults)
    found = differing(
        settings(config_there, content["hyper_parameters"]), settings(run.plain, hparams)
    )
    if found:
        named = [f"{key}: {old} there, {new} here" for key, (old, new) in found.items()]
        raise InputError(
            f"resume={path}: the checkpoint has another architecture or optimizer: "
            f"{'; '.join(named)}{command_that_works(run, list(found), config_there)}"
        )
    is_own = path == run.folder / LAST_CHECKPOINT
    step = int(content["global_step"])
    done = steps_in_epoch(content, config_there)
    then, now = from_checkpoint(content), run.training_set
    if now is None or then is None:
        # Checkpoints of earlier versions do not say their images.
        return Resumed(step, is_own, False, done)
    is_changed = now.is_changed(then)
    has_other_steps = then.steps_per_epoch != now.steps_per_epoch
    # In batches of this run.
    done = done * config_there["data"]["batch_size"] // run.config.data.batch_size
    if not is_changed and not has_other_steps:
        return Resumed(step, is_own, False, done)

    words = change_in_words(then, now)
    left = counted(steps_left(run, content, now, done), "step")
    # Whoever names another dataset means to change the images.
    is_same_dataset = not differing({"data": config_there["data"]}, {"data": run.plain["data"]})
    if has_other_steps and is_same_dataset and not run.config.resume_changed_data:
        new_run = as_override("init_from", path)
        raise InputError(
            f"resume={path}: the dataset has {words}. Bring the former images back; or add "
            "resume_changed_data=true, and the schedule goes on at the same epoch, with "
            f"{left} left; or start a new run from these weights, with {new_run} and another "
            "hydra.run.dir=PATH"
        )
    if done > now.steps_per_epoch:
        raise InputError(
            f"resume={path}: the dataset has {words}, and the checkpoint is of the middle of an "
            f"epoch, after {counted(done, 'step')} of it; an epoch's own checkpoint can go on, or "
            f"a new run from these weights, with {as_override('init_from', path)}"
        )
    schedule = "the schedule stays as it is"
    if has_other_steps:
        schedule = f"the schedule goes on at the same epoch, with {left} left"
    figures = "; the figures of the former images are left out" if is_changed else ""
    log.warning("resume=%s: the dataset has %s; %s%s", path, words, schedule, figures)
    return Resumed(step, is_own and not is_changed, has_other_steps, done)


def steps_in_epoch(content: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """Return how many steps of an unfinished epoch a checkpoint has done; 0 at an epoch's end.

    Args:
        content: of the checkpoint.
        config: of its run, as plain data.
    """
    if content["figures"].get("step") == content["global_step"]:
        return 0
    # A checkpoint is written before Lightning counts its last batch as completed.
    found: Any = content
    for key in ("loops", "fit_loop", "epoch_loop.batch_progress", "current", "processed"):
        found = found.get(key) if isinstance(found, Mapping) else None
    num_batches = found if isinstance(found, int) else 0
    return num_batches // config["trainer"]["accumulate_grad_batches"]


def steps_left(run: Any, content: Mapping[str, Any], now: TrainingSet, done: int) -> int:
    """Return how many steps a run has still to do.

    Args:
        run: the `Run`.
        content: of the checkpoint.
        now: the images of the run.
        done: steps of the present epoch.
    """
    trainer = run.plain["trainer"]
    epochs = trainer["max_epochs"] - content["figures"].get("epoch", 0)
    steps = epochs * now.steps_per_epoch - done
    if trainer["max_steps"] > 0:
        steps = min(steps, trainer["max_steps"] - content["global_step"])
    return max(int(steps), 0)


def command_that_works(run: Any, keys: list[str], there: Mapping[str, Any]) -> str:
    """Return ``; this works: COMMAND`` with the settings of the checkpoint, or nothing.

    Args:
        run: the `Run`. Without Hydra there is no command.
        keys: the settings that differ.
        there: the config of the checkpoint's run.
    """
    composed = run.files.get("hydra.yaml")
    old, new = flattened(there), flattened(run.plain)
    program = "moco.segment" if isinstance(run.config, SegmentConfig) else "moco.train"
    if program == "moco.segment":
        keys = [*keys, "checkpoint"]  # it decides the backbone
    changes = {key: old.get(key) for key in keys if key in new and old.get(key) != new[key]}
    if composed is None or not changes:
        return ""
    overrides = yaml.safe_load(composed)["hydra"]["overrides"]
    words = [f"python -m {program}"]
    for override in [*overrides["task"], *overrides["hydra"]]:
        key = override.partition("=")[0]
        # Hydra itself adds its mode.
        if key not in changes and key != "hydra.mode":
            words.append(shlex.quote(override))
    words += [typed(key, value) for key, value in changes.items()]
    return f". This works: {' '.join(words)}"


def typed(key: str, value: Any) -> str:
    """Return ``key=value`` as a user can type it."""
    if isinstance(value, str):
        return as_override(key, value)
    return shlex.quote(f"{key}={json.dumps(value)}")


def way_to_measure(config: SegmentConfig, folder: Path) -> str:
    """Return how a finished run in `folder` is measured with these settings, without training.

    It is empty for a run that is not finished, or whose dataset and inference are the same.
    """
    if (read_status(folder) or {}).get("state") != "finished":
        return ""
    there = yaml.safe_load((folder / CONFIG).read_text())
    words = []
    if config.inference != there["inference"]:
        words.append(as_override("evaluation.inference", config.inference))
    if config.data.name != there["data"]["name"]:
        words.append(as_override("data", config.data.name))
    if config.data.root != there["data"]["root"]:
        words.append(as_override("data.root", str(config.data.root)))
    if not words:
        return ""
    checkpoint = as_override("checkpoint", folder / LAST_CHECKPOINT)
    return (
        ". To measure the finished run so, without training: python -m moco.evaluate "
        f"{checkpoint} evaluation=segmentation {' '.join(words)}"
    )
