"""Files that are either whole or absent, never half-written."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], keep: Path | None = None
) -> None:
    """Call `write` with a temporary file beside `path`, then rename this file to `path`.

    The content is on disk before the name points to it. After a crash, `path` is therefore either
    the old file or the new one.

    Args:
        path: the file; its folder is made if it is missing.
        write: writes the content.
        keep: the old file at `path` stays under this name, and replaces what was there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
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
    # The rename is on disk only when the folder is.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def link_atomically(source: Path, target: Path) -> None:
    """Make `target` a second name of the file `source`.

    When `source` is replaced later, `target` keeps the file of now.
    """
    temporary = temporary_name(target)
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        content = source.read_bytes()
        write_atomically(target, lambda file: file.write(content))
        return
    os.replace(temporary, target)


def temporary_name(path: Path) -> Path:
    """Return the name under which this process writes what will be `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_half_written(folder: Path) -> None:
    """Remove the temporary files in `folder` of processes that were killed while they wrote.

    No other process may be writing there.
    """
    for temporary in folder.glob(".*.tmp"):
        temporary.unlink()


def write_json(path: Path, figures: Mapping[str, Any]) -> None:
    """Write one flat JSON object. NaN and infinity, which JSON does not have, become null."""
    written = dict(figures)
    for name, figure in figures.items():
        if isinstance(figure, float) and not math.isfinite(figure):
            written[name] = None
    text = json.dumps(written, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
