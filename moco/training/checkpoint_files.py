"""Checkpoint files: written whole or not at all, read without running code."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO

from moco.errors import InputError
from moco.training.run_folder import write_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint file, but complete on disk before it takes its name."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        try:
            write_atomically(Path(path), lambda file: torch.save(checkpoint, file))
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # a full disk, under the zip writer's complaint about it
                raise error.__context__ from error
            raise


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


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of ours on the CPU, as plain data and tensors; no code in it is run.

    Raises:
        InputError: no such file, damaged, not written by a program of ours, or in need of unpickling code.
    """
    if not Path(path).is_file():
        raise InputError(f"checkpoint={path}: no such file")
    if not zipfile.is_zipfile(path):
        raise InputError(f"checkpoint={path}: damaged, or no checkpoint at all")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"checkpoint={path}: it holds objects whose loading would run code, so it is not loaded"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise InputError(f"checkpoint={path}: damaged ({error})") from error
    missing = {"state_dict", "hyper_parameters", "config", "figures", "random_states"} - (
        checkpoint.keys() if isinstance(checkpoint, dict) else set()
    )
    if missing:
        raise InputError(f"checkpoint={path}: not written by moco.train (it lacks {', '.join(sorted(missing))})")
    return checkpoint
