"""A packed copy of a dataset, as moco.pack writes it: what is on disk, how it is checked and read.

A copy is a folder. ``index.json`` holds its format, settings, source, and its parts in order. With
the format ``array`` the pixels of all images, (height, width, 3) uint8 each, follow each other in
``pixels.bin``; with ``shards`` the parts are tar files of encoded images. ``index.npz`` says where
each image is. A copy may come from elsewhere, so both index files are checked before use.
"""

import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from moco.data.files.archives import DAMAGED, read_arrays
from moco.data.files.decoding import DecodedImage, EncodedImage, encoded
from moco.data.files.listing import start_of
from moco.data.sources.source import DataSource, Labelled
from moco.errors import InputError, printable

INDEX = "index.json"
TABLE = "index.npz"
PIXELS = "pixels.bin"
MAX_OPEN_FILES = 256  # of one process

COLUMNS = {
    "rows": np.int64,  # in the source: first the images to train on, then the others
    "offsets": np.int64,  # bytes from the start of the file
    "lengths": np.int64,  # bytes
    "heights": np.int32,
    "widths": np.int32,
    "checksums": np.int64,  # CRC-32 of the bytes
}
"""One-dimensional arrays of the table with an entry for each image."""
ARRAYS = COLUMNS | {"names": np.uint8, "name_ends": np.int64}
"""`COLUMNS`, the bytes of all names, and where each name ends."""
SIDES = ("bank", "queries")
SIDE_ARRAYS = ("bank_rows", "bank_labels", "queries_rows", "queries_labels")


class PackedImages:
    """Images of a packed copy, read from memory-mapped files.

    Args:
        files: names of the files in `folder`: the shards, or the one file with all pixels.
        table: `ARRAYS` for all images of the copy, and ``parts``, the number of each one's file.
        rows: (images,) int64, which images of the copy these are.
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
        self.table = table  # loader processes share a tensor's memory; arrays would be copied
        self.rows = rows
        self.max_image_pixels = max_image_pixels
        self.maps: dict[int, mmap.mmap] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A memory map cannot be sent to another process.
        return self.__dict__ | {"maps": {}}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(self.opened(index).pixels())

    def opened(self, index: int) -> EncodedImage:
        """Return a view of the pixels, or the encoded image of a shard."""
        content = self.content(index)
        if self.files != [PIXELS]:
            return encoded(bytes(content), self.name(index), self.max_image_pixels)
        row = self.rows[index]
        height = int(self.table["heights"][row])
        width = int(self.table["widths"][row])
        return DecodedImage(np.frombuffer(content, dtype=np.uint8).reshape(height, width, 3))

    def content(self, index: int) -> memoryview:
        """Return an image's bytes: its pixels, or its encoded file."""
        row = self.rows[index]
        start = int(self.table["offsets"][row])
        end = start + int(self.table["lengths"][row])
        file = self._map_file(int(self.table["parts"][row]))
        return memoryview(file)[start:end]

    def name(self, index: int) -> str:
        """Return the image's name in the source."""
        row = int(self.rows[index])
        name_ends = self.table["name_ends"]
        start = start_of(name_ends, row)
        end = int(name_ends[row])
        return os.fsdecode(self.table["names"][start:end].numpy().tobytes())

    def subset(self, numbers: np.ndarray) -> "PackedImages":
        """Return the images at these places, (chosen,) int64."""
        rows = self.rows[torch.from_numpy(numbers)]
        return PackedImages(self.folder, self.files, self.table, rows, self.max_image_pixels)

    def is_damaged(self, index: int) -> bool:
        """Return whether an image's bytes do not match their checksum."""
        expected = int(self.table["checksums"][self.rows[index]])
        return zlib.crc32(self.content(index)) != expected

    def _map_file(self, number: int) -> mmap.mmap:
        if number not in self.maps:
            # A copy may have more shards than a process may open files.
            if len(self.maps) == MAX_OPEN_FILES:
                oldest = next(iter(self.maps))
                del self.maps[oldest]
            with open(os.path.join(self.folder, self.files[number]), "rb") as file:
                self.maps[number] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self.maps[number]


