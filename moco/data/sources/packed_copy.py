"""A packed copy of a dataset, as moco.pack writes it: what is on disk, how it is checked and read.

A copy is a folder. ``index.json`` holds its format, settings, source, and its parts in order. With
the format ``array`` the pixels of all images, (height, width, bands) each, follow each other in
``pixels.bin``; with ``shards`` the parts are tar files of encoded images. ``index.npz`` says where
each image is. A copy may come from elsewhere, so both index files are checked before use.
"""

import json
import mmap
import os
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moco.data.files.archives import DAMAGED, read_arrays
from moco.data.files.images import DecodedImage, EncodedImage, encoded
from moco.data.files.listing import start_of
from moco.data.sources.source import DataSource, Images, Labelled
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
    "bands": np.int32,
    "types": np.int32,  # the place in TYPES
}
"""One-dimensional arrays of the table with an entry for each image."""
ARRAYS = (*COLUMNS, "names", "name_ends")
"""`COLUMNS`, the bytes of all names, and where each name ends."""
TYPES = (
    "uint8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64", "int8"
)  # fmt: skip
"""The types of pixels, little-endian in the file. A number in the table is a place in here."""
VERSIONS = (1, 2)  # 1: all images are 8-bit RGB, and the table does not say it
SIDES = ("bank", "queries")
SIDE_ARRAYS = (("bank_rows", "bank_labels"), ("queries_rows", "queries_labels"))
INDEX_KEYS = {
    "format": str,
    "complete": bool,
    "num_images": int | None,
    "image_size": int,
    "settings": dict,
    "source": dict,
    "parts": list,
}
PART_KEYS = {"file": str, "stop": int, "images": int, "bytes": int, "skipped": list}


@dataclass(eq=False)
class PackedImages(Images):
    """Images of a packed copy, read from memory-mapped files."""

    folder: str
    files: list[str]
    """Names of the files in `folder`: the shards, or the one file with all pixels."""
    table: dict[str, Tensor]
    """`ARRAYS` for all images of the copy, and ``parts``, the number of each one's file.

    Loader processes share a tensor's memory; arrays would be copied to each of them."""
    rows: Tensor
    """(images,) int64, which images of the copy these are."""
    max_image_pixels: int
    no_data: float | None = None
    """The value of pixels without data in an array."""
    band_names: tuple[str, ...] | None = None
    """Of the bands in an array."""
    maps: dict[int, mmap.mmap] = field(default_factory=dict)
    """The files that are mapped by this process, by number."""

    def __getstate__(self) -> dict[str, Any]:
        # A memory map cannot be sent to another process.
        return self.__dict__ | {"maps": {}}

    def __len__(self) -> int:
        return len(self.rows)

    def opened(self, index: int) -> EncodedImage:
        """Return a view of the pixels, or the encoded image of a shard."""
        content = self.content(index)
        # A copy has one file of pixels, or shards.
        if self.files != [PIXELS]:
            name = self.name(index)
            raw = self.reading.raw
            return encoded(bytes(content), name, self.max_image_pixels, raw=raw)
        shape = [self.entry(index, column) for column in ("heights", "widths", "bands")]
        type_name = TYPES[self.entry(index, "types")]
        dtype = np.dtype(type_name).newbyteorder("<")
        pixels = np.frombuffer(content, dtype=dtype).reshape(shape)
        return DecodedImage(pixels, self.no_data, self.band_names)

    def entry(self, index: int, column: str) -> int:
        """Return what a column of the table says about an image."""
        return int(self.table[column][self.rows[index]])

    def content(self, index: int) -> memoryview:
        """Return an image's bytes: its pixels, or its encoded file."""
        start = self.entry(index, "offsets")
        end = start + self.entry(index, "lengths")
        mapped = self.map_file(self.entry(index, "parts"))
        # A slice of the map itself would be a copy of the bytes.
        return memoryview(mapped)[start:end]

    def name(self, index: int) -> str:
        """Return the image's name in the source."""
        start = start_of(self.table["name_ends"], int(self.rows[index]))
        end = self.entry(index, "name_ends")
        name = self.table["names"][start:end].numpy().tobytes()
        # Names of files need not be UTF-8.
        return os.fsdecode(name)

    def subset(self, numbers: np.ndarray) -> "PackedImages":
        """Return the images at these places, (chosen,) int64."""
        return replace(self, rows=self.rows[torch.from_numpy(numbers)], maps={})

    def is_damaged(self, index: int) -> bool:
        """Return whether an image's bytes do not match their checksum."""
        return zlib.crc32(self.content(index)) != self.entry(index, "checksums")

    def map_file(self, number: int) -> mmap.mmap:
        """Return the content of the file at this place in `files`."""
        if number not in self.maps:
            # A copy may have more shards than a process may open files.
            if len(self.maps) == MAX_OPEN_FILES:
                del self.maps[next(iter(self.maps))]
            with open(os.path.join(self.folder, self.files[number]), "rb") as file:
                self.maps[number] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self.maps[number]


