"""Writing a packed copy: in numbered parts, each whole or absent, so that it goes on where it stopped.

See `moco.data.sources.packed` for what is on disk.
"""

import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from moco.data.sources.packed import PIXELS, PackedImages
from moco.data.sources.packed_index import COLUMNS, INDEX, TABLE, read_table
from moco.data.sources.packing import Chunk, Pool
from moco.errors import printable

PARTS = "parts"  # a folder: the tables of the parts until all are there
BLOCK = tarfile.BLOCKSIZE


class PartFile(Protocol):
    """The file that a part of a copy goes to."""

    name: str
    file: BinaryIO
    num_bytes: int

    def add(self, content: np.ndarray, place: int, label: int) -> int:
        """Write the image that is at `place` in the copy; its offset in the file."""
        ...

    def close(self) -> dict[str, Any]:
        """Put the part on disk for good; what the index says of it besides."""
        ...


class ArrayPart:
    """The next stretch of ``pixels.bin``; what is there beyond `start` comes from a part that was not finished."""

    name = PIXELS

    def __init__(self, folder: Path, start: int) -> None:
        (folder / PIXELS).touch()
        self.file: BinaryIO = (folder / PIXELS).open("r+b")
        self.file.truncate(start)
        self.start = self.file.seek(start)
        self.num_bytes = 0

    def add(self, content: np.ndarray, place: int, label: int) -> int:
        """See `PartFile`."""
        self.num_bytes += self.file.write(content.data)
        return self.start + self.num_bytes - len(content)

    def close(self) -> dict[str, Any]:
        """See `PartFile`."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {}


class ShardPart:
    """A tar file as webdataset reads it: KEY.jpg for each image, and KEY.cls with the label where there is one.

    The headers are written by hand, since tarfile does not say at which offset the content of a member starts.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.path = folder / name
        self.temporary = temporary_of(self.path)
        self.file: BinaryIO = self.temporary.open("wb")
        self.digest = hashlib.sha256()
        self.num_bytes = 0

    def add(self, content: np.ndarray, place: int, label: int) -> int:
        """See `PartFile`."""
        offset = self._add_member(f"{place:09}.jpg", content.tobytes())
        if label >= 0:
            self._add_member(f"{place:09}.cls", str(label).encode())
        return offset

    def _add_member(self, name: str, content: bytes) -> int:
        header = tarfile.TarInfo(name)
        header.size = len(content)
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self.num_bytes
        self._write(content + bytes(-len(content) % BLOCK))
        return offset

    def _write(self, content: bytes) -> None:
        self.digest.update(content)
        self.num_bytes += self.file.write(content)

    def close(self) -> dict[str, Any]:
        """See `PartFile`."""
        self._write(bytes(2 * BLOCK))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.temporary, self.path)
        return {"sha256": self.digest.hexdigest()}