def packed_source(root: str, max_image_pixels: int) -> DataSource:
    """Return a folder that moco.pack wrote, with the labels of the copied source.

    Raises:
        InputError: the folder holds no copy, or the copy is not finished or is damaged.
    """
    index = read_index(root)
    check_finished(root, index)
    copy, table = read_copy(root, index, max_image_pixels)
    train = copy.subset(np.arange(index["num_images"]))
    bank = read_side("bank", copy, train, table)
    queries = read_side("queries", copy, train, table)
    return DataSource(train, bank, queries, image_size=index["image_size"])


def read_side(
    side: str, copy: PackedImages, train: PackedImages, table: Mapping[str, np.ndarray]
) -> Labelled | None:
    """Return the copy's ``bank`` or ``queries``, or None if it has none."""
    if f"{side}_rows" not in table:
        return None
    rows = table[f"{side}_rows"]
    labels = table[f"{side}_labels"]
    if np.array_equal(rows, np.arange(len(train))):
        return Labelled(train, labels)  # the same object, so that it is cached once
    return Labelled(copy.subset(rows), labels)


def read_copy(
    root: str, index: dict[str, Any], max_image_pixels: int
) -> tuple[PackedImages, dict[str, np.ndarray]]:
    """Return all images of a finished copy, and the arrays of its table.

    Raises:
        InputError: the copy is damaged; the message names the file.
    """
    path = Path(root, TABLE)
    table = read_table(path)
    num_images = total_of_parts(index, "images")
    if num_images != len(table["rows"]):
        raise InputError(
            f"{path}: {len(table['rows'])} images, {INDEX} says {num_images}; pack it anew"
        )
    files: list[str] = []
    counts: list[int] = []
    sizes: list[int] = []
    if index["format"] == "array":  # all parts are in one file
        files = [PIXELS]
        counts = [num_images]
        sizes = [total_of_parts(index, "bytes")]
    else:
        for part in index["parts"]:
            files.append(part["file"])
            counts.append(part["images"])
            sizes.append(part["bytes"])
    for file, size in zip(files, sizes, strict=True):
        check_file_size(Path(root, file), size)
    table["parts"] = np.repeat(np.arange(len(files)), np.array(counts, np.int64))
    size_of_file = np.array(sizes, np.int64)[table["parts"]]
    # A difference, because the sum of a damaged offset and a length could overflow.
    is_inside_file = table["lengths"] <= size_of_file - table["offsets"]
    if not is_inside_file.all():
        raise InputError(f"{path}: does not go with {INDEX}; pack it anew")
    if index["format"] == "array" and not pixels_fill_lengths(table):
        raise InputError(f"{path}: does not go with {INDEX}; pack it anew")
    tensors = {name: torch.from_numpy(table[name]) for name in (*ARRAYS, "parts")}
    rows = torch.arange(len(table["rows"]))
    return PackedImages(root, files, tensors, rows, max_image_pixels), table


def pixels_fill_lengths(table: Mapping[str, np.ndarray]) -> bool:
    """Return whether each image of an array has 3 bytes for each of its pixels."""
    num_pixels, remainder = np.divmod(table["lengths"], 3)
    heights = table["heights"].astype(np.int64)
    return not remainder.any() and np.array_equal(num_pixels, heights * table["widths"])


def check_file_size(path: Path, expected: int) -> None:
    """Raise InputError if the file is missing or does not have `expected` bytes."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; pack it anew") from error
    if size != expected:
        raise InputError(f"{path}: {size:,} bytes, and the index says {expected:,}; pack it anew")


def damaged_shards(folder: Path, index: Mapping[str, Any]) -> list[str]:
    """Return the names of the shards whose SHA-256 differs from the index's."""
    names = []
    for part in index["parts"]:
        expected = part.get("sha256")  # an array has none
        if expected is not None and file_sha256(folder / part["file"]) != expected:
            names.append(part["file"])
    return names


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        block = file.read(2**20)
        while block:
            digest.update(block)
            block = file.read(2**20)
    return digest.hexdigest()


