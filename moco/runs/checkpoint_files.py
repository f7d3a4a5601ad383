"""Write and read checkpoint files.

A checkpoint is on the disk as a whole or not at all, and reading one never runs code from it.
"""

import itertools
import logging
import os
import pickle
import re
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


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write Lightning's checkpoints atomically; the old ``last.ckpt`` becomes ``previous.ckpt``.

    Attributes:
        read: contents of files that this process has read already. Each is handed out once, in
            place of reading the file again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[Path, dict[str, Any]] = {}

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(path) in self.read:
            return self.read.pop(Path(path))
        return super().load_checkpoint(path, *args, **kwargs)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        path = Path(path)
        previous = None
        if path.name == LAST_CHECKPOINT.name:
            previous = path.with_name(PREVIOUS_CHECKPOINT.name)
        try:
            write_atomically(path, lambda file: torch.save(checkpoint, file), keep=previous)
        except RuntimeError as error:
            # On a full disk torch's zip writer raises its own complaint on top of the OSError.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def sound_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Return the content of a run's newest readable checkpoint, or None if the run has none.

    If ``last.ckpt`` is damaged, it becomes ``last.ckpt.damaged``, and ``previous.ckpt`` takes its
    place.

    Raises:
        InputError: both are damaged; the error names other readable checkpoints of the run.
    """
    last = folder / LAST_CHECKPOINT
    previous = folder / PREVIOUS_CHECKPOINT
    if not last.is_file() and not previous.is_file():
        return None

    damage = None
    if last.is_file():
        try:
            return read_checkpoint(last)
        except InputError as error:
            damage = str(error)

    try:
        checkpoint = read_checkpoint(previous)
    except InputError as error:
        if damage is None:
            damage = str(error)
        elif previous.is_file():
            damage += f", and so is {previous.name}"
        raise InputError(f"{damage}; {way_out(folder)}") from error

    if damage is not None:
        set_aside = free_name(last.with_name(last.name + ".damaged"))
        os.replace(last, set_aside)
        log.warning("%s; renamed to %s, continuing from %s", damage, set_aside.name, previous)
    link_atomically(previous, last)
    return checkpoint


def way_out(folder: Path) -> str:
    """Return what the user can do when a run's last two checkpoints are damaged."""
    readable = []
    for path in sorted((folder / LAST_CHECKPOINT).parent.glob("*.ckpt")):
        try:
            read_checkpoint(path)
        except InputError:
            continue
        readable.append(path.name)
    if not readable:
        return "the run has no older one; move it away to start anew"
    return f"to continue from {' or '.join(readable)}, copy it over {LAST_CHECKPOINT.name}"


def free_name(path: Path) -> Path:
    """Return the path if nothing is there, else the first of PATH.2, PATH.3 and so on."""
    if not path.exists():
        return path
    for number in itertools.count(2):
        numbered = path.with_name(f"{path.name}.{number}")
        if not numbered.exists():
            break
    return numbered


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
    missing = CHECKPOINT_PARTS.keys() - checkpoint.keys()
    if missing:
        lacking = ", ".join(sorted(missing))
        raise InputError(f"{source}: not written by moco.train (it lacks {lacking})")
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
    except PermissionError as error:
        raise InputError(f"{source}: no permission to read it") from error
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
    except PermissionError as error:
        raise InputError(f"{source}: no permission to read it") from error
    except pickle.UnpicklingError as error:
        # torch names the function or class that it refuses to import.
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is not None:
            raise InputError(
                f"{source}: it holds objects whose loading would run code ({refused[1]}), so it "
                "is not loaded; if you trust its source, write its tensors alone to a new file "
                "with torch.save"
            ) from error
        reason = reason_of(error)
        raise InputError(f"{source}: damaged, or no checkpoint at all ({reason})") from error
    except Exception as error:  # torch raises nearly any kind of error on damaged files.
        reason = reason_of(error)
        raise InputError(f"{source}: damaged, or no checkpoint at all ({reason})") from error


def reason_of(error: Exception) -> str:
    """Return the one line of torch's long message that says what is wrong with a file."""
    message = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    if not message:
        return type(error).__name__
    return message.splitlines()[0]
