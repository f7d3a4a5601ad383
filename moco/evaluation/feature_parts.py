"""The features of a long pass over many images on disk as they come, so that it goes on where it was interrupted.

Letters: M images so far, N batch, D feature width.
"""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from moco.errors import InputError
from moco.runs.atomic_files import remove_half_written, write_atomically
from moco.runs.config_changes import flattened
from moco.runs.folder_lock import locked

STATE = "state.json"
LOCK = ".lock"
FEATURES, LABELS, NAMES, UNREADABLE = (
    "features.bin",
    "labels.bin",
    "names.jsonl",
    "unreadable.jsonl",
)
FILES = (FEATURES, LABELS, NAMES, UNREADABLE)
SECONDS_BETWEEN_COMMITS = 10.0


@dataclass(frozen=True)
class State:
    """How much of the files counts; what is behind that comes from a batch that was not finished."""

    end: list[int]
    """The place where the next batch starts, see `moco.data.loading.image_sets`."""
    num_rows: int = 0
    """M."""
    feature_dim: int = 0
    """D."""
    name_width: int = 0
    """Characters of the longest name."""
    num_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FILES, 0))


class FeatureParts:
    """Features (M, D) float32 and labels (M,) int64 as plain bytes, names and unreadable images as lines of JSON.

    Inside a ``with`` block rows can be added. Every few seconds, and when the block is left, what is whole is put on disk.

    Args:
        folder: of `taken`.
        about: what must be the same when the pass goes on, as plain data: ``settings`` by key, and hashes of the ``weights``
            and of the ``data``.
        start: place of the first image.

    Raises:
        InputError: the folder holds the beginning of something else.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], start: list[int]) -> None:
        self.folder = folder
        self.about = json.loads(json.dumps(about))
        self.state = self._found() or State(start)

    def _found(self) -> State | None:
        if not (self.folder / STATE).exists():
            return None
        try:
            there = json.loads((self.folder / STATE).read_text())
            about, state = there["about"], State(**there["state"])
            sizes = {name: (self.folder / name).stat().st_size for name in FILES}
            is_whole = all(sizes[name] >= state.num_bytes[name] for name in FILES)
        except (ValueError, KeyError, TypeError, OSError):
            is_whole = False
        if not is_whole:
            raise InputError(f"{self.folder}: damaged; remove that folder to start anew")
        if not state.num_rows:  # nothing is lost
            return None
        if different := differing(about, self.about):
            raise InputError(
                f"{self.folder} holds the first {state.num_rows:,} features of another run: {'; '.join(different)}; "
                "remove that folder to start anew, or choose another output"
            )
        return state

    def __enter__(self) -> "FeatureParts":
        remove_half_written(self.folder)
        for name in FILES:
            (self.folder / name).touch()
        self.files = {name: (self.folder / name).open("r+b") for name in FILES}
        for name, file in self.files.items():
            file.truncate(self.state.num_bytes[name])
            file.seek(0, os.SEEK_END)
        self.commit()
        return self

    def add(
        self,
        features: np.ndarray,
        names: Sequence[str],
        labels: np.ndarray,
        unreadable: Sequence[str],
        end: list[int],
    ) -> None:
        """Write a batch: features (N, D) float32, names and labels of the N images, names of those that cannot be read."""
        contents = {
            FEATURES: np.ascontiguousarray(features, "<f4").tobytes(),
            LABELS: np.ascontiguousarray(labels, "<i8").tobytes(),
            NAMES: lines(names),
            UNREADABLE: lines(unreadable),
        }
        for name, content in contents.items():
            self.files[name].write(content)
        # At once and last: a signal may end the program anywhere before.
        self.state = State(
            end,
            self.state.num_rows + len(names),
            features.shape[1] if len(names) else self.state.feature_dim,
            max([self.state.name_width, *map(len, names)]),
            {name: self.state.num_bytes[name] + len(content) for name, content in contents.items()},
        )
        if time.monotonic() - self.committed > SECONDS_BETWEEN_COMMITS:
            self.commit()

    def commit(self) -> None:
        """Put on disk for good what was added."""
        state = dataclasses.asdict(self.state)
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        text = json.dumps({"version": 1, "about": self.about, "state": state}, indent=1)
        write_atomically(self.folder / STATE, lambda file: file.write(text.encode()))
        self.committed = time.monotonic()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.commit()
            else:
                with suppress(
                    OSError
                ):  # a full disk is what ended it; the last commit still counts
                    self.commit()
        finally:
            for file in self.files.values():
                with suppress(OSError):
                    file.close()

    def blocks(self, num_rows: int) -> Iterator[np.ndarray]:
        """All features in their order, (up to `num_rows`, D) float32 at a time."""
        width = self.state.feature_dim
        with (self.folder / FEATURES).open("rb") as file:
            for start in range(0, self.state.num_rows, num_rows):
                count = min(num_rows, self.state.num_rows - start)
                yield np.fromfile(file, "<f4", count * width).reshape(count, width)

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """The features of some images, (len(numbers), D) float32."""
        shape = (self.state.num_rows, self.state.feature_dim)
        return np.array(np.memmap(self.folder / FEATURES, "<f4", "r", shape=shape)[numbers])

    def names(self) -> Iterator[str]:
        with (self.folder / NAMES).open() as file:
            yield from map(json.loads, file)

    def unreadable(self) -> list[str]:
        """The names of the images that earlier attempts could not read; before the ``with`` block."""
        if not self.state.num_bytes[UNREADABLE]:
            return []
        with (self.folder / UNREADABLE).open("rb") as file:
            return [
                json.loads(line)
                for line in file.read(self.state.num_bytes[UNREADABLE]).splitlines()
            ]


def lines(names: Sequence[str]) -> bytes:
    """In each line a name as a JSON string in ASCII: it may hold newlines, and bytes that are no UTF-8."""
    return "".join(json.dumps(name) + "\n" for name in names).encode("ascii")


def differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What is not the same, in words."""
    old, new = flattened(there["settings"]), flattened(here["settings"])
    words = [
        f"{key}: {old.get(key)} there, {new.get(key)} here"
        for key in sorted(old | new)
        if old.get(key) != new.get(key)
    ]
    if there["weights"] != here["weights"]:
        words.append("checkpoint: other weights")
    if there["data"] != here["data"]:
        words.append("data: other images, names or labels, or in another order")
    return words


def remove_parts(folder: Path) -> None:
    """Remove the folder. What is left of it where this is interrupted counts as new, since the state goes first."""
    (folder / STATE).unlink()
    shutil.rmtree(folder)


@contextmanager
def taken(folder: Path) -> Iterator[None]:
    """Make the folder if it isn't there; inside, no other process works there.

    Raises:
        InputError: one does, the folder cannot be made, or something else is in there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}") from error
    # Before the lock file is made: a folder that is not ours stays as it is.
    for path in folder.iterdir():
        if path.name not in (STATE, LOCK, *FILES) and path.suffix != ".tmp":
            raise InputError(f"{folder}: holds other files; choose another output")
    with locked(folder / LOCK, str(folder)):
        yield
