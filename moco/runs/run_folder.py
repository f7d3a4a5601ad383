"""The run folder: the names of its files, what a run finds there, and how it takes the folder."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from moco.errors import InputError, Interrupted, PeerLost
from moco.runs.atomic_files import remove_half_written, write_atomically
from moco.runs.config_changes import completed, differences
from moco.runs.folder_lock import locked
from moco.runs.log_file import open_log_files, write_to_log_files
from moco.runs.run_status import LOCK, read_status, write_ending, write_status
from moco.runs.shell_quotes import shell_quoted

LAST_CHECKPOINT = Path("checkpoints", "last.ckpt")
PREVIOUS_CHECKPOINT = Path("checkpoints", "previous.ckpt")
BEST_CHECKPOINT = Path("checkpoints", "best.ckpt")
BACKBONE_FILE = Path("checkpoints", "backbone.pth")
CONFIG = Path(".hydra", "config.yaml")
METRICS = Path("metrics.json")


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write the config, as plain data, where Hydra would write it."""
    text = yaml.safe_dump(dict(config), sort_keys=False)
    write_atomically(folder / CONFIG, lambda file: file.write(text.encode()))


def changes_in(folder: Path, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Return the settings in which `config` differs from the folder's own."""
    saved = yaml.safe_load((folder / CONFIG).read_text()) or {}
    return differences(completed(saved, defaults), config)


def has_checkpoint(folder: Path) -> bool:
    """Return whether `folder` holds a checkpoint that a run can continue from."""
    return (folder / LAST_CHECKPOINT).is_file() or (folder / PREVIOUS_CHECKPOINT).is_file()


def find_checkpoint(
    folder: Path, config: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Path | None:
    """Return the checkpoint from which a run in `folder` continues, or None for a new run.

    It changes nothing.

    Args:
        folder: the run folder, which need not exist.
        config: the run's config as plain data. Its ``resume`` is ``auto``, a checkpoint's path, or
            None to start anew.
        defaults: the schema's defaults as plain data, for keys that the folder's config lacks.

    Raises:
        InputError: the folder holds a run with another config, or one that would be lost.
    """
    holds_results = has_checkpoint(folder) or (folder / METRICS).is_file()
    if holds_results and (folder / CONFIG).is_file():
        changes = changes_in(folder, config, defaults)
        if changes:
            raise InputError(
                f"{folder} holds a run with another configuration: {'; '.join(changes)}. "
                "Give its settings to go on with it. "
                "Choose another folder with hydra.run.dir=PATH for a new run"
            )
    resume = config["resume"]
    # The results in the folder of a requeued job are its own.
    is_requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
    if resume is None and holds_results and not is_requeued:
        raise InputError(
            f"{folder} holds a run and resume=null would overwrite it; "
            "choose another hydra.run.dir=PATH"
        )
    if has_checkpoint(folder):
        # This run's own checkpoint is newer than the one that `resume` may name.
        return folder / LAST_CHECKPOINT
    return None if resume in (None, "auto") else Path(resume)


def is_finished(folder: Path, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
    """Return whether a run of this config has reached its end in `folder`.

    The answer is False if the config asks for more epochs or steps than the run had.

    Args:
        folder: the run folder.
        config: the run's config as plain data.
        defaults: as in `find_checkpoint`.
    """
    status = read_status(folder) or {}
    if config["resume"] is None or status.get("state") != "finished":
        return False
    if not (folder / METRICS).is_file():
        return False  # no training
    figures = json.loads((folder / METRICS).read_text())
    trainer = config["trainer"]
    has_all_epochs = figures.get("epoch", 0) >= trainer["max_epochs"]
    has_all_steps = 0 < trainer["max_steps"] <= figures.get("step", 0)
    return (has_all_epochs or has_all_steps) and not changes_in(folder, config, defaults)


@contextmanager
def claimed(
    folder: Path,
    config: Mapping[str, Any],
    files: Mapping[str, str] = MappingProxyType({}),
    check: Callable[[], object] = lambda: None,
) -> Iterator[None]:
    """Hold `folder` for this process alone inside the ``with`` block.

    It writes the run's config, and keeps ``status.json``: running, and at the end how the run
    ended.

    Args:
        folder: the run folder.
        config: the run's config as plain data.
        files: further texts for the folder's ``.hydra``, by name.
        check: called before anything is written, while no other process can write. What it raises
            leaves the folder as it was.

    Raises:
        InputError: another process holds the folder.
    """
    (folder / LOCK).parent.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK, str(folder), "; choose another hydra.run.dir=PATH"):
        for place in (folder, folder / LAST_CHECKPOINT.parent, folder / LOCK.parent):
            remove_half_written(place)
        check()
        write_config(folder, config)
        for name, text in files.items():
            (folder / CONFIG).with_name(name).write_text(text, encoding="utf-8")
        open_log_files(folder)
        write_status(folder, "running")
        try:
            yield
        except PeerLost:
            raise  # the process that watches all others knows the reason, and writes it
        except BaseException as error:
            how = "interrupted" if isinstance(error, Interrupted) else "ended"
            write_to_log_files(f"{how}: {str(error) or type(error).__name__}")
            write_ending(folder, error)
            raise
        write_to_log_files("finished")
        write_status(folder, "finished", exit_code=0)


def last_good(folder: Path) -> str:
    """Return a phrase that names the run's newest checkpoint, for the end of an error message."""
    path = folder / LAST_CHECKPOINT
    try:
        exists = path.is_file()
    except OSError:  # such as a network file system that is gone
        return f"its checkpoints are in {path.parent}, which cannot be read now"
    if exists:
        return f"the last good checkpoint is {path}"
    return "there is no checkpoint yet"


def as_override(key: str, value: str | Path) -> str:
    """Return ``key=value`` as a user can type it: quoted for Hydra and for the shell if needed."""
    text = str(value)
    if re.fullmatch(r"[A-Za-z0-9_./:-]+", text) and is_read_as_text(text):
        return f"{key}={text}"
    # In Hydra's quotes a backslash is doubled only where it stands before a quote or at the end.
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', text)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    # OmegaConf would replace ${NAME}.
    escaped = re.sub(r"(\\*)\$\{", r"\1\1\\${", escaped)
    return shell_quoted(f'{key}="{escaped}"')


def is_read_as_text(value: str) -> bool:
    """Return whether Hydra reads an unquoted value as text, not as a number, bool or null."""
    if value.lower() in ("null", "true", "false"):
        return False
    try:
        float(value)
    except ValueError:
        return True
    return False
