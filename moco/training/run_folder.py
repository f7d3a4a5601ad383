"""What a run leaves on disk, and how it comes back to it. Files are whole or absent: never half-written."""

import fcntl
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from moco.errors import InputError

LAST_CHECKPOINT = Path("checkpoints", "last.ckpt")
BEST_CHECKPOINT = Path("checkpoints", "best.ckpt")
CONFIG = Path(".hydra", "config.yaml")

# These may differ between a run and its continuation: they say where, how long and how loudly to compute, not what.
FREE_KEYS = (
    "resume",
    "trainer.accelerator",
    "trainer.benchmark",
    "trainer.log_every_n_steps",
    "trainer.max_epochs",
    "trainer.max_steps",
    "checkpoint.every_n_epochs",
    "checkpoint_every_n_epochs",
    "data.download",
    "data.max_bad_fraction",
    "data.num_workers",
    "evaluation.batch_size",
    "evaluation.num_pictures",
)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write` with a temporary file beside `path`, then put it in place.

    The content is on disk before the name points to it, so after a crash `path` is the old file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def write_json(path: Path, figures: Mapping[str, Any]) -> None:
    """One flat JSON object."""
    write_atomically(path, lambda file: file.write((json.dumps(dict(figures), indent=2) + "\n").encode()))


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """The config as plain data, where Hydra would put it."""
    text = yaml.safe_dump(dict(config), sort_keys=False)
    write_atomically(folder / CONFIG, lambda file: file.write(text.encode()))


def find_checkpoint(folder: Path, config: Mapping[str, Any], resume: str | None) -> Path | None:
    """The checkpoint that a run in `folder` goes on from, or None to start; changes nothing.

    Args:
        folder: the run folder, which need not exist.
        config: the run's config as plain data.
        resume: ``auto``, a checkpoint's path, or None to start anew.

    Raises:
        InputError: the folder holds a run with another configuration (it names the keys), or one that would be lost.
    """
    saved, last = folder / CONFIG, folder / LAST_CHECKPOINT
    holds_results = last.is_file() or (folder / "metrics.json").is_file()
    if holds_results and saved.is_file():
        differing = differences(yaml.safe_load(saved.read_text()) or {}, config)
        if differing:
            raise InputError(
                f"{folder} holds a run with another configuration: {'; '.join(differing)}. "
                "Choose another folder with hydra.run.dir=PATH"
            )
    if resume is None and holds_results:
        raise InputError(f"{folder} holds a run and resume=null would overwrite it; choose another hydra.run.dir=PATH")
    if last.is_file():
        return last  # also with an explicit resume: this run has its own checkpoint by now
    return None if resume in (None, "auto") else Path(str(resume))


@contextmanager
def claimed(folder: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """Inside, `folder` is this process's alone; its ``.hydra/config.yaml`` says what the run is.

    Raises:
        InputError: another process is at work there.
    """
    (folder / CONFIG).parent.mkdir(parents=True, exist_ok=True)
    with (folder / ".hydra" / "lock").open("w") as lock:  # left behind: the lock is the kernel's, not the file
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{folder}: another process is at work there; choose another hydra.run.dir=PATH"
            ) from error
        except OSError:  # a file system without locks
            pass
        write_config(folder, config)
        yield


def last_good(folder: Path) -> str:
    """A phrase that names a run's newest checkpoint."""
    path = folder / LAST_CHECKPOINT
    return f"the last good checkpoint is {path}" if path.is_file() else "there is no checkpoint yet"


def as_override(key: str, value: str | Path) -> str:
    """``key=value`` as one can type it in a shell: quoted for Hydra and for the shell where needed."""
    if re.fullmatch(r"[A-Za-z0-9_./-]+", str(value)):
        return f"{key}={value}"
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return shlex.quote(f'{key}="{escaped}"')


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """``key: old there, new here`` for every dotted key whose value differs, `FREE_KEYS` left out."""
    old, new = flattened(there), flattened(here)
    return [
        f"{key}: {old.get(key)} there, {new.get(key)} here"
        for key in sorted(old.keys() | new.keys())
        if key not in FREE_KEYS and old.get(key) != new.get(key)
    ]


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys; the order of keys inside an augmentation counts as a value."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            if prefix in ("augmentation.",):
                flat[f"{prefix}{key} (order)"] = list(value)
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
