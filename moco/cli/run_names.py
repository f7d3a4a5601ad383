"""Names of run and sweep folders, such that the same command, started again, finds the same folder.

A job is named by its values of what the sweep varies, ``method.temperature-0.1__seed-1``; a sweep by what all its jobs have
in common and the keys that it varies, ``experiment-quickstart__method.temperature``. So a sweep that is extended by more
values keeps the folders that it has.
"""

import hashlib
import os
import re
from collections.abc import Collection, Iterable
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from moco.errors import InputError
from moco.runs import slurm
from moco.runs.config_changes import FREE_KEYS

LONGEST = 100  # characters of a name: file systems end at 255 bytes, tables earlier


def register_resolvers() -> None:
    """Make ``run_name``, ``job_name`` and the others known to the config files."""
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    OmegaConf.register_new_resolver("job_name", job_name, replace=True)
    OmegaConf.register_new_resolver("slurm_tasks_per_node", slurm.tasks_per_node, replace=True)
    # Cached, since a job's own overrides no longer say what was varied: Hydra hands the sweep's cache on to its jobs.
    OmegaConf.register_new_resolver("sweep_name", sweep_name, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("swept_keys", swept_keys, use_cache=True, replace=True)


class NameJobs(Callback):
    """Has the cached names made while the overrides are still the whole sweep's."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        for key in ("hydra.sweep.dir", "hydra.sweep.subdir"):
            OmegaConf.select(config, key)


def run_name(otherwise: str) -> str:
    """The last part of a run folder: SLURM's job, or else the time that the run was started.

    Raises:
        InputError: torchrun has started this process, and the others may read another time.
    """
    name = slurm.run_name()
    if (
        name is None
        and int(os.environ.get("WORLD_SIZE", "1")) > 1
        and "TORCHELASTIC_RUN_ID" in os.environ
    ):
        raise InputError(
            "under torchrun the run folder has to be named, the same for all processes: hydra.run.dir=PATH"
        )
    return name or otherwise


def swept_keys(overrides: Iterable[str]) -> list[str]:
    """The keys that a sweep with these overrides, as they were typed, has several values of."""
    return [key_of(item) for item in parsed(overrides) if item.is_sweep_override()]


def sweep_name(overrides: Iterable[str]) -> str:
    """A name of the sweep with these overrides."""
    swept = swept_keys(overrides)
    fixed = [item for item in parsed(overrides) if key_of(item) not in (*FREE_KEYS, *swept)]
    return file_name([*map(as_part, fixed), *swept]) or "defaults"


def job_name(overrides: Iterable[str], swept: Collection[str]) -> str:
    """A name of the job with these overrides, in a sweep that varies the keys `swept`."""
    given = [
        item for item in parsed(overrides) if not item.is_sweep_override()
    ]  # there are some while Hydra plans the jobs
    return file_name(as_part(item) for item in given if key_of(item) in swept) or "job"


def parsed(overrides: Iterable[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(overrides))


def key_of(override: Override) -> str:
    return override.get_key_element().lstrip("+~")


def as_part(override: Override) -> str:
    return f"{key_of(override)}-{override.get_value_element_as_str()}"


def file_name(parts: Iterable[str]) -> str:
    """The parts in order as one name that needs no quotes in an override; a hash ends one that is not the whole text."""
    text = "__".join(sorted(parts))
    name = re.sub(r"[^\w.-]", "-", text, flags=re.ASCII)[:LONGEST]
    return name if name == text else f"{name}__{hashlib.sha256(text.encode()).hexdigest()[:8]}"
