"""Writing a packed copy: which images go in, how workers prepare them, and parts that resume.

A part is on disk as a whole or not at all, so an interrupted copy goes on after its last part.
`moco.data.sources.packed_copy` describes the files.
"""

import io
import json
import logging
import math
import mmap
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from moco.data.augment.draws import derived_seed
from moco.data.files.images import EncodedFile, EncodedImage, UnreadableImage, check_bad_fraction
from moco.data.loading.every_image import ReadImage, every_image
from moco.data.loading.workers import WatchedLoader, unchanged
from moco.data.sources.own_dataset import NO_NUMBERS, IterableImages
from moco.data.sources.packed_copy import (
    COLUMNS,
    INDEX,
    PIXELS,
    SIDES,
    TABLE,
    TYPES,
    VERSIONS,
    read_copy,
    read_finished_index,
    read_index,
    read_table,
    total_of_parts,
)
from moco.data.sources.pixel_values import RGB_BANDS, band_indices, checked_selection
from moco.data.sources.sample import chosen_bands
from moco.data.sources.shards import NO_INDEX, ShardedImages
from moco.data.sources.source import DataSource, Images, Labelled
from moco.errors import InputError, RunError, printable
from moco.phases import phase

log = logging.getLogger(__name__)

LOCK = ".lock"
PARTS = "parts"  # a folder with the tables of the parts, until all parts are there
IMAGES_PER_CHUNK = 8  # a worker returns these at once: 1.2 GB if they have 50 megapixels each
NUM_SIZES = 256  # images whose size is read to estimate the size of an array
MAX_NAMED = 10  # damaged images that a message names
FREE_SETTINGS = ("data.download", "data.max_bad_fraction", "data.max_image_pixels")
"""Settings that may change when a copy goes on: they change no image."""


class Pool:
    """Every image of a source once: first those to train on, then those of bank or queries alone.

    A row is a number from 0 on that stands for one of these images.

    Raises:
        InputError: the source is a stream without images by number.
    """

    def __init__(self, source: DataSource) -> None:
        if isinstance(source.train, ShardedImages):
            raise InputError(NO_INDEX)
        if isinstance(source.train, IterableImages):
            raise InputError(f"{source.train.where}: {NO_NUMBERS}")
        self.source = source
        self.num_train = len(source.train)
        self.others: list[tuple[Images, int]] = []
        """For each row after the training images, its set and its index in there."""
        self.sides: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        """Rows and labels of ``bank`` and ``queries``."""
        row_of_name: dict[str, int] = {}
        for name in SIDES:
            side: Labelled | None = getattr(source, name)
            if side is not None:
                self.sides[name] = (self._find_rows(side.images, row_of_name), side.labels)

    def _find_rows(self, images: Images, row_of_name: dict[str, int]) -> np.ndarray:
        """Return the rows of a side's images; images with a new name get a new row."""
        if images is self.source.train:
            return np.arange(self.num_train)
        # Bank or queries may be a part of the training images: their names tell.
        if not row_of_name:
            for row in range(self.num_train):
                row_of_name[self.name(row)] = row
        rows = []
        for index in range(len(images)):
            row = row_of_name.setdefault(images.name(index), len(self))
            if row == len(self):
                self.others.append((images, index))
            rows.append(row)
        return np.array(rows, dtype=np.int64)

    def __len__(self) -> int:
        return self.num_train + len(self.others)

    def _find_image(self, row: int) -> tuple[Images, int]:
        if row < self.num_train:
            return self.source.train, row
        return self.others[row - self.num_train]

    def __getitem__(self, row: int) -> EncodedImage:
        """Return the image, not yet decoded. Raises `UnreadableImage`."""
        images, index = self._find_image(row)
        return images.opened(index)

    def name(self, row: int) -> str:
        """See `Images`."""
        images, index = self._find_image(row)
        return images.name(index)

    def labels(self) -> np.ndarray:
        """Return the label of each row, int64, -1 where there is none."""
        labels = np.full(len(self), -1, dtype=np.int64)
        for rows, side_labels in self.sides.values():
            labels[rows] = side_labels
        return labels

    def class_names(self) -> tuple[str, ...] | None:
        """Return the names of the classes by number, or None if they have none."""
        bank = self.source.bank
        if bank is None:
            return None
        return bank.class_names

    def label_sets(self) -> list[list[int]] | None:
        """Return the numbers of the classes that each label stands for, see `Labelled`."""
        bank = self.source.bank
        if bank is None or bank.label_sets is None:
            return None
        return [np.flatnonzero(classes).tolist() for classes in bank.label_sets]

    def num_classes(self) -> int | None:
        """Return the number of classes of images with several classes each."""
        bank = self.source.bank
        if bank is None or bank.label_sets is None:
            return None
        return int(bank.label_sets.shape[1])

    def fingerprint(self) -> dict[str, Any]:
        """Return the number of images, and a hash of their names and labels."""
        digest = blake2b(self.labels().tobytes(), digest_size=16)
        for row in range(len(self)):
            # The zero keeps the names a, bc apart from ab, c.
            digest.update(os.fsencode(self.name(row)) + b"\0")
        return {"images": len(self), "hash": digest.hexdigest()}


