"""What has become of a run, seen from outside its process: from ``status.json`` and the lock of its folder."""

import json
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moco.runs.folder_lock import is_locked

STATUS = Path("status.json")
LOCK = Path(".hydra", "lock")
SILENCE_MINUTES = 60
"""A run on another host that has changed no file of its folder for so long is taken for dead, where SLURM cannot say."""


def read_status(folder: Path) -> dict[str, Any] | None:
    """What the run last said, or None if it has said nothing yet."""
    try:
        status = json.loads((folder / STATUS).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return status if isinstance(status, dict) else None


def state_now(folder: Path, queue: Mapping[str, str] | None = None) -> str:
    """The state of a run: what it last said, or crashed, queued or not started, which it cannot say.

    Args:
        queue: of `slurm_queue`.
    """
    status = read_status(folder)
    if status is None:
        return "not started"
    if (queue or {}).get(str(status.get("slurm_job_id"))) == "PENDING" and status.get(
        "state"
    ) != "finished":
        return "queued"
    if status.get("state") == "running":
        return "running" if is_alive(folder, status, queue) else "crashed"
    return str(status.get("state"))


def is_alive(folder: Path, status: Mapping[str, Any], queue: Mapping[str, str] | None) -> bool:
    """Whether the process that said running is still there.

    Its lock shows it on this host, and on others where the file system passes locks on. Else SLURM knows, and without
    SLURM the folder's newest file has to do.
    """
    has_lock = is_locked(folder / LOCK)
    if has_lock or (has_lock is False and status.get("host") == socket.gethostname()):
        return has_lock
    if queue is not None and status.get("slurm_job_id"):
        return status["slurm_job_id"] in queue
    newest = max(path.stat().st_mtime for path in folder.iterdir())
    return time.time() - newest < SILENCE_MINUTES * 60


def slurm_queue() -> dict[str, str] | None:
    """State of every job that SLURM knows, by its id; None where SLURM cannot be asked."""
    try:
        lines = subprocess.run(
            ["squeue", "--noheader", "--array", "--format=%i %T"],
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(line.split() for line in lines)