class Writer:
    """Writes a copy, from where its index says that it stopped. Leaving its ``with`` block gives up a part that is not full.

    Args:
        index: of `moco.data.sources.packed_index.read_index`, or a new one.
        max_part_bytes: a part ends with the chunk that reaches so many.
    """

    def __init__(
        self, folder: Path, index: dict[str, Any], pool: Pool, max_part_bytes: int
    ) -> None:
        self.folder = folder
        self.index = index
        self.pool = pool
        self.max_part_bytes = max_part_bytes
        self.labels = pool.labels()
        self.part: PartFile | None = None
        self.part_skipped: list[tuple[int, str]] = []
        (folder / PARTS).mkdir(exist_ok=True)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error: object) -> None:
        if self.part is not None:
            self.part.file.close()

    @property
    def done(self) -> int:
        """The place in the copy's order where the next part starts."""
        return int(self.index["parts"][-1]["stop"]) if self.index["parts"] else 0

    @property
    def skipped(self) -> list[tuple[int, str]]:
        """Rows of the pool that the whole parts leave out since they could not be read, and why."""
        return [(row, reason) for part in self.index["parts"] for row, reason in part["skipped"]]

    def add(self, chunk: Chunk) -> None:
        """Write a chunk; end the part if it is full or the next chunk belongs to another kind."""
        if self.part is None:
            self._begin()
        assert self.part is not None
        content, start = chunk.content.numpy(), 0
        for row, length in zip(chunk.columns["rows"], chunk.columns["lengths"], strict=True):
            offset = self.part.add(
                content[start : start + length],
                self.num_before + len(self.offsets),
                self.labels[row],
            )
            self.offsets.append(offset)
            start += length
        for name, values in chunk.columns.items():
            self.columns[name] += values
        self.part_skipped += chunk.skipped
        if self.part.num_bytes >= self.max_part_bytes or chunk.stop in (
            self.pool.num_train,
            len(self.pool),
        ):
            self._end(chunk.stop)

    def _begin(self) -> None:
        parts = self.index["parts"]
        self.num_before = sum(part["images"] for part in parts)
        self.offsets: list[int] = []
        self.columns: dict[str, list[int]] = {name: [] for name in COLUMNS if name != "offsets"}
        if self.index["format"] == "array":
            self.part = ArrayPart(self.folder, sum(part["bytes"] for part in parts))
            return
        kind = "train-" if self.done < self.pool.num_train else "held_out-"
        number = sum(part["file"].startswith(kind) for part in parts)
        self.part = ShardPart(self.folder, f"{kind}{number:05}.tar")

    def _end(self, stop: int) -> None:
        assert self.part is not None
        about = self.part.close()
        table = {name: np.array(values, COLUMNS[name]) for name, values in self.columns.items()}
        table["offsets"] = np.array(self.offsets, np.int64)
        names = [os.fsencode(self.pool.name(row)) for row in self.columns["rows"]]
        save_table(self._table_path(len(self.index["parts"])), table | names_table(names))
        self.index["parts"].append(
            {
                "file": self.part.name,
                "stop": stop,
                "images": len(self.offsets),
                "bytes": self.part.num_bytes,
                "skipped": self.part_skipped,
                **about,
            }
        )
        write_index(self.folder, self.index)
        self.part, self.part_skipped = None, []

    def _table_path(self, number: int) -> Path:
        return self.folder / PARTS / f"{number:05}.npz"

    def finish(self) -> None:
        """Join the parts' tables, and say that the copy is complete."""
        tables = [
            read_table(self._table_path(number)) for number in range(len(self.index["parts"]))
        ]
        joined = {
            name: np.concatenate([table[name] for table in tables]) for name in (*COLUMNS, "names")
        }
        lengths = [np.diff(table["name_ends"], prepend=0) for table in tables]
        joined["name_ends"] = np.cumsum(np.concatenate(lengths), dtype=np.int64)
        places = np.full(len(self.pool), -1, dtype=np.int64)
        places[joined["rows"]] = np.arange(len(joined["rows"]))
        for side, (rows, labels) in self.pool.sides.items():
            in_order = np.argsort(places[rows], kind="stable")[
                (places[rows] < 0).sum() :
            ]  # of the copy, skipped ones left out
            joined[f"{side}_rows"], joined[f"{side}_labels"] = (
                places[rows][in_order],
                labels[in_order],
            )
        save_table(self.folder / TABLE, joined)
        self.index["num_images"] = int((joined["rows"] < self.pool.num_train).sum())
        self.index["complete"] = True
        write_index(self.folder, self.index)
        shutil.rmtree(self.folder / PARTS)


def temporary_of(path: Path) -> Path:
    """Where a file is written before it takes its name; a crash leaves it there, and the next attempt writes over it."""
    return path.with_name(f".{path.name}.tmp")


def names_table(names: list[bytes]) -> dict[str, np.ndarray]:
    """Names as two arrays: all their bytes, and where each ends."""
    ends = np.cumsum([len(name) for name in names], dtype=np.int64)
    return {"names": np.frombuffer(b"".join(names), dtype=np.uint8), "name_ends": ends}


def save_table(path: Path, table: Mapping[str, np.ndarray]) -> None:
    """Write an .npz file, whole or not at all."""
    temporary = temporary_of(path)
    with temporary.open("wb") as file:
        np.savez(file, **table)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_index(folder: Path, index: Mapping[str, Any]) -> None:
    """Write ``index.json``, whole or not at all."""
    temporary = temporary_of(folder / INDEX)
    with temporary.open("w") as file:
        json.dump(index, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / INDEX)


def verify(copy: PackedImages, pool: Pool, rows: np.ndarray) -> Iterator[tuple[str, bool]]:
    """For each image of a copy its name, and whether it is as it was written and called as in the source.

    Args:
        rows: (M,) of the pool, one for each image of the copy.
    """
    for index, row in enumerate(rows.tolist()):
        name = copy.name(index)
        yield name, not copy.is_damaged(index) and row < len(pool) and pool.name(row) == name


def damaged_shards(folder: Path, index: Mapping[str, Any]) -> list[str]:
    """Shards whose SHA-256 is another than the index says."""
    return [
        printable(part["file"])
        for part in index["parts"]
        if "sha256" in part and sha256(folder / part["file"]) != part["sha256"]
    ]


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