class Packed(NamedTuple):
    """What a copy stores of an image, and what its table says about it."""

    content: bytes
    height: int
    width: int
    checksum: int
    bands: int
    type: int
    """The place in `TYPES`."""
    ending: str
    """Of a member of a shard."""


def pack_image(
    resize: int | None,
    quality: int | None,
    selection: tuple[int | str, ...] | None,
    image: EncodedImage,
) -> Packed:
    """Return what a copy stores of an image.

    A JPEG that keeps its size is copied as it is. Images other than 8-bit RGB become TIFF files in
    shards. The filter of the resizing is bicubic and antialiased.

    Args:
        resize: larger images are resized to this shorter side, px; None keeps the size.
        quality: of JPEGs, 1 to 100; None stores plain pixels.
        selection: the bands to take, see `band_indices`; None takes all.

    Raises:
        UnreadableImage: the image is damaged, or has a type or a size that a copy cannot hold.
    """
    height, width = resized_size(image.size, resize)
    keeps_size = (height, width) == image.size
    name = printable(getattr(image, "name", "an image in memory"))
    # A JPEG is decoded even if it is copied as it is: a damaged one is left out.
    pixels = image.pixels()
    if selection is not None:
        try:
            pixels = pixels[:, :, band_indices(selection, pixels.shape[2], image.band_names)]
        except ValueError as error:
            raise UnreadableImage(f"{name}: {error}") from error
    if pixels.dtype.name not in TYPES:
        raise UnreadableImage(f"{name}: a copy holds no pixels of {pixels.dtype}")
    if not keeps_size:
        pixels = resized(pixels, height, width)
    pixels = np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("<"))
    is_rgb = pixels.dtype == np.uint8 and pixels.shape[2] == RGB_BANDS
    ending = "jpg" if is_rgb else "tif"
    jpeg = whole_jpeg(image)
    if quality is None:
        content = pixels.tobytes()
    elif not is_rgb:
        content = tiff_of(pixels)
    elif keeps_size and selection is None and jpeg is not None:
        content = jpeg  # encoding it anew would lose quality
    else:
        try:
            content = simplejpeg.encode_jpeg(pixels, quality, colorsubsampling="420")
        except ValueError as error:  # a side is longer than JPEG allows
            raise UnreadableImage(f"{name}: {error}; set data.resize") from error
    checksum = zlib.crc32(content)
    type_number = TYPES.index(pixels.dtype.name)
    return Packed(content, height, width, checksum, pixels.shape[2], type_number, ending)


def whole_jpeg(image: EncodedImage) -> bytes | None:
    """Return the bytes of a JPEG in memory, which can be copied; None for any other image."""
    if isinstance(image, EncodedFile) and image.is_jpeg and isinstance(image.source, bytes):
        return image.source
    return None


def resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return pixels (height, width, bands) in another size and of the same type."""
    if pixels.dtype == np.uint8 and pixels.shape[2] == RGB_BANDS:
        image = Image.fromarray(np.ascontiguousarray(pixels))
        return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    # In float64, which holds all values of 32 bits.
    images = torch.from_numpy(pixels.astype(np.float64)).permute(2, 0, 1)[None]
    smaller = F.interpolate(images, (height, width), mode="bicubic", antialias=True)
    values = smaller[0].permute(1, 2, 0).numpy()
    if np.issubdtype(pixels.dtype, np.integer):
        # Bicubic interpolation overshoots at edges.
        limits = np.iinfo(pixels.dtype)
        values = np.rint(values).clip(limits.min, limits.max)
    return values.astype(pixels.dtype)


def tiff_of(pixels: np.ndarray) -> bytes:
    """Return pixels (height, width, bands) as a TIFF file, compressed without loss."""
    import tifffile

    file = io.BytesIO()
    tifffile.imwrite(
        file, pixels, planarconfig="contig", photometric="minisblack", compression="zlib"
    )
    return file.getvalue()


def resized_size(size: tuple[int, int], resize: int | None) -> tuple[int, int]:
    """Return (height, width) with a shorter side of at most `resize` px and the same aspect."""
    height, width = size
    shorter = min(size)
    if resize is None or shorter <= resize:
        return size
    return round(height * resize / shorter), round(width * resize / shorter)


def chunk_loader(
    pool: Pool, index: Mapping[str, Any], start: int, num_workers: int
) -> WatchedLoader:
    """Return a loader of every chunk of a copy from place `start` on, see `CopyWriter.add`."""
    is_array = index["format"] == "array"
    settings = index["settings"]
    quality = None
    if not is_array:
        quality = settings["quality"]
    selection = checked_selection(chosen_bands(settings["data"]))
    make = partial(pack_image, settings["data"]["resize"], quality, selection)
    order = torch.arange(len(pool))
    if not is_array:
        # Training from shards only mixes neighbours, and the neighbours in sorted folders are
        # alike. The random order is always the same.
        generator = torch.Generator().manual_seed(derived_seed(0, pool.num_train))
        order[: pool.num_train] = torch.randperm(pool.num_train, generator=generator)
    chunks = chunks_of_rows(order, start, [pool.num_train, len(pool)])
    return every_image(pool, make, unchanged, chunks, num_workers)


def chunks_of_rows(order: Tensor, start: int, borders: list[int]) -> Iterator[list[int]]:
    """Yield the rows of each chunk; no chunk has training images and others.

    Args:
        order: (images,) int64, the row of the pool at each place of the copy.
        borders: the places where the training images and the others end.
    """
    for border in borders:
        while start < border:
            stop = min(start + IMAGES_PER_CHUNK, border)
            yield order[start:stop].tolist()
            start = stop


class Part:
    """The part that is being written: the next bytes of a file.

    Args:
        start: where the part starts; what an unfinished part left after it goes.
    """

    def __init__(self, path: Path, start: int = 0) -> None:
        # Appending keeps the parts that are in the file; "wb" would cut it to nothing.
        self.file = path.open("a+b")
        self.file.truncate(start)
        self.file.seek(start)
        self.start = start
        self.entries: list[tuple[int, ...]] = []
        """`COLUMNS` of each image."""
        self.skipped: list[tuple[int, str]] = []
        """Rows of unreadable images, and the reasons."""

    @property
    def num_bytes(self) -> int:
        """How many bytes the part has."""
        return self.file.tell() - self.start

    def add(self, content: bytes, place: int, label: int, ending: str) -> int:
        """Write the image at this place of the copy; return its offset in the file."""
        offset = self.file.tell()
        self.file.write(content)
        return offset

    def close(self) -> dict[str, Any]:
        """Put the part on disk; return what the index says about it."""
        size = self.num_bytes
        sync_and_close(self.file)
        return {"file": PIXELS, "bytes": size}


class ShardPart(Part):
    """A tar file in webdataset's layout: KEY.jpg or KEY.tif for an image, KEY.cls for its label."""

    def __init__(self, path: Path) -> None:
        # A shard gets its name when it is whole.
        super().__init__(temporary_path(path))
        self.path = path
        self.archive = tarfile.TarFile(fileobj=self.file, mode="w", format=tarfile.USTAR_FORMAT)

    def add(self, content: bytes, place: int, label: int, ending: str) -> int:
        """See `Part`."""
        # USTAR's header is one block.
        offset = self.file.tell() + tarfile.BLOCKSIZE
        self._add_member(f"{place:09}.{ending}", content)
        if label >= 0:
            self._add_member(f"{place:09}.cls", str(label).encode())
        return offset

    def _add_member(self, name: str, content: bytes) -> None:
        header = tarfile.TarInfo(name)
        header.size = len(content)
        self.archive.addfile(header, io.BytesIO(content))

    def close(self) -> dict[str, Any]:
        """See `Part`."""
        self.archive.close()
        self.file.flush()
        with mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            digest = sha256(content).hexdigest()
        entry = super().close()
        os.replace(temporary_path(self.path), self.path)
        return entry | {"file": self.path.name, "sha256": digest}


