"""Checkpoint files: written whole or not at all, read without running code."""

import itertools
import logging
import os
import pickletools
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO

from moco.errors import InputError
from moco.training.run_folder import LAST_CHECKPOINT, PREVIOUS_CHECKPOINT, link_atomically, write_atomically

log = logging.getLogger(__name__)

# What every checkpoint has, and of which kind it is.
PARTS = {
    "state_dict": dict, "hyper_parameters": dict, "config": dict, "figures": dict, "random_states": list,
    "global_step": int,
}  # fmt: skip
PLAIN = r"collections\.OrderedDict|torch\._utils\._rebuild_(tensor_v2|parameter)|torch\.(\w+Storage|Size|device)"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint file, but complete on disk before it takes its name; the old ``last.ckpt`` becomes previous."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        try:
            is_last = Path(path).name == LAST_CHECKPOINT.name
            previous = Path(path).with_name(PREVIOUS_CHECKPOINT.name) if is_last else None
            write_atomically(Path(path), lambda file: torch.save(checkpoint, file), keep=previous)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # a full disk, under the zip writer's complaint about it
                raise error.__context__ from error
            raise


def sound_checkpoint(folder: Path) -> dict[str, Any] | None:
    """What the newest checkpoint of a run holds that can be read, or None if it has none; that file is ``last.ckpt`` then.

    If ``last.ckpt`` is damaged it becomes ``last.ckpt.damaged`` and ``previous.ckpt`` takes its place.

    Raises:
        InputError: both are damaged; it names other checkpoints of the run that are not.
    """
    last, previous = folder / LAST_CHECKPOINT, folder / PREVIOUS_CHECKPOINT
    if not last.is_file() and not previous.is_file():
        return None
    damaged = None
    if last.is_file():
        try:
            return read_checkpoint(last)
        except InputError as error:
            damaged = error
    try:
        checkpoint = read_checkpoint(previous)
    except InputError as error:
        both = (
            f"{damaged}, and so is {PREVIOUS_CHECKPOINT.name}" if damaged and previous.is_file() else damaged or error
        )
        raise InputError(f"{both}; {way_out(folder)}") from error
    if damaged:
        set_aside = next(name for name in numbered(last.with_name(last.name + ".damaged")) if not name.exists())
        os.replace(last, set_aside)
        log.warning("%s; set aside as %s, going on from %s", damaged, set_aside.name, previous)
    link_atomically(previous, last)
    return checkpoint


def way_out(folder: Path) -> str:
    """What to do when the newest checkpoints of a run are damaged."""
    sound = [path for path in sorted((folder / LAST_CHECKPOINT).parent.glob("*.ckpt")) if is_sound(path)]
    if not sound:
        return "the run has no older one; move it away to start anew"
    return f"to go on from {' or '.join(path.name for path in sound)}, copy it over {LAST_CHECKPOINT.name}"


def is_sound(path: Path) -> bool:
    """Whether a checkpoint can be read."""
    try:
        read_checkpoint(path)
    except InputError:
        return False
    return True


def numbered(path: Path) -> Iterator[Path]:
    """The path, then with .2, .3 and so on."""
    yield path
    yield from (path.with_name(f"{path.name}.{number}") for number in itertools.count(2))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of ours on the CPU, as plain data and tensors; no code in it is run.

    Every checksum is compared, which torch writes and does not look at. A gigabyte takes half a second more.

    Raises:
        InputError: no such file, damaged, not written by a program of ours, or in need of unpickling code.
    """
    if not Path(path).is_file():
        raise InputError(f"checkpoint={path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            check_records(archive, os.path.getsize(path))
            foreign = foreign_objects(archive)
    except PermissionError as error:
        raise InputError(f"checkpoint={path}: may not be read") from error
    # What zipfile and pickletools raise on damaged files.
    except (ValueError, OSError, EOFError, RuntimeError, LookupError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"checkpoint={path}: damaged, or no checkpoint at all ({error})") from error
    if foreign:
        raise InputError(
            f"checkpoint={path}: it holds objects whose loading would run code ({', '.join(foreign)}), so it is not loaded"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a pickle that is sound and makes no sense, torch reports nearly anything
        raise InputError(f"checkpoint={path}: damaged ({error})") from error
    missing = PARTS.keys() - (checkpoint.keys() if isinstance(checkpoint, dict) else set())
    if missing:
        raise InputError(f"checkpoint={path}: not written by moco.train (it lacks {', '.join(sorted(missing))})")
    for name, kind in PARTS.items():
        if not isinstance(checkpoint[name], kind):
            raise InputError(f"checkpoint={path}: not written by moco.train (its {name} is no {kind.__name__})")
    return checkpoint


def check_records(archive: zipfile.ZipFile, size: int) -> None:
    """Hold every record to its checksum.

    Args:
        size: of the file, bytes.

    Raises:
        ValueError: one is damaged, there twice, or compressed; or together they are more than the file. torch stores each
            once and as it is; a compressed one could unpack to any size.
    """
    records = archive.infolist()
    if len({record.filename for record in records}) < len(records):
        raise ValueError("a record is there twice")
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError("a record is compressed")
    if sum(record.file_size for record in records) > size:
        raise ValueError("its records claim to be larger than the file")
    if damaged := archive.testzip():
        raise ValueError(f"the checksum of {damaged} is wrong")


def foreign_objects(archive: zipfile.ZipFile) -> list[str]:
    """The names of what the pickle in a checkpoint would import, besides what tensors and plain data need.

    torch's own list of harmless names is longer, and some of those take as much memory as the file tells them to.
    """
    (pickled,) = (name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
    imported = set()
    for opcode, argument, _ in pickletools.genops(archive.read(pickled)):
        if opcode.name in ("GLOBAL", "INST"):
            imported.add(str(argument).replace(" ", "."))
        elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):  # torch.save never writes these
            imported.add("an object whose name is hidden")
    return sorted(name for name in imported if not re.fullmatch(PLAIN, name))
