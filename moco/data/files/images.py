"""Reading images of any format, bands and type, and masks.

The first bytes of a file say which reader reads it, not its ending. An image of 8 bits that is
grey, has a palette, RGB, CMYK or alpha becomes RGB, (height, width, 3) uint8, with transparent
pixels over white. Every other image keeps its bands, its type and its values.

The size, the bands and the type of an image are known before anything is decoded.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import numpy as np

from moco.data.files import array_files, deep_images, dicom, jpeg_images, pillow_images, tiff
from moco.data.files.encoded_image import (
    MAX_IMAGE_PIXELS,
    NO_LIMIT,
    DecodedImage,
    EncodedImage,
    ImageHeader,
    Request,
    UnreadableImage,
    Window,
    check_bad_fraction,
    check_memory,
    check_regular_file,
    errors_named,
    first_bytes,
)
from moco.data.files.formats import FIRST_BYTES, FORMAT_OF_NAME, Format, recognised
from moco.data.files.pillow_images import opened, pillow_warnings_ignored, to_rgb

__all__ = [
    "MAX_IMAGE_PIXELS",
    "DecodedImage",
    "EncodedFile",
    "EncodedImage",
    "FileHeader",
    "UnreadableImage",
    "check_bad_fraction",
    "decoded_mask",
    "encoded",
    "encoded_file",
    "header",
    "image_size",
    "opened",
    "pillow_warnings_ignored",
    "read_mask",
    "read_window",
    "to_rgb",
]

READERS: dict[str, ModuleType] = {
    "jpeg": pillow_images,  # those that `jpeg_images` found damaged
    "pillow": pillow_images,
    "deep": deep_images,
    "tiff": tiff,
    "numpy": array_files,
    "dicom": dicom,
}
# Bytes. Larger files are read piece by piece, so that they cannot fill the memory.
LARGEST_READ_WHOLE = 2**28


class FileHeader(NamedTuple):
    """What is known of an image file before it is decoded."""

    size: tuple[int, int]
    """(height, width) of the first image, px, the right way up."""
    bands: int
    dtype: np.dtype
    pages: int
    """The number of images in the file."""


@dataclass(frozen=True)
class EncodedFile:
    """An `EncodedImage` in the format of a file."""

    request: Request
    format: Format
    reader: str
    """One of `READERS`."""
    header: ImageHeader

    @property
    def source(self) -> bytes | str:
        """The content of a file, or the path of a file that is not held in memory."""
        return self.request.source

    @property
    def name(self) -> str:
        """The name for messages."""
        return self.request.name

    @property
    def size(self) -> tuple[int, int]:
        """(height, width), px, after the orientation of EXIF."""
        return self.header.size

    @property
    def bands(self) -> int:
        """The number of bands."""
        return self.header.bands

    @property
    def dtype(self) -> np.dtype:
        """The type of the pixels."""
        return self.header.dtype

    @property
    def no_data(self) -> float | None:
        """The value that stands for missing pixels, if the file says one."""
        return self.header.no_data

    @property
    def band_names(self) -> tuple[str, ...] | None:
        """The names of the bands, if the file has them."""
        return self.header.band_names

    @property
    def is_jpeg(self) -> bool:
        """Whether `source` is a JPEG."""
        return self.format.name == "JPEG"

    def pixels(self) -> np.ndarray:
        """Return the pixels, see `EncodedImage`."""
        if self.reader == "jpeg":
            with suppress(ValueError):
                return jpeg_images.read_pixels(self.request, self.header)
        with pillow_warnings_ignored(), errors_named(self.name, self.request.max_image_pixels):
            pixels = READERS[self.reader].read_pixels(self.request, self.header)
            return finished(pixels, self.header)


def encoded(
    source: bytes | str,
    name: str,
    max_image_pixels: int,
    page: int | None = 0,
    *,
    raw: bool = False,
    window: bool = False,
) -> EncodedFile:
    """Read the header of an image.

    Args:
        source: the content of a file, or its path. The pixels of a path are read later.
        name: for messages.
        max_image_pixels: an image is unreadable if it takes more memory than 8-bit RGB of so many
            pixels.
        page: the number of the image in a file with several, counted from 0. None joins all of
            them as the bands of one image.
        raw: whether 8-bit images keep the bands of the file: grey 1, RGB 3, RGBA 4. A palette gives
            its colours.
        window: whether a grey DICOM image goes through the window of its file, which gives float32
            from 0 to 1.

    Raises:
        UnreadableImage: the file is missing, empty, too large or not an image. Damaged pixels are
            found when they are decoded.
    """
    request = Request(source, name, max_image_pixels, page, raw, window)
    jpeg = jpeg_images.read_header(request)
    if jpeg is not None:
        return EncodedFile(request, FORMAT_OF_NAME["JPEG"], "jpeg", jpeg)
    with pillow_warnings_ignored(), errors_named(name, max_image_pixels):
        known, reader = identified(source)
        image = EncodedFile(request, known, reader, read_header(request, reader))
        check_memory(image.header, max_image_pixels)
    return image


def encoded_file(
    path: str,
    name: str,
    max_image_pixels: int,
    page: int | None = 0,
    *,
    raw: bool = False,
    window: bool = False,
) -> EncodedFile:
    """Read the header of the image in a regular file; see `encoded`."""
    source: bytes | str = path
    with errors_named(name, max_image_pixels):
        status = os.stat(path)
        check_regular_file(status)
        if not page and status.st_size <= LARGEST_READ_WHOLE:
            with open(path, "rb") as file:
                start = file.read(FIRST_BYTES)
                known = recognised(start)
                # Arrays are memory-mapped, and what is no image is not read.
                if known is not None and known.reader != "numpy":
                    source = start + file.read()
    return encoded(source, name, max_image_pixels, page, raw=raw, window=window)


def identified(source: bytes | str) -> tuple[Format, str]:
    """Return the format of a file, and which of `READERS` reads it.

    Raises:
        ValueError: it is no image of a known format, or a package is missing.
    """
    if isinstance(source, str):
        check_regular_file(os.stat(source))
    known = recognised(first_bytes(source, FIRST_BYTES))
    if known is None:
        raise ValueError("cannot identify image file")
    pillow_images.add_format(known.name)
    if deep_images.is_deep(known.name, source):
        return known, "deep"
    return known, known.reader


def read_header(request: Request, reader: str) -> ImageHeader:
    """Return the header of an image as it is given out: 8-bit grey is RGB, unless it is raw."""
    header: ImageHeader = READERS[reader].read_header(request)
    is_grey = header.bands == 1 and header.dtype == np.uint8
    if is_grey and not request.raw:
        return header._replace(bands=3, band_names=None)
    return header


def finished(pixels: np.ndarray, header: ImageHeader) -> np.ndarray:
    """Return what a reader read as the header says it, C-contiguous.

    Raises:
        ValueError: the pixels are not those of the header.
    """
    if pixels.shape[2] == 1 and header.bands == 3:
        pixels = np.repeat(pixels, 3, axis=2)
    expected = (*header.size, header.bands)
    is_safe = np.can_cast(pixels.dtype, header.dtype, "safe")
    if pixels.shape != expected or not is_safe:
        raise ValueError(
            f"the pixels are {pixels.dtype} of shape {pixels.shape}, "
            f"and the header says {header.dtype} of shape {expected}"
        )
    return np.ascontiguousarray(pixels, dtype=header.dtype)


def header(
    path: str, name: str | None = None, page: int | None = 0, *, raw: bool = False
) -> FileHeader:
    """Return size, bands, type and number of images of a file, of any size; nothing is decoded.

    It may run in threads; then the caller ignores Pillow's warnings around them, with
    `pillow_warnings_ignored`.

    Args:
        name: for messages; by default the path.
        page: the image whose size, bands and type are returned; None for all as one image.
        raw: see `encoded`.

    Raises:
        UnreadableImage: the file is missing or no image.
    """
    name = name or path
    with errors_named(name, MAX_IMAGE_PIXELS):
        _, reader = identified(path)
        request = Request(path, name, NO_LIMIT, page, raw)
        known = read_header(request, reader)
        pages = READERS[reader].num_pages(request)
    return FileHeader(known.size, known.bands, known.dtype, pages)


def image_size(path: str, max_image_pixels: int) -> tuple[int, int]:
    """Return the (height, width) of the image in a file, px, the right way up.

    It may run in threads; then the caller ignores Pillow's warnings around them.

    Raises:
        UnreadableImage: the file is missing, too large or no image.
    """
    with errors_named(path, max_image_pixels):
        _, reader = identified(path)
        known = read_header(Request(path, path, max_image_pixels), reader)
        check_memory(known, max_image_pixels)
    return known.size


def read_window(
    path: str,
    name: str,
    page: int | None,
    top: int,
    left: int,
    height: int,
    width: int,
    max_image_pixels: int,
    *,
    raw: bool = False,
) -> np.ndarray:
    """Return a part of an image, (height, width, bands), equal to that part of the whole image.

    Of a TIFF file, only the strips and tiles are decoded that it touches; of a .npy file, only its
    pixels are read. Every other image is decoded whole, and has to hold to the limit.

    Args:
        name: for messages.
        page: see `encoded`.
        top: first row, px.
        left: first column, px.
        height: in px. The part has to lie inside the image.
        width: in px.
        max_image_pixels: see `encoded`; for the part, and for each strip or tile.
        raw: see `encoded`.

    Raises:
        UnreadableImage: the file is missing, too large, damaged or no image, or the part is not in
            the image.
    """
    window = Window(top, left, height, width)
    with pillow_warnings_ignored(), errors_named(name, max_image_pixels):
        _, reader = identified(path)
        if reader in ("tiff", "numpy"):
            request = Request(path, name, max_image_pixels, page, raw)
            whole = read_header(request, reader)
            check_window(window, whole)
            part = whole._replace(size=(height, width))
            check_memory(part, max_image_pixels)
            pixels = READERS[reader].read_window(request, window)
            if pixels is not None:
                return finished(pixels, part)
    image = encoded_file(path, name, max_image_pixels, page, raw=raw)
    with errors_named(name, max_image_pixels):
        check_window(window, image.header)
    return np.ascontiguousarray(image.pixels()[window.rows, window.columns])


def check_window(window: Window, header: ImageHeader) -> None:
    """Raise ValueError if a part is not in the image."""
    height, width = header.size
    is_inside = window.top >= 0 and window.left >= 0 and window.height > 0 and window.width > 0
    if not is_inside or window.top + window.height > height or window.left + window.width > width:
        raise ValueError(f"{window} is not in the image of {width} x {height} px")


def read_mask(path: str, max_image_pixels: int = MAX_IMAGE_PIXELS) -> np.ndarray:
    """Return the numbers in an image of one channel, (height, width) uint8, or int32 for 16 bits.

    For a palette these are the indices and not the colours. The orientation of EXIF is applied.

    Args:
        max_image_pixels: a larger image is not decoded.

    Raises:
        UnreadableImage: the file is not a readable image, is too large, or has colours.
    """
    with pillow_warnings_ignored():
        return decoded_mask(path, max_image_pixels)


def decoded_mask(path: str, max_image_pixels: int) -> np.ndarray:
    """Do what `read_mask` does, for threads: the caller ignores Pillow's warnings around them."""
    request = Request(path, path, max_image_pixels, raw=True, numbers=True)
    with errors_named(path, max_image_pixels):
        _, reader = identified(path)
        if reader == "pillow":
            numbers = pillow_images.read_numbers(request)
        else:
            known = READERS[reader].read_header(request)
            if known.bands != 1 or known.dtype.kind not in "bui":
                raise ValueError(
                    f"bands: {known.bands} of {known.dtype}; expected one whole number per pixel"
                )
            check_memory(known, max_image_pixels)
            numbers = READERS[reader].read_pixels(request, known)[..., 0]
        if numbers.dtype.itemsize == 1 and numbers.dtype.kind in "bu":
            return np.ascontiguousarray(numbers, dtype=np.uint8)
        if numbers.min() < -(2**31) or numbers.max() >= 2**31:
            raise ValueError(f"the number {numbers.max()} is too large for a class")
        return np.ascontiguousarray(numbers, dtype=np.int32)
