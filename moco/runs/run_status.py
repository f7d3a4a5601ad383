"""What a run does or how it ended: ``status.json``, which it writes and other processes read."""

import json
import logging
import os
import socket
import subprocess
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from moco.errors import exit_code
from moco.runs.atomic_files import write_json
from moco.runs.folder_lock import is_locked
from moco.runs.slurm import job_id

log = logging.getLogger(__name__)

STATUS = Path("status.json")
LOCK = Path(".hydra", "lock")
SILENCE_MINUTES = 60
"""A run on another host counts as crashed if no file of its folder has changed for this long.

This is used only where neither the lock nor SLURM can tell.
"""


def read_status(folder: Path) -> dict[str, Any] | None:
    """Return what the run wrote last, or None if it has written nothing yet."""
    try:
        return dict(json.loads((folder / STATUS).read_text()))
    except (FileNotFoundError, ValueError):
        return None


def write_status(folder: Path, state: str, message: str = "", exit_code: int | None = None) -> None:
    """Write what the run of this process does.

    Args:
        folder: the run folder.
        state: running, finished, interrupted, requeued or failed.
        message: the line that its user saw.
        exit_code: of the process, once it is known.
    """
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    before = read_status(folder) or {}
    status = {
        "state": state,
        "message": " ".join(message.split()),
        "exit_code": exit_code,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "slurm_job_id": job_id(),
        "started": before.get("started", now),
        "changed": now,
    }
    write_json(folder / STATUS, status)


def write_ending(folder: Path, error: BaseException, state: str | None = None) -> None:
    """Write what ended the run of this process.

    Args:
        folder: the run folder.
        error: what ended the run.
        state: None means interrupted or failed, depending on the error.
    """
    code = exit_code(error)
    usual_state = "interrupted" if code > 128 else "failed"
    message = str(error) or type(error).__name__
    try:
        write_status(folder, state or usual_state, message, code)
    except OSError as failure:
        # A full disk may be what ended the run, and the user has to see that error, not this one.
        log.warning("cannot write %s: %s", folder / STATUS, failure)


def state_now(folder: Path, queue: Mapping[str, str] | None = None) -> str:
    """Return the state of a run: its own word, or crashed, queued or not started.

    Args:
        folder: the run folder.
        queue: the answer of `slurm_queue`.
    """
    status = read_status(folder)
    if status is None:
        return "not started"
    state = str(status.get("state"))
    state_in_queue = (queue or {}).get(str(status.get("slurm_job_id")))
    if state_in_queue == "PENDING" and state != "finished":
        return "queued"
    if state == "running" and not is_alive(folder, status, queue):
        return "crashed"
    return state


def is_alive(folder: Path, status: Mapping[str, Any], queue: Mapping[str, str] | None) -> bool:
    """Return whether the process that wrote "running" still runs.

    The lock of its folder shows it on this host, and on others if the file system passes locks on.
    Otherwise SLURM knows. Without SLURM, the folder's newest file decides.
    """
    has_lock = is_locked(folder / LOCK)
    if has_lock:
        return True
    is_from_here = status.get("host") == socket.gethostname()
    if has_lock is False and is_from_here:
        return False
    if queue is not None and status.get("slurm_job_id"):
        return status["slurm_job_id"] in queue
    newest = max(path.stat().st_mtime for path in folder.iterdir())
    return time.time() - newest < SILENCE_MINUTES * 60


def slurm_queue() -> dict[str, str] | None:
    """Return the state of every job in SLURM's queue by its id; None if SLURM does not answer."""
    command = ["squeue", "--noheader", "--array", "--format=%i %T"]
    try:
        answer = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    states = {}
    for line in answer.stdout.splitlines():
        job, state = line.split()
        states[job] = state
    return states