def read_index(root: str) -> dict[str, Any]:
    """Return ``index.json`` of a copy, which may be unfinished.

    Raises:
        InputError: there is no copy, or its index is damaged or of another version.
    """
    path = Path(root, INDEX)
    try:
        index: dict[str, Any] = json.loads(path.read_text())
        version = index["version"]
    except FileNotFoundError as error:
        raise InputError(
            f"{root}: no packed copy there ({path} is missing); moco.pack writes one"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = printable(str(error))
        raise InputError(f"{path}: not the index of a packed copy ({reason})") from error
    if version != 1:
        raise InputError(
            f"{path}: version {printable(str(version))} of a packed copy; "
            "this program reads version 1"
        )
    rename_old_keys(index)
    # A copy may come from elsewhere: nothing may rely on a key or a file name before this.
    check_keys(path, index, INDEX_KEYS)
    for number, part in enumerate(index["parts"]):
        check_keys(path, part, PART_KEYS, prefix=f"parts[{number}].")
    num_images = total_of_parts(index, "images")
    if index["complete"] and (index["num_images"] is None or index["num_images"] > num_images):
        raise InputError(
            f"{path}: num_images={index['num_images']}, and its parts hold {num_images}; "
            "pack it anew"
        )
    return index


def total_of_parts(index: Mapping[str, Any], key: str) -> int:
    """Return the sum of ``images`` or ``bytes`` over all parts of a copy."""
    return sum(part[key] for part in index["parts"])


def count_skipped(index: Mapping[str, Any]) -> int:
    """Return how many images a copy leaves out because they could not be read."""
    return sum(len(part["skipped"]) for part in index["parts"])


def rename_old_keys(index: dict[str, Any]) -> None:
    """Rename the keys of copies that an earlier version wrote, which said "pictures"."""
    if "num_pictures" in index:
        index["num_images"] = index.pop("num_pictures")
    sections = [index.get("source")]
    if isinstance(index.get("parts"), list):
        sections += index["parts"]
    for section in sections:
        if isinstance(section, dict) and "pictures" in section:
            section["images"] = section.pop("pictures")


def is_format(value: Any) -> bool:
    return value in ("array", "shards")


def is_boolean(value: Any) -> bool:
    return isinstance(value, bool)


def is_count(value: Any) -> bool:
    return type(value) is int and value >= 0  # isinstance would let True pass


def is_count_or_null(value: Any) -> bool:
    return value is None or is_count(value)


def is_size(value: Any) -> bool:
    return is_count(value) and value > 0


def has_quality(value: Any) -> bool:
    return isinstance(value, dict) and "quality" in value


def has_num_images(value: Any) -> bool:
    return isinstance(value, dict) and is_count(value.get("images"))


def is_list_of_sections(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, dict) for part in value)


def is_file_name(value: Any) -> bool:
    if not isinstance(value, str) or value in ("", ".", ".."):
        return False
    return "/" not in value and "\0" not in value


def is_list_of_skipped(value: Any) -> bool:
    """Return whether this is a list of [row, reason]."""
    if not isinstance(value, list):
        return False
    for entry in value:
        if not isinstance(entry, list) or len(entry) != 2:
            return False
        if not is_count(entry[0]) or not isinstance(entry[1], str):
            return False
    return True


