"""What a run leaves on disk, and how it comes back to it. Files are whole or absent: never half-written."""

import json
import logging
import math
import os
import re
import shlex
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from moco.errors import InputError, Interrupted, PeerLost
from moco.runs.folder_lock import locked
from moco.runs.run_status import LOCK, STATUS, read_status
from moco.runs.slurm import job_id

log = logging.getLogger(__name__)

LAST_CHECKPOINT = Path("checkpoints", "last.ckpt")
PREVIOUS_CHECKPOINT = Path("checkpoints", "previous.ckpt")
BEST_CHECKPOINT = Path("checkpoints", "best.ckpt")
BACKBONE_FILE = Path("checkpoints", "backbone.pth")
CONFIG = Path(".hydra", "config.yaml")

# These may differ between a run and its continuation: they say where, how long and how loudly to compute, not what.
FREE_KEYS = (
    "resume",
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
    "slurm.requeue",
    "slurm.signal",
)
FREE_GROUPS = ("monitor.",)  # measurements that leave no trace in the training


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], keep: Path | None = None
) -> None:
    """Call `write` with a temporary file beside `path`, then put it in place.

    The content is on disk before the name points to it, so after a crash `path` is the old file or the new one.

    Args:
        keep: what `path` was before goes on under this name; what `keep` was goes only then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            link_atomically(path, keep)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def link_atomically(source: Path, target: Path) -> None:
    """Make `target` another name of the file `source`; later replacements of `source` leave it as it is."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        write_atomically(target, lambda file: file.write(source.read_bytes()))
        return
    os.replace(temporary, target)


