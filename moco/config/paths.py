"""Settings that name a file or a folder: ``~``, relative paths and run folders are resolved."""

import copy
import os
from typing import Any

from moco.errors import InputError

WEIGHTS = ("checkpoint", "init_from", "resume")
"""Files of weights. A run folder stands for its last checkpoint."""
SOURCES = ("data.root", "data.labels", "monitor.dense.root", "init_from")
"""What a run reads. Its config keeps their absolute paths."""
CHECKPOINTS = ("checkpoints/last.ckpt", "last.ckpt", "checkpoints/previous.ckpt")
"""What a folder stands for: the first of these that exists."""


def resolve_paths(config: Any) -> None:
    """Replace ``~`` by the home folder, and a run folder of `WEIGHTS` by its last checkpoint.

    Args:
        config: an instance of a schema. It is changed.

    Raises:
        InputError: a folder of `WEIGHTS` has no checkpoint.
    """
    for key in (*WEIGHTS, *SOURCES, "output"):
        section = config
        *groups, name = key.split(".")
        for group in groups:
            section = getattr(section, group, None)
        value = getattr(section, name, None)
        if isinstance(value, str):
            setattr(section, name, resolved(key, value))
        elif isinstance(value, list):
            setattr(section, name, list(map(at_home, value)))


def resolved(key: str, value: str) -> str:
    """Return the path that a setting stands for; see `resolve_paths`."""
    path = at_home(value)
    if key in WEIGHTS and value != "auto" and os.path.isdir(path):
        return last_checkpoint(key, path)
    return path


def at_home(value: Any) -> Any:
    """Return a path without ``~``; anything else as it is."""
    return os.path.expanduser(value) if isinstance(value, str) else value


def last_checkpoint(key: str, folder: str) -> str:
    """Return the last checkpoint of a run folder.

    Raises:
        InputError: there is none.
    """
    for name in CHECKPOINTS:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return path
    message = (
        f"{key}={folder}: a folder without {CHECKPOINTS[0]}; expected a file of weights or the "
        "folder of a run"
    )
    runs = runs_in(folder)
    if runs:
        message += f", such as {runs[-1]}"
    raise InputError(message)


def runs_in(folder: str) -> list[str]:
    """Return the folders in a folder that hold a run with a checkpoint, in alphabetical order."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    paths = [os.path.join(folder, name) for name in names]
    return [path for path in paths if os.path.isfile(os.path.join(path, CHECKPOINTS[0]))]


def with_absolute_paths(plain: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a run's config in which the paths of `SOURCES` are absolute.

    A later command, such as an evaluation of the run's checkpoint, then finds them from any working
    directory.

    Args:
        plain: the config as plain data.
    """
    result = copy.deepcopy(plain)
    for key in SOURCES:
        section: Any = result
        *groups, name = key.split(".")
        for group in groups:
            section = section.get(group, {})
        value = section.get(name)
        if isinstance(value, list):
            section[name] = list(map(absolute, value))
        elif value is not None:
            section[name] = absolute(value)
    return result


def absolute(value: Any) -> Any:
    """Return the absolute path of a file or folder that exists, and anything else as it is.

    Of a pattern, such as one of shards, the folder has to exist.
    """
    if not isinstance(value, str) or value.startswith("pipe:"):
        return value
    needed = value
    if any(char in value for char in "*?[{"):
        needed = os.path.dirname(value) or "."
    return os.path.abspath(value) if os.path.exists(needed) else value
