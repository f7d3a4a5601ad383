"""Checkpoint files and other files of weights: written whole or not at all, read without running code."""

import itertools
import json
import logging
import mmap
import os
import pickletools
import re
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO

from moco.errors import InputError
from moco.runs.atomic_files import link_atomically, write_atomically
from moco.runs.run_folder import LAST_CHECKPOINT, PREVIOUS_CHECKPOINT
from moco.weights.safetensors_files import read_safetensors

log = logging.getLogger(__name__)

# What every checkpoint has, and of which kind it is.
CHECKPOINT_PARTS: dict[str, type] = {
    "state_dict": dict, "hyper_parameters": dict, "config": dict, "figures": dict, "random_states": list,
    "global_step": int,
}  # fmt: skip
PLAIN = r"collections\.OrderedDict|torch\._utils\._rebuild_(tensor(_v2)?|parameter)|torch\.(\w+Storage|Size|device)"
# Settings that projects save beside their weights, read as plain dicts: the classes are not imported.
SETTINGS = ("argparse.Namespace", "yacs.config.CfgNode")
# The settings of yacs hold sets of names. `set` is called with what the pickle spells out at the
# call, strings and numbers: copies of a list that is written once could take any memory, and the
# hash of nested tuples any time.
SET = r"(__builtin__|builtins)\.set"
SET_ITEM = "(BINUNICODE|SHORT_BINSTRING|BININT1|BININT2|BININT|BINFLOAT|NONE|NEWTRUE|NEWFALSE)"
SET_CALL = f"EMPTY_LIST ({SET_ITEM} APPEND |MARK ({SET_ITEM} )*APPENDS )*TUPLE1 REDUCE"
OTHER_SET = "a set of more than strings and numbers"
ZIP_START = b"PK\x03\x04"
LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number, pickled, with which torch.save began until 1.5
LEGACY_PICKLES = 5  # magic number, version, machine, content, names of the storages that follow


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint file, but complete on disk before it takes its name; the old ``last.ckpt`` becomes previous."""

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[Path, dict[str, Any]] = {}
        """What this process has read of files already; each is handed out once, instead of the file."""

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        return (
            self.read.pop(Path(path))
            if Path(path) in self.read
            else super().load_checkpoint(path, *args, **kwargs)
        )

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        try:
            is_last = Path(path).name == LAST_CHECKPOINT.name
            previous = Path(path).with_name(PREVIOUS_CHECKPOINT.name) if is_last else None
            write_atomically(Path(path), lambda file: torch.save(checkpoint, file), keep=previous)
        except RuntimeError as error:
            if isinstance(
                error.__context__, OSError
            ):  # a full disk, under the zip writer's complaint about it
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
            f"{damaged}, and so is {PREVIOUS_CHECKPOINT.name}"
            if damaged and previous.is_file()
            else damaged or error
        )
        raise InputError(f"{both}; {way_out(folder)}") from error
    if damaged:
        set_aside = next(
            name for name in numbered(last.with_name(last.name + ".damaged")) if not name.exists()
        )
        os.replace(last, set_aside)
        log.warning("%s; set aside as %s, going on from %s", damaged, set_aside.name, previous)
    link_atomically(previous, last)
    return checkpoint


def way_out(folder: Path) -> str:
    """What to do when the newest checkpoints of a run are damaged."""
    sound = [
        path for path in sorted((folder / LAST_CHECKPOINT).parent.glob("*.ckpt")) if is_sound(path)
    ]
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
    checkpoint = read_archive(path, f"checkpoint={path}")
    missing = CHECKPOINT_PARTS.keys() - (
        checkpoint.keys() if isinstance(checkpoint, dict) else set()
    )
    if missing:
        raise InputError(
            f"checkpoint={path}: not written by moco.train (it lacks {', '.join(sorted(missing))})"
        )
    check_parts(checkpoint, f"checkpoint={path}")
    return checkpoint


def check_parts(
    checkpoint: dict[str, Any], source: str, parts: dict[str, type] = CHECKPOINT_PARTS
) -> None:
    """Raises InputError if a part of a file of ours is not of its kind."""
    for name, kind in parts.items():
        if not isinstance(checkpoint[name], kind):
            raise InputError(
                f"{source}: not written by moco.train (its {name} is no {kind.__name__})"
            )


def read_weights(path: str | Path, source: str) -> Any:
    """The content of any project's file of weights, on the CPU, as plain data and tensors; no code in it is run.

    What torch.save writes, today's archives or the format before version 1.6, or safetensors. Of safetensors the tensors are
    the item ``state_dict``, and what `moco.export` says of them are the others.

    Args:
        source: the key and the path, for the errors.

    Raises:
        InputError: no such file, damaged, of another kind, or in need of unpickling code; or safetensors is not installed.
    """
    if not Path(path).is_file():
        raise InputError(f"{source}: no such file")
    try:
        with open(path, "rb") as file:
            start = file.read(len(LEGACY_START))
    except PermissionError as error:
        raise InputError(f"{source}: may not be read") from error
    if start.startswith(ZIP_START):
        return read_archive(path, source)
    if start == LEGACY_START:
        return read_legacy(path, source)
    if start[8:9] == b"{":  # after the length of the header, which is JSON
        return read_described(path, source)
    raise InputError(
        f"{source}: damaged, or no checkpoint at all (neither torch.save nor safetensors has written it)"
    )


def read_archive(path: str | Path, source: str) -> Any:
    """What torch.save has written since version 1.6, every checksum compared.

    Raises:
        InputError: damaged, or in need of unpickling code.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            check_records(archive, os.path.getsize(path))
            (pickled,) = (
                name
                for name in archive.namelist()
                if name.count("/") == 1 and name.endswith("/data.pkl")
            )
            imported = imports_of(archive.read(pickled))
    except PermissionError as error:
        raise InputError(f"{source}: may not be read") from error
    # What zipfile and pickletools raise on damaged files.
    except (
        ValueError,
        OSError,
        EOFError,
        RuntimeError,
        LookupError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise InputError(f"{source}: damaged, or no checkpoint at all ({error})") from error
    return load_plain(path, source, imported)


def read_legacy(path: str | Path, source: str) -> Any:
    """What torch.save wrote until version 1.5, as the official MoCo v1 and v2 weights are: without checksums.

    Raises:
        InputError: damaged, or in need of unpickling code.
    """
    try:
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            imported = {name for _ in range(LEGACY_PICKLES) for name in imports_of(content)}
    except (ValueError, EOFError, LookupError) as error:
        raise InputError(f"{source}: damaged, or no checkpoint at all ({error})") from error
    return load_plain(path, source, imported)


def load_plain(path: str | Path, source: str, imported: set[str]) -> Any:
    """The content of a file whose pickle would import these names.

    Raises:
        InputError: some of them are neither plain data nor settings, or the pickle makes no sense.
    """
    foreign = set()
    for name in imported:
        if not re.fullmatch(f"{PLAIN}|{SET}", name) and name not in SETTINGS:
            foreign.add(name)
    if foreign:
        raise InputError(
            f"{source}: it holds objects whose loading would run code "
            f"({', '.join(sorted(foreign))}), so it is not loaded; if you trust its source, write its "
            "tensors alone to a new file with torch.save"
        )
    try:
        with torch.serialization.safe_globals([(OrderedDict, name) for name in SETTINGS]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # of a pickle that is sound and makes no sense, torch reports nearly anything
        raise InputError(f"{source}: damaged ({error})") from error


def read_described(path: str | Path, source: str) -> dict[str, Any]:
    """The tensors of a safetensors file, and what `moco.export` wrote of them into its metadata.

    Raises:
        InputError: damaged, or safetensors is not installed.
    """
    weights, metadata = read_safetensors(path, source)
    try:
        about = (
            {key: json.loads(value) for key, value in metadata.items()}
            if "backbone" in metadata
            else {}
        )
    except ValueError as error:
        raise InputError(f"{source}: damaged, or no safetensors file ({error})") from error
    return {**about, "state_dict": weights}


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


def imports_of(pickled: Any) -> set[str]:
    """The names of what a pickle would import: bytes, or a file, which is read to the pickle's end.

    torch's own list of harmless names is longer than `PLAIN`, and some of those take as much memory as the file tells them
    to. A `set` that is not called as in `SET_CALL` adds `OTHER_SET`.
    """
    imported = set()
    memo: dict[Any, str] = {}  # of what the pickle numbers, only what may be fetched for a set
    last = ""
    set_call: list[str] | None = None  # the opcodes since `set` was pushed
    for opcode, argument, _ in pickletools.genops(pickled):
        name = opcode.name
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = last if re.fullmatch(f"{SET_ITEM}|{SET}", last) else ""
            continue
        if name in ("BINGET", "LONG_BINGET"):
            name = memo.get(argument) or name
        elif name in ("GLOBAL", "INST"):
            name = str(argument).replace(" ", ".")
            imported.add(name)
        elif name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):  # torch.save never writes these
            imported.add("an object whose name is hidden")
        last = name
        is_set = re.fullmatch(SET, name) is not None
        if set_call is not None:
            set_call.append(name)
            if name == "REDUCE" and re.fullmatch(SET_CALL, " ".join(set_call)):
                set_call = None
            elif name in ("REDUCE", "STOP") or is_set:
                imported.add(OTHER_SET)
                set_call = None  # refused already: a list that grows with the file would take hours to look through
        if is_set:
            set_call = []
    return imported
