"""Compare the configs of two runs, to tell whether one can continue the other."""

import os
from collections.abc import Mapping
from typing import Any

# These settings may change when a run is resumed. They say where, how long and how loudly to
# compute, not what.
FREE_KEYS = (
    "resume",
    "resume_changed_data",
    "logger",
    "trainer.accelerator",
    "trainer.benchmark",
    "trainer.compile",
    "trainer.cuda_graphs",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.timeout_minutes",
    "trainer.log_every_n_steps",
    "trainer.max_bad_steps",
    "trainer.max_epochs",
    "trainer.max_steps",
    "trust_targets",
    "trainer.memory_format",
    "checkpoint.every_n_epochs",
    "checkpoint.every_n_minutes",
    "checkpoint.keep_every_n_epochs",
    "checkpoint_every_n_epochs",
    "data.download",
    "data.max_bad_fraction",
    "data.max_image_pixels",
    "data.num_workers",
    "evaluation.batch_size",
    "evaluation.diagnostics_every_n_steps",
    "evaluation.plots_every_n_epochs",
    "evaluation.projector_images",
    "evaluation.num_plotted_images",
    "evaluation.pictures_every_n_epochs",  # the names of two settings in an earlier version
    "evaluation.num_pictures",
    "preview.bands",
    "slurm.requeue",
    "slurm.signal",
)
PATHS = ("data.root", "data.labels", "init_from")  # earlier versions kept relative paths
FREE_GROUPS = ("monitor.", "logger_options.")  # these do not change the training


def completed(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with a default for each key that it lacks, also inside of groups.

    A run that began before a key existed has a config without it.
    """
    result = dict(defaults)
    for key, value in config.items():
        default = defaults.get(key)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            result[key] = completed(value, default)
        else:
            result[key] = value
    return result


def differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the old and the new value of each dotted key that must not differ but does."""
    old = flattened(there)
    new = flattened(here)
    found = {}
    for key in sorted(old.keys() | new.keys()):
        is_free = key in FREE_KEYS or key.startswith(FREE_GROUPS)
        is_same = old.get(key) == new.get(key)
        if key in PATHS:
            is_same = is_same or absolute(old.get(key)) == absolute(new.get(key))
        if not is_free and not is_same:
            found[key] = (old.get(key), new.get(key))
    return found


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Return ``key: old there, new here`` for each key of `differing`."""
    found = differing(there, here)
    return [f"{key}: {old} there, {new} here" for key, (old, new) in found.items()]


def absolute(path: Any) -> Any:
    """Return a path, or each path of a list, as an absolute one."""
    if isinstance(path, list):
        return [absolute(item) for item in path]
    return os.path.abspath(path) if isinstance(path, str) else path


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one dict with dotted keys.

    The order of an augmentation's operations matters, so that it is a value too.
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if not isinstance(value, Mapping):
            flat[prefix + key] = value
            continue
        if prefix == "augmentation.":
            flat[f"{prefix}{key} (order)"] = list(value)
        flat |= flattened(value, f"{prefix}{key}.")
    return flat
