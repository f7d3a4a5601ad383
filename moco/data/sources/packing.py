"""What goes into a packed copy: every image of a source once, resized and encoded in worker processes, in chunks.

Letters: M images, H W pixels.
"""

import hashlib
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moco.data.augment.draws import derived_seed
from moco.data.files.decoding import EncodedFile, EncodedImage
from moco.data.files.images import UnreadableImage
from moco.data.loading.workers import CPU, loader_options, unchanged
from moco.data.sources.packed_index import COLUMNS, SIDES
from moco.data.sources.registry import DataSource, Images, Labelled
from moco.errors import printable

CHUNK = 8  # images that a worker hands over at once; of 50 megapixels each they take 1.2 GB
LARGEST_JPEG_SIDE = 65500  # px, libjpeg's


class Pool:
    """Every image of a source once: the `num_train` to train on, then those that only bank or queries have."""

    def __init__(self, source: DataSource) -> None:
        self.num_train = len(source.train)
        self.sets: list[Images] = [source.train]
        self.others: list[tuple[int, int]] = []  # set and index of each further row
        self.sides: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        """Rows and labels of bank and queries."""
        rows_of: dict[str, int] = {}
        for name in SIDES:
            side: Labelled | None = getattr(source, name)
            if side is not None:
                self.sides[name] = self._rows(side.images, rows_of), side.labels

    def _rows(self, images: Images, rows_of: dict[str, int]) -> np.ndarray:
        if images is self.sets[0]:
            return np.arange(self.num_train)
        if not rows_of:
            rows_of |= {self.sets[0].name(index): index for index in range(self.num_train)}
        self.sets.append(images)
        rows = []
        for index in range(len(images)):
            row = rows_of.setdefault(images.name(index), len(self))
            if row == len(self):
                self.others.append((len(self.sets) - 1, index))
            rows.append(row)
        return np.array(rows, dtype=np.int64)

    def __len__(self) -> int:
        return self.num_train + len(self.others)

    def _place(self, row: int) -> tuple[Images, int]:
        number, index = (0, row) if row < self.num_train else self.others[row - self.num_train]
        return self.sets[number], index

    def opened(self, row: int) -> EncodedImage:
        """See `Images`."""
        images, index = self._place(row)
        return images.opened(index)

    def name(self, row: int) -> str:
        images, index = self._place(row)
        return images.name(index)

    def labels(self) -> np.ndarray:
        """(M,) int64, -1 where there is none."""
        labels = np.full(len(self), -1, dtype=np.int64)
        for rows, known in self.sides.values():
            labels[rows] = known
        return labels

    def fingerprint(self) -> dict[str, Any]:
        """How many images there are, and a hash of their names and labels."""
        digest = hashlib.blake2b(self.labels().tobytes(), digest_size=16)
        for row in range(len(self)):
            digest.update(os.fsencode(self.name(row)) + b"\0")
        return {"images": len(self), "hash": digest.hexdigest()}


class Chunk(NamedTuple):
    """Images that are neighbours in the copy."""

    stop: int
    """The place in the copy's order after the last one."""
    content: Tensor
    """uint8: the bytes of all that could be read."""
    columns: dict[str, list[int]]
    """`COLUMNS` without the offsets, of those."""
    skipped: list[tuple[int, str]]
    """Row of the others, and what is wrong."""


