"""Names of run folders and sweep folders. The same command finds the same folder again.

The name of a job holds its values of the keys that the sweep varies:
``method.temperature-0.1__seed-1``. The name of a sweep holds what all its jobs have in common, and
the keys that it varies: ``experiment-quickstart__method.temperature``. A sweep that gets more
values keeps the folders that it has.
"""

import hashlib
import itertools
import os
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from moco.errors import InputError
from moco.runs import slurm
from moco.runs.config_changes import FREE_KEYS
from moco.runs.run_folder import LAST_CHECKPOINT

# Longest name in characters. File systems allow 255 bytes, but longer names make tables unreadable.
MAX_NAME_LENGTH = 100
CUSTOM = "custom"
"""In the place of the experiment's name, for a run without one: see ``conf/train.yaml``."""


def register_resolvers() -> None:
    """Register ``run_name``, ``job_name`` and the other resolvers that the config files use."""
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    OmegaConf.register_new_resolver("job_name", job_name, replace=True)
    OmegaConf.register_new_resolver("checkpoint_name", checkpoint_name, replace=True)
    OmegaConf.register_new_resolver("slurm_tasks_per_node", slurm.tasks_per_node, replace=True)
    # A job's own overrides do not say what the sweep varies, so these two are cached: Hydra hands
    # the cache of the sweep on to its jobs.
    OmegaConf.register_new_resolver("sweep_name", sweep_name, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("swept_keys", swept_keys, use_cache=True, replace=True)


class NameJobs(Callback):
    """Hydra callback that names the folders of a run or of a sweep before Hydra makes them."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Take a folder that no other run has, also for two runs that start in one second."""
        if is_named_by_time(config):
            folder = new_folder(Path(config.hydra.run.dir))
            with read_write(config), open_dict(config):
                config.hydra.run.dir = str(folder)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Fill the cache while the overrides are still those of the sweep."""
        for key in ("hydra.sweep.dir", "hydra.sweep.subdir"):
            OmegaConf.select(config, key)


def is_named_by_time(config: DictConfig) -> bool:
    """Return whether the run folder has the time of the start in its name, for one process."""
    as_written = OmegaConf.to_container(config.hydra.run, resolve=False)
    assert isinstance(as_written, dict)
    is_alone = slurm.run_name() is None and "WORLD_SIZE" not in os.environ
    return is_alone and "${now:" in as_written["dir"]


def numbered(folder: Path) -> Iterator[Path]:
    """Yield a folder, and then the same name with ``_2``, ``_3`` and so on."""
    yield folder
    for number in itertools.count(2):
        yield folder.with_name(f"{folder.name}_{number}")


def new_folder(wanted: Path) -> Path:
    """Make a folder that did not exist, and return it: `wanted`, or the same name with a number.

    What forbids to make it is reported by Hydra, which tries again.
    """
    for folder in numbered(wanted):
        if folder.exists():
            continue
        try:
            folder.mkdir(parents=True)
        except OSError:
            if folder.is_dir():  # another run was faster
                continue
            return wanted
        return folder
    raise AssertionError("numbers do not end")


def takes_name_of_preset(folder: Path) -> bool:
    """Return whether a new run's folder can move from ``runs/custom`` to the name of its preset.

    A folder that the user names stays where it is. So does one that other processes, or the same
    job when it is queued again, must find: they do not wait for the images to be listed.
    """
    running = HydraConfig.get()
    is_named_by_user = any(
        key_of(item) == "hydra.run.dir" for item in parsed(running.overrides.hydra)
    )
    is_alone = slurm.run_name() is None and "WORLD_SIZE" not in os.environ
    is_run = running.mode != RunMode.MULTIRUN
    return is_run and is_alone and not is_named_by_user and folder.parent.name == CUSTOM


def renamed_by_preset(folder: Path, preset: str) -> Path:
    """Move ``runs/custom/TIME`` to ``runs/PRESET/TIME``, and return its new place.

    Args:
        folder: of a run that has not begun.
        preset: name of the experiment.
    """
    wanted = folder.parent.parent / preset / folder.name
    new = new_folder(wanted)
    try:
        folder.rename(new)  # onto the empty folder, which no other run takes
    except OSError:
        return folder
    with suppress(OSError):  # other runs are in there
        folder.parent.rmdir()
    running: Any = HydraConfig.get()
    with read_write(running), open_dict(running):
        running.run.dir = os.path.relpath(new)
        running.runtime.output_dir = str(new)
    return new


def run_name(otherwise: str) -> str:
    """Return the last part of a run folder: the SLURM job, or `otherwise`, the time of the start.

    Raises:
        InputError: torchrun started this process, so that its peers may read another time.
    """
    name = slurm.run_name()
    if name is not None:
        return name
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if num_processes > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        raise InputError(
            "under torchrun all processes need the same run folder: give hydra.run.dir=PATH"
        )
    return otherwise


def checkpoint_name(checkpoint: str | None, backbone: str | None) -> str:
    """Return a name for the evaluations of a checkpoint, such as ``quickstart_TIME_last``.

    Args:
        checkpoint: its path; None: the backbone has random weights.
        backbone: its name.
    """
    if checkpoint is None:
        return file_name([f"untrained_{backbone}"])
    path = Path(str(checkpoint))
    if path.is_dir():  # a run folder stands for its last checkpoint
        path = path / LAST_CHECKPOINT
    parts = [path.stem]
    folder = path.parent
    if folder.name == LAST_CHECKPOINT.parent.name:
        folder = folder.parent
        parts = [folder.parent.name, folder.name, path.stem]
    return file_name(["_".join(part for part in parts if part)])


def swept_keys(overrides: Iterable[str]) -> list[str]:
    """Return the keys that a sweep varies, from its overrides as they were typed."""
    return [key_of(item) for item in parsed(overrides) if item.is_sweep_override()]


def sweep_name(overrides: Iterable[str]) -> str:
    """Return the name of the sweep with these overrides."""
    swept = swept_keys(overrides)
    parts = list(swept)
    for item in parsed(overrides):
        if key_of(item) not in swept and key_of(item) not in FREE_KEYS:
            parts.append(as_part(item))
    return file_name(parts) or "defaults"


def job_name(overrides: Iterable[str], swept: Collection[str]) -> str:
    """Return the name of the job with these overrides, in a sweep that varies the keys `swept`."""
    parts = []
    for item in parsed(overrides):
        # While Hydra plans the jobs, the overrides still hold all values of the sweep.
        if key_of(item) in swept and not item.is_sweep_override():
            parts.append(as_part(item))
    return file_name(parts) or "job"


def parsed(overrides: Iterable[str]) -> list[Override]:
    """Return Hydra's objects for overrides as they were typed."""
    return OverridesParser.create().parse_overrides(list(overrides))


def key_of(override: Override) -> str:
    """Return the key of an override, without the marks for adding and removing."""
    return override.get_key_element().lstrip("+~")


def as_part(override: Override) -> str:
    """Return an override as a part of a name."""
    return f"{key_of(override)}-{override.get_value_element_as_str()}"


def without_folders(part: str) -> str:
    """Return a part of a name, ``KEY-VALUE``, without the folders before the last part of a path.

    The value may be a list of paths.
    """
    key, dash, value = part.partition("-")
    value = re.sub(r"[^,\[\]]*/(?=[^,\[\]/])", "", value)
    return key + dash + value


def file_name(parts: Iterable[str]) -> str:
    """Return the sorted parts as one name that needs no quotes in an override.

    Of a path in it the last part stays. A name that had to be shortened or changed ends with a hash
    of the whole text.
    """
    parts = sorted(parts)
    text = "__".join(parts)
    short = "__".join(map(without_folders, parts))
    name = re.sub(r"[^\w.-]", "-", short, flags=re.ASCII)[:MAX_NAME_LENGTH]
    if name == text:
        return name
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
    return f"{name}__{digest[:8]}"
