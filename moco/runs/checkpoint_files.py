"""Write and read checkpoint files.

A checkpoint is on the disk as a whole or not at all, and reading one never runs code from it.
"""

import contextlib
import logging
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO

from moco.errors import InputError
from moco.runs.atomic_files import link_atomically, write_atomically
from moco.runs.run_folder import LAST_CHECKPOINT, PREVIOUS_CHECKPOINT

log = logging.getLogger(__name__)

# What every checkpoint holds, and the type of each part.
CHECKPOINT_PARTS: dict[str, type] = {
    "state_dict": dict,
    "hyper_parameters": dict,
    "config": dict,
    "figures": dict,
    "random_states": list,
    "global_step": int,
}

# Some projects save their settings beside their weights. Objects of these classes are read as
# plain dicts, so the classes are neither needed nor imported.
SETTINGS_AS_DICTS: list[Any] = [
    (OrderedDict, "argparse.Namespace"),
    (OrderedDict, "yacs.config.CfgNode"),
]


DISK_MARGIN = 1.05
"""A checkpoint may become so much larger than the one before."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write Lightning's checkpoints atomically; the old ``last.ckpt`` becomes ``previous.ckpt``.

    The old one is kept only if the disk has room for the next checkpoint then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_said = False

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        path = Path(path)
        previous = None
        if path.name == LAST_CHECKPOINT.name and path.is_file():
            previous = self._name_of_old(path)
        try:
            write_atomically(path, lambda file: torch.save(checkpoint, file), keep=previous)
        except RuntimeError as error:
            # On a full disk torch's zip writer raises its own complaint on top of the OSError.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise

    def _name_of_old(self, path: Path) -> Path | None:
        """Return the name under which the old file at `path` stays, or None without room for it.

        Without room, the one that was kept so far is removed before the new one is written.
        """
        previous = path.with_name(PREVIOUS_CHECKPOINT.name)
        size = path.stat().st_size
        free = shutil.disk_usage(path.parent).free
        # The old file and two new ones: this one, and the next one before it has its name.
        room = free + (previous.stat().st_size if previous.is_file() else 0)
        if room >= 2 * DISK_MARGIN * size:
            return previous
        previous.unlink(missing_ok=True)
        if not self.is_said:
            self.is_said = True
            log.warning(
                "%s is not kept: a checkpoint has %s, and the disk has only %s left",
                previous,
                in_bytes(size),
                in_bytes(free),
            )
        return None


def in_bytes(size: int) -> str:
    """Return a size as text, such as ``1.2 GB``."""
    if size < 1e6:
        return f"{size / 1e3:.0f} kB"
    if size < 1e9:
        return f"{size / 1e6:.0f} MB"
    return f"{size / 1e9:.1f} GB"


def sound_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Return the content of a run's newest readable checkpoint, or None if the run has none.

    If ``last.ckpt`` is damaged, it becomes ``last.ckpt.damaged``, and ``previous.ckpt`` takes its
    place.

    Raises:
        InputError: both are damaged; the error names other readable checkpoints of the run.
    """
    last = folder / LAST_CHECKPOINT
    previous = folder / PREVIOUS_CHECKPOINT
    damages = []
    for path in (last, previous):
        if not path.is_file():
            continue
        try:
            checkpoint = read_checkpoint(path)
        except InputError as error:
            damages.append(str(error))
            continue
        if path == previous:
            if damages:
                set_aside = last.with_name(f"{last.name}.damaged")
                os.replace(last, set_aside)
                log.warning(
                    "%s; renamed to %s, continuing from %s", damages[0], set_aside.name, previous
                )
            link_atomically(previous, last)
        return checkpoint
    if not damages:
        return None
    if len(damages) == 2:
        damages[0] += f", and so is {previous.name}"
    raise InputError(f"{damages[0]}; {way_out(folder)}")


def way_out(folder: Path) -> str:
    """Return what the user can do when a run's last two checkpoints are damaged."""
    readable = []
    for path in sorted((folder / LAST_CHECKPOINT).parent.glob("*.ckpt")):
        with contextlib.suppress(InputError):
            read_checkpoint(path)
            readable.append(path.name)
    if not readable:
        return "the run has no older one; move it away to start anew"
    return f"to continue from {' or '.join(readable)}, copy it over {LAST_CHECKPOINT.name}"


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the content of one of our checkpoints, plain data and tensors on the CPU.

    No code in the file is run. All checksums are compared, which takes half a second a gigabyte.

    Raises:
        InputError: there is no such file, it is damaged, moco.train did not write it, or loading
            it would run code.
    """
    source = f"checkpoint={path}"
    if not Path(path).is_file():
        raise InputError(f"{source}: no such file")
    checkpoint = read_torch_archive(path, source)
    if not isinstance(checkpoint, dict):
        raise InputError(f"{source}: not written by moco.train (it holds no dict)")
    missing = ", ".join(sorted(CHECKPOINT_PARTS.keys() - checkpoint.keys()))
    if missing:
        raise InputError(f"{source}: not written by moco.train (it lacks {missing})")
    check_parts(checkpoint, source, CHECKPOINT_PARTS)
    return checkpoint


def check_parts(content: dict[str, Any], source: str, parts: dict[str, type]) -> None:
    """Raise InputError if a part of one of our files has another type than it should."""
    for name, kind in parts.items():
        if not isinstance(content[name], kind):
            raise InputError(
                f"{source}: not written by moco.train (its {name} is no {kind.__name__})"
            )


def read_torch_archive(path: str | Path, source: str) -> Any:
    """Return the content of a file that torch.save wrote, which is a zip archive since torch 1.6.

    torch.save writes a checksum for each tensor, but torch.load does not compare them: a flipped
    bit in a weight would go unnoticed.

    Args:
        source: the key and the path that errors begin with.

    Raises:
        InputError: the file cannot be read, is damaged, or loading it would run code.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises many kinds of errors on damaged archives.
        raise InputError(f"{source}: damaged, or no checkpoint at all ({error})") from error
    if damaged is not None:
        raise InputError(f"{source}: damaged (the checksum of {damaged} is wrong)")
    return read_torch_file(path, source)


def read_torch_file(path: str | Path, source: str) -> Any:
    """Return the content of a file that any version of torch.save wrote, tensors on the CPU.

    Args:
        source: the key and the path that errors begin with.

    Raises:
        InputError: the file cannot be read, is damaged, or loading it would run code.
    """
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(SETTINGS_AS_DICTS):
            # torch warns of odd files before it refuses them; the error below says enough.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly any kind of error on damaged files.
        # torch names the function or class that it refuses to import.
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and refused is not None:
            raise InputError(
                f"{source}: it holds objects whose loading would run code ({refused[1]}), so it "
                "is not loaded; if you trust its source, write its tensors alone to a new file "
                "with torch.save"
            ) from error
        # Of torch's long message one line says what is wrong.
        lines = str(error).rpartition("WeightsUnpickler error:")[2].strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise InputError(f"{source}: damaged, or no checkpoint at all ({reason})") from error