@dataclass(frozen=True)
class Chunks(Dataset[Chunk]):
    """The worker's part of packing, asked for by (start, stop) in the copy's order.

    Args:
        order: (M,) int64, row of the pool at each place of the copy.
        resize: shorter side, px, of images that are larger; None keeps the size.
        quality: of JPEG, 1 to 100; None for plain pixels.
    """

    pool: Pool
    order: Tensor
    resize: int | None
    quality: int | None

    def __getitem__(self, place: tuple[int, int]) -> Chunk:
        start, stop = place
        columns: dict[str, list[int]] = {name: [] for name in COLUMNS if name != "offsets"}
        contents, skipped = [], []
        for row in self.order[start:stop].tolist():
            try:
                content, (height, width) = self.packed(self.pool.opened(row), self.pool.name(row))
            except UnreadableImage as error:
                skipped.append((row, str(error)))
                continue
            contents.append(content)
            values = (row, len(content), height, width, zlib.crc32(content))
            for name, value in zip(columns, values, strict=True):
                columns[name].append(value)
        joined = torch.frombuffer(bytearray(b"".join(contents) or b"\0"), dtype=torch.uint8)
        return Chunk(stop, joined, columns, skipped)

    def packed(self, image: EncodedImage, name: str) -> tuple[bytes, tuple[int, int]]:
        """What the copy holds of an image, and its height and width. A JPEG that keeps its size is copied as it is.

        Raises:
            UnreadableImage: it cannot be decoded, or no JPEG can be that large.
        """
        pixels = resized(image, self.resize)
        height, width = pixels.shape[:2]
        if self.quality is None:
            return pixels.tobytes(), (height, width)
        is_jpeg = (
            isinstance(image, EncodedFile) and image.is_jpeg and isinstance(image.source, bytes)
        )
        if is_jpeg and image.size == (height, width):
            return image.source, (height, width)  # type: ignore[attr-defined]
        if max(height, width) > LARGEST_JPEG_SIDE:
            raise UnreadableImage(
                f"{printable(name)}: {width} x {height} px, and JPEG has at most {LARGEST_JPEG_SIDE} a side; set data.resize"
            )
        encoded: bytes = simplejpeg.encode_jpeg(
            np.ascontiguousarray(pixels), self.quality, colorsubsampling="420"
        )
        return encoded, (height, width)


def resized(image: EncodedImage, resize: int | None) -> np.ndarray:
    """The pixels, (H, W, 3) uint8, the shorter side brought down to `resize` px, bicubic, antialiased."""
    height, width = resized_size(image.size, resize)
    if (height, width) == image.size:
        return image.pixels()
    whole = Image.fromarray(image.pixels())
    return np.asarray(whole.resize((width, height), Image.Resampling.BICUBIC))


def resized_size(size: tuple[int, int], resize: int | None) -> tuple[int, int]:
    """Height and width with a shorter side of at most `resize` px, the aspect kept."""
    shorter = min(size)
    if resize is None or shorter <= resize:
        return size
    return round(size[0] * resize / shorter), round(size[1] * resize / shorter)


def array_bytes(pool: Pool, resize: int | None, sample: int = 256) -> int:
    """About how many bytes the pixels of all images take, by the sizes of some of them."""
    sizes = []
    for row in np.linspace(0, len(pool) - 1, min(sample, len(pool)), dtype=int).tolist():
        try:
            height, width = resized_size(pool.opened(row).size, resize)
        except UnreadableImage:
            continue
        sizes.append(3 * height * width)
    return int(np.mean(sizes) * len(pool)) if sizes else 0


def chunks(
    pool: Pool, start: int, resize: int | None, quality: int | None, num_workers: int
) -> DataLoader[Chunk]:
    """Loads every chunk of a copy from place `start` on; the other arguments as of `Chunks`."""
    dataset = Chunks(pool, order(pool, is_random=quality is not None), resize, quality)
    options = loader_options(num_workers, CPU) | {"persistent_workers": False}
    return DataLoader(
        dataset, batch_size=None, sampler=list(places(pool, start)), collate_fn=unchanged, **options
    )


def order(pool: Pool, is_random: bool) -> Tensor:
    """Row of the pool at each place of a copy: of arrays in the source's order, of shards in a fixed random one.

    A stream mixes neighbours only, and in sorted folders those are of one kind.
    """
    if not is_random:
        return torch.arange(len(pool))
    generator = torch.Generator().manual_seed(derived_seed(0, pool.num_train))
    return torch.cat(
        [
            torch.randperm(pool.num_train, generator=generator),
            torch.arange(pool.num_train, len(pool)),
        ]
    )


def places(pool: Pool, start: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of every chunk; none has images to train on and others."""
    while start < len(pool):
        end = pool.num_train if start < pool.num_train else len(pool)
        stop = min(start + CHUNK, end)
        yield start, stop
        start = stop
