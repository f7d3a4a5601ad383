"""Names of run folders and sweep folders. The same command finds the same folder again.

The name of a job holds its values of the keys that the sweep varies:
``method.temperature-0.1__seed-1``. The name of a sweep holds what all its jobs have in common, and
the keys that it varies: ``experiment-quickstart__method.temperature``. A sweep that gets more
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

# Longest name in characters. File systems allow 255 bytes, but longer names make tables unreadable.
MAX_NAME_LENGTH = 100


def register_resolvers() -> None:
    """Register ``run_name``, ``job_name`` and the other resolvers that the config files use."""
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    OmegaConf.register_new_resolver("job_name", job_name, replace=True)
    OmegaConf.register_new_resolver("slurm_tasks_per_node", slurm.tasks_per_node, replace=True)
    # A job's own overrides do not say what the sweep varies, so these two are cached: Hydra hands
    # the cache of the sweep on to its jobs.
    OmegaConf.register_new_resolver("sweep_name", sweep_name, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("swept_keys", swept_keys, use_cache=True, replace=True)


class NameJobs(Callback):
    """Hydra callback that fills the cache while the overrides are still those of the sweep."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        for key in ("hydra.sweep.dir", "hydra.sweep.subdir"):
            OmegaConf.select(config, key)


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


def file_name(parts: Iterable[str]) -> str:
    """Return the sorted parts as one name that needs no quotes in an override.

    A name that had to be shortened or changed ends with a hash of the whole text.
    """
    text = "__".join(sorted(parts))
    name = re.sub(r"[^\w.-]", "-", text, flags=re.ASCII)[:MAX_NAME_LENGTH]
    if name == text:
        return name
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
    return f"{name}__{digest[:8]}"
