"""Where a program writes when ``output`` is not given."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moco.runs.run_folder import CONFIG


def run_of(checkpoint: str | Path) -> Path | None:
    """Return the run folder of a checkpoint, or None for a file that is in no run folder."""
    folder = Path(checkpoint).absolute().parent
    is_in_run = folder.name == "checkpoints" and (folder.parent / CONFIG).is_file()
    return folder.parent if is_in_run else None


def features_file(checkpoint: str | Path, settings: Mapping[str, Any], folder: Path) -> Path:
    """Return where the features of a dataset go.

    It is ``embeddings/`` of the checkpoint's run folder. For weights in no run folder it is beside
    the run folders of ``moco.embed``. The same command finds the same file again, so that it can go
    on there. Another dataset or another setting has another name.

    Args:
        checkpoint: the file of weights.
        settings: what the features depend on, as plain data, with the settings of the data in
            ``data``.
        folder: the run folder of ``moco.embed``.
    """
    run = run_of(checkpoint)
    place = folder.parent if run is None else Path(os.path.relpath(run), "embeddings")
    stem = f"{Path(checkpoint).stem}-{dataset_word(settings)}-{settings['split']}"
    name = f"{stem}-{digest_of(checkpoint, settings)}"
    return place / f"{name.replace(os.sep, '-')}.npz"


def predictions_folder(checkpoint: str | Path, settings: Mapping[str, Any], folder: Path) -> Path:
    """Return where the masks of a dataset go: ``predictions/`` of the checkpoint's run folder.

    Args:
        checkpoint, settings: see `features_file`.
        folder: the run folder of ``moco.predict``; for a checkpoint in no run folder the masks are
            beside it.
    """
    run = run_of(checkpoint)
    place = folder.parent if run is None else Path(os.path.relpath(run), "predictions")
    stem = f"{Path(checkpoint).stem}-{dataset_word(settings)}"
    name = f"{stem}-{digest_of(checkpoint, settings)}"
    return place / name.replace(os.sep, "-")


def dataset_word(settings: Mapping[str, Any]) -> str:
    """Return what to call a dataset in the name of a file: its folder, or its own name."""
    data = settings["data"]
    root = data["root"]
    word = str(data["name"])
    if isinstance(root, str):
        word = Path(os.path.abspath(root)).name or word
    return word


def digest_of(checkpoint: str | Path, settings: Mapping[str, Any]) -> str:
    """Return eight letters that differ where the checkpoint or a setting differs."""
    everything = json.dumps([os.path.abspath(checkpoint), settings], sort_keys=True, default=str)
    digest = hashlib.sha256(everything.encode("utf-8", "surrogateescape")).hexdigest()
    return digest[:8]


def export_file(checkpoint: str | Path, file_format: str, ending: str, folder: Path) -> Path:
    """Return where exported weights go: beside the checkpoint of a run, otherwise to `folder`.

    Args:
        checkpoint: the file of weights.
        file_format: the format, which is part of the name.
        ending: of the file, with its dot.
        folder: the run folder of ``moco.export``.
    """
    run = run_of(checkpoint)
    place = folder if run is None else Path(os.path.relpath(run), "checkpoints")
    stem = Path(checkpoint).stem
    if ending != f".{file_format}":
        stem += f"_{file_format}"
    return place / f"{stem}{ending}"