Keys = Mapping[str, tuple[Callable[[Any], bool], str]]
"""For each key the check of its value, and what is expected in words."""
INDEX_KEYS: Keys = {
    "format": (is_format, "array or shards"),
    "complete": (is_boolean, "true or false"),
    "num_images": (is_count_or_null, "a number of images, or null"),
    "image_size": (is_size, "a number of px, 1 or more"),
    "settings": (has_quality, "settings, quality among them"),
    "source": (has_num_images, "its number of images"),
    "parts": (is_list_of_sections, "a list"),
}
PART_KEYS: Keys = {
    "file": (is_file_name, "the name of a file in this folder"),
    "stop": (is_count, "a number, 0 or more"),
    "images": (is_count, "a number, 0 or more"),
    "bytes": (is_count, "a number, 0 or more"),
    "skipped": (is_list_of_skipped, "a list of rows and reasons"),
}


def check_keys(path: Path, section: dict[str, Any], keys: Keys, prefix: str = "") -> None:
    """Raise InputError for the first key that is missing or has a wrong value."""
    for key, (is_valid, expected) in keys.items():
        if key not in section:
            raise InputError(f"{path}: {prefix}{key} is missing; pack it anew")
        if not is_valid(section[key]):
            got = printable(json.dumps(section[key]))[:80]
            raise InputError(f"{path}: {prefix}{key}={got}: expected {expected}; pack it anew")


def check_finished(root: str, index: dict[str, Any]) -> None:
    """Raise InputError if the copy is not complete."""
    if not index["complete"]:
        raise InputError(
            f"data.root={root}: not finished; "
            "start the same moco.pack again, which goes on where it stopped"
        )


def read_table(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an ``index.npz``, or of the table of one part.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        table, _ = read_arrays(path, (*ARRAYS, *SIDE_ARRAYS))
        check_table(table)
    except DAMAGED as error:
        reason = printable(str(error))
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise InputError(f"{path}: damaged ({reason}); pack it anew") from error
    return table


def check_table(table: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError for the first array that is missing or has a wrong type, shape or value."""
    for name, dtype in ARRAYS.items():
        if name not in table:
            raise ValueError(f"{name} is missing")
        if name in ("rows", "names"):
            check_array(name, table[name], dtype)
        else:
            check_array(name, table[name], dtype, length=len(table["rows"]))
    for name in ("lengths", "heights", "widths"):
        check_range(name, table[name], least=1)
    check_range("rows", table["rows"], least=0)
    check_range("offsets", table["offsets"], least=0)
    name_lengths = np.diff(table["name_ends"], prepend=0)
    if (name_lengths < 0).any() or name_lengths.sum() != len(table["names"]):
        raise ValueError("name_ends does not go with names")
    for side in SIDES:
        check_side(side, table)


def check_side(side: str, table: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError if rows and labels of ``bank`` or ``queries`` do not fit; both may miss."""
    rows = table.get(f"{side}_rows")
    labels = table.get(f"{side}_labels")
    if rows is None and labels is None:
        return
    if rows is None:
        raise ValueError(f"{side}_rows is missing")
    if labels is None:
        raise ValueError(f"{side}_labels is missing")
    check_array(f"{side}_rows", rows, np.int64)
    check_array(f"{side}_labels", labels, np.int64, length=len(rows))
    check_range(f"{side}_rows", rows, least=0, stop=len(table["rows"]))
    check_range(f"{side}_labels", labels, least=0)


def check_array(name: str, array: np.ndarray, dtype: Any, length: int | None = None) -> None:
    """Raise ValueError if the array is not one-dimensional of this type and, if given, length."""
    has_length = array.ndim == 1 and (length is None or len(array) == length)
    if array.dtype != dtype or not has_length:
        expected = f"{np.dtype(dtype)} ({'any' if length is None else length},)"
        raise ValueError(f"{name} is {array.dtype} {array.shape}, expected {expected}")


def check_range(name: str, array: np.ndarray, least: int, stop: int | None = None) -> None:
    """Raise ValueError if a number is below `least`, or is `stop` or more."""
    if stop is None:
        if (array < least).any():
            raise ValueError(f"{name} has numbers below {least}")
    elif (array < least).any() or (array >= stop).any():
        raise ValueError(f"{name} has numbers below {least} or above {stop - 1}")