def packed_source(root: str, max_image_pixels: int) -> DataSource:
    """Return a folder that moco.pack wrote, with the labels of the copied source.

    Raises:
        InputError: the folder holds no copy, or the copy is not finished or is damaged.
    """
    index = read_finished_index(root)
    copy, table = read_copy(root, index, max_image_pixels)
    train = copy.subset(np.arange(index["num_images"]))
    # Copies of earlier versions name no classes.
    class_names = index.get("class_names")
    if class_names is not None:
        class_names = tuple(class_names)
    sets = label_sets_of(index)
    bank = read_side("bank", copy, train, table, class_names, sets)
    queries = read_side("queries", copy, train, table, class_names, sets)
    return DataSource(train, bank, queries, image_size=index["image_size"])


def read_side(
    side: str,
    copy: PackedImages,
    train: PackedImages,
    table: Mapping[str, np.ndarray],
    class_names: tuple[str, ...] | None,
    label_sets: np.ndarray | None,
) -> Labelled | None:
    """Return the copy's ``bank`` or ``queries``, or None if it has none."""
    if f"{side}_rows" not in table:
        return None
    rows = table[f"{side}_rows"]
    images = copy.subset(rows)
    if np.array_equal(rows, np.arange(len(train))):
        images = train  # the same object, so that it is cached once
    return Labelled(images, table[f"{side}_labels"], class_names, label_sets)


def label_sets_of(index: Mapping[str, Any]) -> np.ndarray | None:
    """Return the classes that each label stands for, see `Labelled`."""
    classes_of_labels = index.get("label_sets")
    if classes_of_labels is None:
        return None
    label_sets = np.zeros((len(classes_of_labels), index["num_classes"]), bool)
    for label, classes in enumerate(classes_of_labels):
        label_sets[label, classes] = True
    return label_sets


def read_copy(
    root: str, index: dict[str, Any], max_image_pixels: int
) -> tuple[PackedImages, dict[str, np.ndarray]]:
    """Return all images of a finished copy, and the arrays of its table.

    Raises:
        InputError: the copy is damaged; the message names the file.
    """
    path = Path(root, TABLE)
    table = read_table(path)
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for part in index["parts"]:  # several parts of an array are in one file
        counts[part["file"]] += part["images"]
        sizes[part["file"]] += part["bytes"]
    for file, size in sizes.items():
        file_path = Path(root, file)
        if not file_path.is_file() or file_path.stat().st_size != size:
            raise InputError(f"{file_path}: missing, or not of {size:,} bytes; pack it anew")
    num_images = list(counts.values())  # of each file
    size_of_file = np.repeat(list(sizes.values()), num_images)  # of each image
    goes_with_index = index["num_images"] <= len(size_of_file) == len(table["rows"])
    if goes_with_index:
        # A difference, because the sum of a damaged offset and a length could overflow.
        is_inside = table["lengths"] <= size_of_file - table["offsets"]
        goes_with_index = bool((is_inside & (table["offsets"] >= 0)).all())
    if not goes_with_index:
        raise InputError(f"{path}: does not go with {INDEX}; pack it anew")
    table["parts"] = np.repeat(np.arange(len(counts)), num_images)
    tensors = {}
    for name in (*ARRAYS, "parts"):
        tensors[name] = torch.from_numpy(table[name])
    rows = torch.arange(len(table["rows"]))
    band_names = index.get("band_names")
    if band_names is not None:
        band_names = tuple(map(str, band_names))
    copy = PackedImages(
        root,
        list(sizes),
        tensors,
        rows,
        max_image_pixels,
        index.get("no_data"),
        band_names,
    )
    return copy, table