class CopyWriter:
    """Writes a copy from where its index stops; `close` drops a part that is not whole.

    Args:
        index: see `open_copy`. A part ends with the chunk that reaches its ``max_shard_bytes``.
        max_bad_fraction: see `check_bad_fraction`.

    Raises:
        InputError: too many images cannot be read.
    """

    def __init__(
        self, folder: Path, index: dict[str, Any], pool: Pool, max_bad_fraction: float
    ) -> None:
        self.folder = folder
        self.index = index
        self.pool = pool
        self.max_bad_fraction = max_bad_fraction
        self.labels = pool.labels()
        self.part: Part | None = None
        self.num_packed = total_of_parts(index, "images")
        self.num_done = 0
        """The place in the copy after the last image, skipped ones included."""
        self.skipped_names: list[str] = []
        for part in index["parts"]:
            self.num_done = part["stop"]
            for row, _ in part["skipped"]:
                self.skipped_names.append(pool.name(row))
        check_bad_fraction(self.skipped_names, len(pool), max_bad_fraction)
        (folder / PARTS).mkdir(exist_ok=True)
        if self.num_done > 0:
            log.info("going on after %s of %s images", f"{self.num_done:,}", f"{len(pool):,}")

    def close(self) -> None:
        """Close the file of an open part."""
        if self.part is not None:
            self.part.file.close()

    def add(self, chunk: list[ReadImage]) -> None:
        """Write a chunk. End the part if it is full, or if the next chunk is not to train on.

        Args:
            chunk: neighbours in the copy, each with its row and the result of `pack_image`.

        Raises:
            InputError: too many images cannot be read.
        """
        if self.part is None:
            self.part = self._begin_part()
        part = self.part
        for image in chunk:
            if image.problem:
                log.warning("skipped an unreadable image: %s", image.problem)
                part.skipped.append((image.key, image.problem))
                self.skipped_names.append(image.name)
                continue
            content, *others, ending = image.value
            # A member of a shard is named by its place in the copy, so all names differ.
            offset = part.add(content, self.num_packed, self.labels[image.key], ending)
            part.entries.append((image.key, offset, len(content), *others))
            self.num_packed += 1
        check_bad_fraction(self.skipped_names, len(self.pool), self.max_bad_fraction)
        self.num_done += len(chunk)
        # Training images and others are in different parts: webdataset reads the first alone.
        is_full = part.num_bytes >= self.index["settings"]["max_shard_bytes"]
        if is_full or self.num_done in (self.pool.num_train, len(self.pool)):
            self._end_part(part)
            self.part = None

    def _begin_part(self) -> Part:
        if self.index["format"] == "array":
            return Part(self.folder / PIXELS, start=total_of_parts(self.index, "bytes"))
        prefix = "train-"
        if self.num_done >= self.pool.num_train:
            prefix = "held_out-"
        # Training images and others are numbered from 0 each.
        number = sum(part["file"].startswith(prefix) for part in self.index["parts"])
        return ShardPart(self.folder / f"{prefix}{number:05}.tar")

    def _end_part(self, part: Part) -> None:
        # First the part, then its table, last the index: a crash in between leaves no trace there.
        entry = part.close()
        columns = np.array(part.entries, np.int64).reshape(-1, len(COLUMNS)).T
        table = {}
        for (name, dtype), values in zip(COLUMNS.items(), columns, strict=True):
            table[name] = values.astype(dtype)
        names = [os.fsencode(self.pool.name(row)) for row in table["rows"].tolist()]
        lengths = list(map(len, names))
        table["names"] = np.frombuffer(b"".join(names), np.uint8)
        table["name_ends"] = np.cumsum(lengths, dtype=np.int64)
        save_table(self._table_path(len(self.index["parts"])), table)
        entry |= {"stop": self.num_done, "images": len(names), "skipped": part.skipped}
        self.index["parts"].append(entry)
        write_index(self.folder, self.index)

    def _table_path(self, number: int) -> Path:
        return self.folder / PARTS / f"{number:05}.npz"

    def finish(self) -> None:
        """Join the tables of the parts, and mark the copy as complete."""
        with phase("finishing the copy", unit=""):
            self._finish()

    def _finish(self) -> None:
        tables = []
        for number in range(len(self.index["parts"])):
            tables.append(read_table(self._table_path(number)))
        # Offsets stay as they are: they count from the start of a file, and not of a part.
        joined = {}
        for name in (*COLUMNS, "names"):
            joined[name] = np.concatenate([table[name] for table in tables])
        name_lengths = [np.diff(table["name_ends"], prepend=0) for table in tables]
        joined["name_ends"] = np.cumsum(np.concatenate(name_lengths), dtype=np.int64)
        place_of_row = np.full(len(self.pool), -1, dtype=np.int64)  # -1: skipped
        place_of_row[joined["rows"]] = np.arange(len(joined["rows"]))
        for side, (rows, labels) in self.pool.sides.items():
            # In the copy's order and without skipped images.
            places = place_of_row[rows]
            is_there = places >= 0
            order = np.argsort(places[is_there], kind="stable")
            joined[f"{side}_rows"] = places[is_there][order]
            joined[f"{side}_labels"] = labels[is_there][order]
        save_table(self.folder / TABLE, joined)
        self.index["num_images"] = int((joined["rows"] < self.pool.num_train).sum())
        self.index["complete"] = True
        write_index(self.folder, self.index)
        shutil.rmtree(self.folder / PARTS)


