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
    data = settings["data"]
    root = data["root"]
    what = data["name"]
    if isinstance(root, str):
        what = Path(os.path.abspath(root)).name or what
    everything = json.dumps([os.path.abspath(checkpoint), settings], sort_keys=True, default=str)
    digest = hashlib.sha256(everything.encode("utf-8", "surrogateescape")).hexdigest()
    stem = f"{Path(checkpoint).stem}-{what}-{settings['split']}-{digest[:8]}"
    return place / f"{stem.replace(os.sep, '-')}.npz"


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