def read_index(root: str) -> dict[str, Any]:
    """Return ``index.json`` of a copy, which may be unfinished.

    Raises:
        InputError: there is no copy, or its index is damaged or of another version.
    """
    path = Path(root, INDEX)
    try:
        text = path.read_text()
        # An earlier version wrote "pictures".
        text = text.replace('"pictures":', '"images":').replace('"num_pictures":', '"num_images":')
        index: dict[str, Any] = json.loads(text)
        version = index["version"]
    except FileNotFoundError as error:
        raise InputError(f"{root}: no packed copy there; moco.pack writes one") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = printable(str(error))
        raise InputError(f"{path}: not the index of a packed copy ({reason})") from error
    if version not in VERSIONS:
        there = printable(str(version))
        known = " and ".join(map(str, VERSIONS))
        raise InputError(f"{path}: version {there} of a packed copy; this program reads {known}")
    check_keys(path, index, INDEX_KEYS)
    for number, part in enumerate(index["parts"]):
        check_keys(path, part, PART_KEYS, prefix=f"parts[{number}].")
    return index


def check_keys(path: Path, section: Any, keys: Mapping[str, Any], prefix: str = "") -> None:
    """Raise InputError for the first key that is missing or has a value of another type."""
    for key, expected in keys.items():
        if not isinstance(section, dict) or key not in section:
            raise InputError(f"{path}: {prefix}{key} is missing; pack it anew")
        value = section[key]
        is_valid = isinstance(value, expected)
        if key == "file":  # nothing outside of the copy's folder is opened
            is_valid = value not in ("", ".", "..") and Path(str(value)).name == value
        if not is_valid:
            got = printable(json.dumps(value))[:80]
            raise InputError(f"{path}: {prefix}{key}={got}: not as moco.pack writes it")


def total_of_parts(index: Mapping[str, Any], key: str) -> int:
    """Return the sum of ``images`` or ``bytes`` over all parts of a copy."""
    return sum(part[key] for part in index["parts"])


def read_finished_index(root: str) -> dict[str, Any]:
    """Return ``index.json`` of a finished copy.

    Raises:
        InputError: as in `read_index`, or the copy is not finished.
    """
    index = read_index(root)
    if not index["complete"]:
        raise InputError(f"{root}: not finished; start the same moco.pack again, which goes on")
    return index


def read_table(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an ``index.npz``, or of the table of one part.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        table, _ = read_arrays(path, (*ARRAYS, *SIDE_ARRAYS[0], *SIDE_ARRAYS[1]))
        if "rows" in table and "types" not in table:  # of version 1
            table["bands"] = np.full(table["rows"].shape, 3, np.int32)
            table["types"] = np.zeros(table["rows"].shape, np.int32)
        check_table(table)
    except DAMAGED as error:
        raise InputError(f"{path}: damaged ({printable(str(error))}); pack it anew") from error
    return table


def check_table(table: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError for the first array that is missing or has a wrong type or length."""
    check_array(table, "names", np.uint8, like="names")  # any length
    for name, dtype in COLUMNS.items():
        check_array(table, name, dtype, like="rows")
    check_array(table, "name_ends", np.int64, like="rows")
    if ((table["types"] < 0) | (table["types"] >= len(TYPES)) | (table["bands"] < 1)).any():
        raise ValueError("types or bands are out of range")
    for rows, labels in SIDE_ARRAYS:
        if rows in table:
            check_array(table, rows, np.int64, like=rows)
            check_array(table, labels, np.int64, like=rows)
            last_row = len(table["rows"]) - 1
            if (table[rows] < 0).any() or (table[rows] > last_row).any():
                raise ValueError(f"{rows} has numbers below 0 or above {last_row}")


def check_array(table: Mapping[str, np.ndarray], name: str, dtype: Any, like: str) -> None:
    """Raise ValueError if an array is not one-dimensional, of this type, and as long as `like`."""
    if name not in table:
        raise ValueError(f"{name} is missing")
    array = table[name]
    shape = (table[like].size,)
    if array.dtype != dtype or array.shape != shape:
        expected = f"expected {dtype.__name__} {shape}"
        raise ValueError(f"{name} is {array.dtype} {array.shape}, {expected}")
