"""Packed copies of data sets, as moco.pack writes them: what is on disk, and how it is read.

A copy is a folder with ``index.json``: its format, its settings, its source, and its parts in order, each written once and
whole. In the format `array` all pixels, (H, W, 3) uint8 an image, stand one after the other in ``pixels.bin``; in the
format `shards` the parts are tar files of encoded images. ``index.npz`` says where each image is.

Letters: M images, H W pixels.
"""

import mmap
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from moco.data.files.decoding import DecodedImage, EncodedImage, encoded
from moco.data.sources.packed_index import (
    COLUMNS,
    INDEX,
    SIDES,
    TABLE,
    check_finished,
    read_index,
    read_table,
)
from moco.data.sources.registry import DataSource, Labelled
from moco.errors import InputError

PIXELS = "pixels.bin"
MOST_OPEN = 256  # files of a process


class PackedImages:
    """Images of a packed copy, read from where they lie.

    Args:
        folder: of the copy.
        files: its parts, or the one file with all pixels.
        table: of all its images: `COLUMNS`; ``parts``, which of the files each is in; ``names`` and ``name_ends``, the
            bytes of all names and where each ends.
        rows: (M,) int64, which of them these are.
    """

    def __init__(
        self,
        folder: str,
        files: list[str],
        table: dict[str, Tensor],
        rows: Tensor,
        max_image_pixels: int,
    ) -> None:
        self.folder = folder
        self.files = files
        self.table = table  # tensors, which loader processes share; arrays would be copied for each
        self.rows = rows
        self.max_image_pixels = max_image_pixels
        self.maps: dict[int, mmap.mmap] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"maps": {}}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(self.opened(index).pixels())

    def opened(self, index: int) -> EncodedImage:
        """Of an array a view of the file, of shards the encoded image."""
        content = self.content(index)
        if self.files != [PIXELS]:
            return encoded(bytes(content), self.name(index), self.max_image_pixels)
        row = self.rows[index]
        shape = (int(self.table["heights"][row]), int(self.table["widths"][row]), 3)
        return DecodedImage(np.frombuffer(content, dtype=np.uint8).reshape(shape))

    def content(self, index: int) -> memoryview:
        """The bytes of an image: its pixels, or its file."""
        row = self.rows[index]
        start = int(self.table["offsets"][row])
        return memoryview(self._map(int(self.table["parts"][row])))[
            start : start + int(self.table["lengths"][row])
        ]

    def name(self, index: int) -> str:
        """The image's name in the source."""
        row, ends = int(self.rows[index]), self.table["name_ends"]
        start = int(ends[row - 1]) if row else 0
        return os.fsdecode(self.table["names"][start : int(ends[row])].numpy().tobytes())

    def chosen(self, places: np.ndarray) -> "PackedImages":
        """Some of these, (M',) int64."""
        return PackedImages(
            self.folder,
            self.files,
            self.table,
            self.rows[torch.from_numpy(places)],
            self.max_image_pixels,
        )

    def is_damaged(self, index: int) -> bool:
        """Whether an image's bytes are others than were written."""
        return zlib.crc32(self.content(index)) != int(self.table["checksums"][self.rows[index]])

    def _map(self, number: int) -> mmap.mmap:
        if number not in self.maps:
            if len(self.maps) == MOST_OPEN:
                del self.maps[next(iter(self.maps))]
            with open(os.path.join(self.folder, self.files[number]), "rb") as file:
                self.maps[number] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self.maps[number]


def packed(root: str, max_image_pixels: int) -> DataSource:
    """A folder that moco.pack wrote, with the source's labels.

    Raises:
        InputError: it is none, or not finished, or cut short.
    """
    index = read_index(root)
    check_finished(root, index)
    everything, table = read_copy(root, index, max_image_pixels)
    train = everything.chosen(np.arange(index["num_images"]))
    sides: dict[str, Labelled | None] = {}
    for side in SIDES:
        rows, labels = table.get(f"{side}_rows"), table.get(f"{side}_labels")
        if rows is None or labels is None:
            sides[side] = None
            continue
        is_train = np.array_equal(rows, np.arange(len(train)))
        sides[side] = Labelled(train if is_train else everything.chosen(rows), labels)
    return DataSource(train, sides["bank"], sides["queries"], image_size=index["image_size"])


def read_copy(
    root: str, index: dict[str, Any], max_image_pixels: int
) -> tuple[PackedImages, dict[str, np.ndarray]]:
    """Every image of a finished copy, and the arrays of ``index.npz``.

    Raises:
        InputError: the copy is damaged; it names the file.
    """
    table = read_table(Path(root, TABLE))
    counts, sizes = ([part[what] for part in index["parts"]] for what in ("images", "bytes"))
    files = [part["file"] for part in index["parts"]]
    if index["format"] == "array":
        files, counts, sizes = [PIXELS], [sum(counts)], [sum(sizes)]
    if sum(counts) != len(table["rows"]):
        raise InputError(
            f"{Path(root, TABLE)}: {len(table['rows'])} images, {INDEX} says {sum(counts)}; pack it anew"
        )
    for file, size in zip(files, sizes, strict=True):
        check_size(Path(root, file), size)
    table["parts"] = np.repeat(np.arange(len(files)), np.array(counts, np.int64))
    # In this form no number of theirs overflows.
    is_sound = (
        table["lengths"] <= np.array(sizes, np.int64)[table["parts"]] - table["offsets"]
    ).all()
    if index["format"] == "array":
        thirds, rest = np.divmod(table["lengths"], 3)
        is_sound = (
            is_sound
            and not rest.any()
            and np.array_equal(thirds, table["heights"].astype(np.int64) * table["widths"])
        )
    if not is_sound:
        raise InputError(f"{Path(root, TABLE)}: does not go with {INDEX}; pack it anew")
    tensors = {
        name: torch.from_numpy(table[name]) for name in (*COLUMNS, "parts", "names", "name_ends")
    }
    return PackedImages(
        root, files, tensors, torch.arange(len(table["rows"])), max_image_pixels
    ), table


def check_size(path: Path, expected: int) -> None:
    """Raises InputError if the file does not have so many bytes."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; pack it anew") from error
    if size != expected:
        raise InputError(f"{path}: {size:,} bytes, and the index says {expected:,}; pack it anew")