def prepare_folder(folder: Path) -> None:
    """Make the folder of a copy.

    Raises:
        InputError: that fails, or the folder holds files that are not of a copy.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output={folder}: {error.strerror}") from error
    left_by_a_crash = {LOCK, temporary_path(folder / INDEX).name}
    names = set(os.listdir(folder))
    if INDEX not in names and names - left_by_a_crash:
        raise InputError(f"output={folder}: holds other files; choose an empty folder or a new one")


def open_copy(folder: Path, settings: dict[str, Any], pool: Pool) -> dict[str, Any]:
    """Return the index of the copy in a folder, or write and return that of a new copy.

    Args:
        settings: what must stay the same while a copy is written: ``data``, the settings of the
            source; ``format``, ``max_shard_bytes`` and ``quality``.

    Raises:
        InputError: the folder holds a copy of another source or with other settings.
    """
    fingerprint = pool.fingerprint()
    if not (folder / INDEX).exists():
        resize = settings["data"]["resize"]
        image_size = min(pool.source.image_size, resize or pool.source.image_size)
        chosen_format = choose_format(settings["format"], folder, pool, resize)
        index: dict[str, Any] = {
            "version": VERSIONS[-1],
            "format": chosen_format,
            "complete": False,
            "num_images": None,
            "image_size": image_size,
            "settings": settings | {"format": chosen_format},
            "class_names": pool.class_names(),
            "label_sets": pool.label_sets(),
            "num_classes": pool.num_classes(),
            "source": fingerprint,
            "parts": [],
        } | file_traits(pool)
        write_index(folder, index)
        return index
    index = read_index(str(folder))
    different = different_settings(index, settings)
    if not different and index["source"] != fingerprint:
        num_there = index["source"]["images"]
        different = [f"the source: {num_there} images there, {len(pool)} here, or others"]
    if different:
        what = "; ".join(different)
        raise InputError(f"output={folder}: holds another copy: {what}; choose another folder")
    if index["complete"]:
        log.info("%s is complete; check=true compares it with its checksums", folder)
    return index


def file_traits(pool: Pool) -> dict[str, Any]:
    """Return what the first readable file says about its bands, which an array does not hold."""
    for row in range(min(NUM_SIZES, len(pool))):
        with suppress(UnreadableImage):
            image = pool[row]
            no_data = image.no_data
            if no_data is not None and not math.isfinite(no_data):
                no_data = None  # NaN is no data anyway
            names = None
            if image.band_names is not None:
                names = list(image.band_names)
            return {"band_names": names, "no_data": no_data}
    return {"band_names": None, "no_data": None}


def different_settings(index: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Return ``key: old there, new here`` for each setting that differs from a copy's."""
    there = flatten_settings(index["settings"])
    here = flatten_settings(settings)
    # What "auto" means was settled when the copy began.
    if here["format"] == "auto":
        here["format"] = index["format"]
    if index["format"] == "array":  # an array does not use the quality
        here["quality"] = there["quality"]
    different = []
    for key, value in here.items():
        if key not in FREE_SETTINGS and there.get(key) != value:
            different.append(f"{key}: {there.get(key)} there, {value} here")
    return different