def write_json(path: Path, figures: Mapping[str, Any]) -> None:
    """One flat JSON object; a figure that is not finite, for which JSON has no word, becomes null."""
    written = {
        name: None if isinstance(figure, float) and not math.isfinite(figure) else figure
        for name, figure in figures.items()
    }
    text = json.dumps(written, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """The config as plain data, where Hydra would put it."""
    text = yaml.safe_dump(dict(config), sort_keys=False)
    write_atomically(folder / CONFIG, lambda file: file.write(text.encode()))


def has_checkpoint(folder: Path) -> bool:
    """Whether a run in `folder` has one to go on from."""
    return any((folder / name).is_file() for name in (LAST_CHECKPOINT, PREVIOUS_CHECKPOINT))


def find_checkpoint(
    folder: Path, config: Mapping[str, Any], resume: str | None, defaults: Mapping[str, Any]
) -> Path | None:
    """The checkpoint that a run in `folder` goes on from, or None to start; changes nothing.

    Args:
        folder: the run folder, which need not exist.
        config: the run's config as plain data.
        resume: ``auto``, a checkpoint's path, or None to start anew.
        defaults: of the schema, as plain data, for keys that did not exist yet when the folder's run began.

    Raises:
        InputError: the folder holds a run with another configuration (it names the keys), or one that would be lost.
    """
    saved, last = folder / CONFIG, folder / LAST_CHECKPOINT
    holds_results = has_checkpoint(folder) or (folder / "metrics.json").is_file()
    if holds_results and saved.is_file():
        differing = differences(
            completed(yaml.safe_load(saved.read_text()) or {}, defaults), config
        )
        if differing:
            raise InputError(
                f"{folder} holds a run with another configuration: {'; '.join(differing)}. "
                "Choose another folder with hydra.run.dir=PATH"
            )
    is_requeued = (
        int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
    )  # then the results are this job's own
    if resume is None and holds_results and not is_requeued:
        raise InputError(
            f"{folder} holds a run and resume=null would overwrite it; choose another hydra.run.dir=PATH"
        )
    if has_checkpoint(folder):
        return last  # also with an explicit resume: this run has its own checkpoint by now
    return None if resume in (None, "auto") else Path(str(resume))


def is_finished(folder: Path, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
    """Whether a run of this config has reached its end in `folder`; not if it is to be longer now.

    Args:
        config: as plain data.
        defaults: as of `find_checkpoint`.
    """
    status, metrics = read_status(folder), folder / "metrics.json"
    if (
        config["resume"] is None
        or not status
        or status["state"] != "finished"
        or not metrics.is_file()
    ):
        return False
    figures, trainer = json.loads(metrics.read_text()), config["trainer"]
    reached = figures.get("epoch", 0) >= trainer["max_epochs"] or 0 < trainer[
        "max_steps"
    ] <= figures.get("step", 0)
    return reached and not differences(
        completed(yaml.safe_load((folder / CONFIG).read_text()), defaults), config
    )


@contextmanager
def claimed(folder: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """Inside, `folder` is this process's alone; its config file says what the run is, its status how it goes and ended.

    Raises:
        InputError: another process is at work there.
    """
    (folder / LOCK).parent.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK, str(folder), "; choose another hydra.run.dir=PATH"):
        remove_half_written(folder)
        write_config(folder, config)
        write_status(folder, "running")
        try:
            yield
        except PeerLost:
            raise  # whoever watches the processes knows why
        except BaseException as error:
            write_ending(folder, error)
            raise
        write_status(folder, "finished", exit_code=0)


def remove_half_written(folder: Path) -> None:
    """Remove what `write_atomically` left where its process was killed in the middle; `folder` has to be ours alone."""
    for place in (folder, folder / LAST_CHECKPOINT.parent, folder / LOCK.parent):
        for temporary in place.glob(".*.tmp"):
            temporary.unlink()


def write_status(folder: Path, state: str, message: str = "", exit_code: int | None = None) -> None:
    """Say what the run of this process is doing.

    Args:
        state: running, finished, interrupted, requeued or failed.
        message: the line that its user saw.
    """
    before = read_status(folder)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    status = {
        "state": state,
        "message": " ".join(message.split()),
        "exit_code": exit_code,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "slurm_job_id": job_id(),
        "started": before.get("started", now) if before else now,
        "changed": now,
    }
    write_json(folder / STATUS, status)


def write_ending(folder: Path, error: BaseException, state: str | None = None) -> None:
    """Say what ended the run of this process; `state` if it is another than interrupted or failed."""
    if isinstance(error, (Interrupted, KeyboardInterrupt)):
        number = error.signal_number if isinstance(error, Interrupted) else signal.SIGINT
        usual, code = "interrupted", 128 + number
    else:
        usual, code = "failed", 2 if isinstance(error, InputError) else 1
    try:
        write_status(folder, state or usual, str(error) or type(error).__name__, code)
    except (
        OSError
    ) as failure:  # a full disk may be what ended the run; that is what its user has to hear
        log.warning("cannot write %s: %s", folder / STATUS, failure)


def last_good(folder: Path) -> str:
    """A phrase that names a run's newest checkpoint."""
    path = folder / LAST_CHECKPOINT
    try:
        return (
            f"the last good checkpoint is {path}"
            if path.is_file()
            else "there is no checkpoint yet"
        )
    except OSError:  # such as a network file system that is gone
        return f"its checkpoints are in {path.parent}, which cannot be read now"


def as_override(key: str, value: str | Path) -> str:
    """``key=value`` as one can type it in a shell: quoted for Hydra and for the shell where needed."""
    if re.fullmatch(r"[A-Za-z0-9_./-]+", str(value)):
        return f"{key}={value}"
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return shlex.quote(f'{key}="{escaped}"')


def completed(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a run from before some keys existed: what it lacks it has from the defaults, in groups too."""
    given = {
        key: completed(value, defaults[key])
        if isinstance(value, Mapping) and isinstance(defaults.get(key), Mapping)
        else value
        for key, value in config.items()
    }
    return {**defaults, **given}


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """``key: old there, new here`` for every dotted key whose value differs, `FREE_KEYS` and `FREE_GROUPS` left out."""
    old, new = flattened(there), flattened(here)
    return [
        f"{key}: {old.get(key)} there, {new.get(key)} here"
        for key in sorted(old.keys() | new.keys())
        if key not in FREE_KEYS and not key.startswith(FREE_GROUPS) and old.get(key) != new.get(key)
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
