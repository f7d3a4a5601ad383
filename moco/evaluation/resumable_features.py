"""The features of a long pass over many images, kept on disk so that it can be continued."""

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moco.errors import InputError
from moco.runs.atomic_files import remove_half_written, write_atomically
from moco.runs.config_changes import flattened
from moco.runs.folder_lock import locked

STATE = "state.json"
LOCK = ".lock"
FEATURES = "features.bin"
LABELS = "labels.bin"
NAMES = "names.jsonl"
UNREADABLE = "unreadable.jsonl"
LABEL_BYTES = 8
FILES = (FEATURES, LABELS, NAMES, UNREADABLE)
# At most this much work is lost when the process is killed.
SECONDS_BETWEEN_COMMITS = 10.0


class State(NamedTuple):
    """How much of the files counts; the bytes behind it are of a batch that was not finished."""

    end: list[int]
    """The place where the next batch starts, see `moco.data.loading.every_image`."""
    num_bytes: dict[str, int]
    """Of each file."""

    @property
    def num_rows(self) -> int:
        """Return how many images have features."""
        return self.num_bytes[LABELS] // LABEL_BYTES


class FeatureParts:
    """The files of a pass: features, labels, names of the images and of the unreadable ones.

    Features (float32) and labels (int64) are plain bytes, names are lines of JSON. Rows can be
    added inside a ``with`` block. Every few seconds, and at the end of the block, they are
    committed to the disk.

    Args:
        folder: see `taken`.
        about: what must be the same when the pass is continued, as plain data: ``settings`` by key,
            and hashes of the ``weights`` and of the ``data``.
        start: place of the first image.

    Raises:
        InputError: the folder holds the beginning of another pass.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], start: list[int]) -> None:
        self.folder = folder
        # As it will be read back: JSON turns tuples into lists.
        self.about = json.loads(json.dumps(about))
        self.state = self._read_state() or State(start, dict.fromkeys(FILES, 0))

    def _read_state(self) -> State | None:
        path = self.folder / STATE
        if not path.exists():
            return None
        content = json.loads(path.read_text())
        state = State(**content["state"])
        if state.num_rows == 0:  # nothing is lost
            return None
        for name, num_bytes in state.num_bytes.items():
            if (self.folder / name).stat().st_size < num_bytes:
                raise InputError(f"{self.folder}: damaged; remove that folder to start anew")
        different = differences(content["about"], self.about)
        if different:
            raise InputError(
                f"{self.folder} holds the first {state.num_rows:,} features of another run: "
                f"{'; '.join(different)}; "
                "remove that folder to start anew, or choose another output"
            )
        return state

    def __enter__(self) -> "FeatureParts":
        remove_half_written(self.folder)
        self.files = {}
        for name in FILES:
            path = self.folder / name
            path.touch()
            file = path.open("r+b")
            # What is behind the last commit is of a batch that was not finished.
            file.truncate(self.state.num_bytes[name])
            file.seek(0, os.SEEK_END)
            self.files[name] = file
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
        """Write a batch.

        Args:
            features: (images, width) float32.
            names: (images,).
            labels: (images,) int64.
            unreadable: names of the images that cannot be read.
            end: the place where the next batch starts.
        """
        contents = {
            FEATURES: np.ascontiguousarray(features, "<f4").tobytes(),
            LABELS: np.ascontiguousarray(labels, "<i8").tobytes(),
            NAMES: json_lines(names),
            UNREADABLE: json_lines(unreadable),
        }
        num_bytes = {}
        for name, content in contents.items():
            self.files[name].write(content)
            num_bytes[name] = self.state.num_bytes[name] + len(content)
        # The state changes in one statement and last: a signal may end the program anywhere before.
        self.state = State(end, num_bytes)
        if time.monotonic() - self.committed > SECONDS_BETWEEN_COMMITS:
            self.commit()

    def commit(self) -> None:
        """Write what was added to the disk for good."""
        state = self.state._asdict()
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        text = json.dumps({"version": 1, "about": self.about, "state": state}, indent=1)
        write_atomically(self.folder / STATE, lambda file: file.write(text.encode()))
        self.committed = time.monotonic()

    def __exit__(self, *error: object) -> None:
        try:
            self.commit()
        finally:
            for file in self.files.values():
                # On a full disk each of them fails again; the commit's error is the one to tell.
                with suppress(OSError):
                    file.close()

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of the features: (images, width)."""
        num_rows = self.state.num_rows
        width = self.state.num_bytes[FEATURES] // 4 // max(num_rows, 1)
        return num_rows, width

    @property
    def num_done(self) -> int:
        """Return how many images were read, unreadable ones included, before the ``with`` block."""
        return self.state.num_rows + len(self.unreadable())

    def features(self) -> np.ndarray:
        """Return all features (images, width) float32, mapped from the file."""
        return np.memmap(self.folder / FEATURES, "<f4", "r", shape=self.shape)

    def labels(self) -> np.ndarray:
        """Return all labels (images,) int64, mapped from the file."""
        return np.memmap(self.folder / LABELS, "<i8", "r")

    def names(self) -> Iterator[str]:
        """Yield the names of all images."""
        with (self.folder / NAMES).open() as file:
            yield from map(json.loads, file)

    def unreadable(self) -> list[str]:
        """Return the names of the images that earlier attempts could not read."""
        num_bytes = self.state.num_bytes[UNREADABLE]
        if num_bytes == 0:
            return []
        lines = (self.folder / UNREADABLE).read_bytes()[:num_bytes].splitlines()
        return list(map(json.loads, lines))


def json_lines(names: Iterable[str]) -> bytes:
    """Return a line for each name, a JSON string in ASCII.

    A name may hold newlines and bytes that are not UTF-8.
    """
    return "".join(json.dumps(name) + "\n" for name in names).encode("ascii")


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Return what differs between two passes, in words."""
    old, new = flattened(there["settings"]), flattened(here["settings"])
    different = []
    for key in sorted(old | new):
        if old.get(key) != new.get(key):
            different.append(f"{key}: {old.get(key)} there, {new.get(key)} here")
    if there["weights"] != here["weights"]:
        different.append("checkpoint: other weights")
    if there["data"] != here["data"]:
        different.append("data: other images, names or labels, or in another order")
    return different


def remove_parts(folder: Path) -> None:
    """Remove the folder.

    The state goes first, so that what is left after an interruption here counts as a new folder.
    """
    (folder / STATE).unlink()
    shutil.rmtree(folder)


@contextmanager
def taken(folder: Path) -> Iterator[None]:
    """Make the folder if it is missing, and lock it inside the block.

    Raises:
        InputError: another process works there, or it holds other files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Before the lock file is made: a folder that is not ours stays as it is.
    for path in folder.iterdir():
        if path.name not in (STATE, LOCK, *FILES) and path.suffix != ".tmp":
            raise InputError(f"{folder}: holds other files; choose another output")
    with locked(folder / LOCK, str(folder)):
        yield