def flatten_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in one dict; those of the source get the keys ``data.NAME``."""
    flat = dict(settings)
    for key, value in flat.pop("data").items():
        flat[f"data.{key}"] = value
    return flat


def write_index(folder: Path, index: Mapping[str, Any]) -> None:
    """Write ``index.json``."""
    replace_file(folder / INDEX, json.dumps(index, indent=1).encode())


def save_table(path: Path, table: Mapping[str, np.ndarray]) -> None:
    """Write an .npz file."""
    file = io.BytesIO()
    np.savez(file, **table)  # type: ignore[arg-type]
    replace_file(path, file.getvalue())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all: it gets its name when it is on disk."""
    temporary = temporary_path(path)
    with temporary.open("wb") as file:
        file.write(content)
        sync_and_close(file)
    os.replace(temporary, path)


def temporary_path(path: Path) -> Path:
    """Return where a file is written first; what a crash leaves there is overwritten later."""
    return path.with_name(f".{path.name}.tmp")


def sync_and_close(file: BinaryIO) -> None:
    """Wait until a file's content is on disk, and close the file."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def choose_format(wanted: str, folder: Path, pool: Pool, resize: int | None) -> str:
    """Return ``array`` or ``shards``; ``auto`` is array if that fits half of the free disk space.

    Raises:
        InputError: an array is wanted and the disk is too small.
    """
    if wanted == "shards":
        return wanted
    free = shutil.disk_usage(folder).free
    needed = estimate_array_bytes(pool, resize)
    room = f"an array takes about {needed / 1e9:,.2f} GB, and {free / 1e9:,.1f} GB are free"
    if wanted == "array" and needed > free:
        less = "format=shards or a smaller data.resize takes less"
        raise InputError(f"output={folder}: {room}; {less}")
    if wanted == "array":
        return wanted
    chosen = "array" if needed < free / 2 else "shards"
    log.info("format=%s: %s", chosen, room)
    return chosen


def estimate_array_bytes(pool: Pool, resize: int | None) -> int:
    """Return about how many bytes the pixels of all images take, by the sizes of some of them."""
    # Images in equal distances, since neighbours in a folder are often of one size.
    num_sizes = min(NUM_SIZES, len(pool))
    sizes = []
    for row in np.linspace(0, len(pool) - 1, num_sizes, dtype=int).tolist():
        with suppress(UnreadableImage):
            image = pool[row]
            bytes_per_pixel = image.bands * image.dtype.itemsize
            num_pixels = math.prod(resized_size(image.size, resize))
            sizes.append(bytes_per_pixel * num_pixels)
    return int(np.mean(sizes or [0]) * len(pool))


def check_copy(folder: Path, pool: Pool) -> Iterator[int]:
    """Compare a copy with its source's names and labels, and with its checksums.

    Yields:
        The number of images compared so far.

    Raises:
        InputError: there is no finished copy.
        RunError: something differs; the message names the first images or shards.
    """
    index = read_finished_index(str(folder))
    if index["source"] != pool.fingerprint():
        num_there = index["source"].get("images")
        numbers = f"{num_there} images, and the source has {len(pool)}, or others"
        raise RunError(f"{folder}: made of {numbers}; pack it anew")
    copy, _ = read_copy(str(folder), index, max_image_pixels=1)  # nothing is decoded
    damaged = []
    for number in range(len(copy)):
        if copy.is_damaged(number):
            damaged.append(printable(copy.name(number)))
        yield number + 1
    if not damaged and index["format"] == "shards":
        for number, part in enumerate(index["parts"]):
            if sha256(copy.map_file(number)).hexdigest() != part.get("sha256"):
                damaged.append(f"bytes between the images of {part['file']}")
    if damaged:
        named = ", ".join(damaged[:MAX_NAMED])
        raise RunError(f"{folder}: not as it was written in {len(damaged)} places: {named}")
    log.info("%s: everything is as it was written", folder)


def describe_copy(index: Mapping[str, Any], pool: Pool) -> list[tuple[str, str]]:
    """Return what a finished copy holds, as rows of a table."""
    gigabytes = total_of_parts(index, "bytes") / 1e9
    resize = index["settings"]["data"]["resize"]
    size = "as it was"
    if resize is not None:
        size = f"shorter side at most {resize} px"
    num_skipped = 0
    for part in index["parts"]:
        num_skipped += len(part["skipped"])
    return [
        ("images", f"{index['num_images']:,} to train on, {num_skipped} unreadable left out"),
        ("labels", ", ".join(pool.sides) or "none"),
        ("format", f"{index['format']}, {gigabytes:,.2f} GB in {len(index['parts'])} parts"),
        ("size", size),
    ]
