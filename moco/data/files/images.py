"""Reading images: any common format and pixel type to 8-bit RGB, masks to numbers.

JPEGs are decoded by libjpeg-turbo (simplejpeg), bit for bit as by Pillow and faster. Pillow decodes
all other formats. The size of an image is known before anything is decoded.
"""

import io
import math
import os
import stat
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import simplejpeg
from PIL import Image

from moco.errors import InputError, printable

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# The formats of these extensions, whatever a file is called. Pillow would open more formats, and
# it hands PostScript to an interpreter.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Pillow's own limit, half a gigabyte as RGB: it takes a larger image for an attack.
MAX_IMAGE_PIXELS = 178_956_970
MASK_MODES = ("1", "I", "I;16", "L", "P")  # Pillow's names for one whole number per pixel
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_BIT_DEPTH_OFFSET = 24  # after the signature, a chunk's length and name, width and height
# simplejpeg's names of the colours that it decodes as Pillow does. It also reads CMYK, but the
# resulting colours differ.
JPEG_COLORS = ("Gray", "RGB", "YCbCr")
JPEG_START = b"\xff\xd8\xff"
# Bytes. Pillow reads larger files piece by piece, so that they cannot fill the memory.
LARGEST_READ_WHOLE = 2**28
MAX_NAMED = 10


class UnreadableImage(Exception):
    """An image that cannot be decoded; the message names the file and the reason."""


def read_mask(path: str, max_image_pixels: int = MAX_IMAGE_PIXELS) -> np.ndarray:
    """Return the numbers in a one-channel image, (height, width) uint8, or int32 for 16 bits.

    For a palette these are the indices and not the colours.

    Args:
        max_image_pixels: a larger image is not decoded.

    Raises:
        UnreadableImage: the file is not a readable image, is too large, or has colours.
    """
    with pillow_warnings_ignored():
        return decoded_mask(path, max_image_pixels)


def decoded_mask(path: str, max_image_pixels: int) -> np.ndarray:
    """Do what `read_mask` does, for threads: the caller ignores Pillow's warnings around them."""
    with opened(path, max_image_pixels) as image:
        if image.mode not in MASK_MODES:
            raise ValueError(
                f"mode {image.mode}: expected one number per pixel (modes {', '.join(MASK_MODES)})"
            )
        if image.mode.startswith("I"):
            return np.array(image, dtype=np.int32)
        # Of a palette, these are the indices.
        numbers = np.array(image, dtype=np.uint8)
        if image.mode == "L":
            # Pillow stretches grey values of 2 and 4 bits to 0..255.
            largest_number = 2 ** png_bit_depth(path) - 1
            numbers //= 255 // largest_number
        return numbers


def png_bit_depth(path: str) -> int:
    """Return the bits per sample of a PNG file, or 8 for any other file."""
    with open(path, "rb") as file:
        header = file.read(PNG_BIT_DEPTH_OFFSET + 1)
    return header[-1] if header.startswith(PNG_SIGNATURE) else 8


@contextmanager
def pillow_warnings_ignored() -> Iterator[None]:
    """Ignore warnings inside: Pillow warns about odd metadata and sizes that it can read.

    Use this in one thread at a time, since the warning filters belong to the whole process.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def opened(
    source: str | bytes, max_image_pixels: int, name: str | None = None
) -> Iterator[Image.Image]:
    """Open an image and read its header; its pixels are read later.

    This sets Pillow's own limit in this process, since its decoders meet sizes that are not in the
    header too, such as those of tiles.

    Args:
        source: the file's path, or its content.
        max_image_pixels: a larger image is refused.
        name: what to call the image in a message; by default the path.

    Raises:
        UnreadableImage: for whatever Pillow raises here or inside the ``with`` block.
    """
    Image.MAX_IMAGE_PIXELS = max_image_pixels / 2  # type: ignore[assignment]  # it refuses 2 x this
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with errors_named(name or str(source), max_image_pixels, file):
        if isinstance(file, str):
            check_regular_file(os.stat(file))
        with Image.open(file, formats=FORMATS) as image:
            if 0 in image.size:
                raise ValueError(f"{image.width} x {image.height} px")
            yield image


def check_regular_file(status: os.stat_result) -> None:
    """Raise OSError for a pipe, which would wait for a writer, and for a device or a folder."""
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")


@contextmanager
def errors_named(name: str, max_image_pixels: int, file: object = None) -> Iterator[None]:
    """Turn any error inside into an `UnreadableImage` that names the image.

    Args:
        file: what Pillow was given; its messages repeat it.
    """
    try:
        yield
    except UnreadableImage:
        raise
    except Image.DecompressionBombError as error:
        # "Image size (200000000 pixels) exceeds limit of ..."
        size, _, _ = str(error).partition(" exceeds")
        raise UnreadableImage(
            f"{printable(name)}: {size} exceeds data.max_image_pixels={max_image_pixels}"
        ) from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged data
        raise UnreadableImage(f"{printable(name)}: {reason(error, file)}") from error


def reason(error: Exception, file: object) -> str:
    """Return an error's message without the file that system and Pillow repeat in it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    message = str(error).removesuffix(f" {file!r}")
    return printable(message) or type(error).__name__


def to_rgb(image: Image.Image) -> Image.Image:
    """Return any Pillow image as 8-bit RGB; transparent pixels are laid over white.

    16-bit values are divided by 257, so that black and white stay black and white. Pillow's own
    conversion clips them at 255.

    Raises:
        ValueError: the image has floating-point pixels, whose range is unknown.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; expected 8 or 16 bits")
    if image.mode.startswith("I"):  # I;16, I;16B, and I, which some Pillow versions use for 16 bits
        values = np.asarray(image).clip(0, 65535).astype(np.int32)
        rounded = (values + 128) // 257
        return Image.fromarray(rounded.astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


class EncodedImage(Protocol):
    """An image whose header was read, and whose pixels were not."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width), px."""
        ...

    def pixels(self) -> np.ndarray:
        """Return the decoded image, (height, width, 3) uint8 RGB, C-contiguous.

        The caller must not write to it.

        Raises:
            UnreadableImage: the data is damaged.
        """
        ...


@dataclass(frozen=True)
class EncodedFile:
    """An `EncodedImage` in the format of a file."""

    source: bytes | str
    """The content of a file, or the path of a file that is not held in memory."""
    name: str
    """For messages."""
    size: tuple[int, int]
    max_image_pixels: int
    page: int
    """The number of the image in a file with several, counted from 0."""
    is_jpeg: bool

    def pixels(self) -> np.ndarray:
        """Return the pixels, see `EncodedImage`."""
        if isinstance(self.source, bytes) and jpeg_size(self.source) == self.size:
            # Pillow can read some of the damaged files, and its messages say more.
            with suppress(ValueError):
                return simplejpeg.decode_jpeg(self.source, "RGB")
        with (
            pillow_warnings_ignored(),
            opened(self.source, self.max_image_pixels, self.name) as image,
        ):
            turn_to(image, self.page, self.max_image_pixels)
            return np.array(to_rgb(image))


@dataclass(frozen=True)
class DecodedImage:
    """An `EncodedImage` whose pixels are in memory already."""

    array: np.ndarray
    """(height, width, 3) uint8 RGB."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width), px."""
        height, width, _ = self.array.shape
        return height, width

    def pixels(self) -> np.ndarray:
        """Return the pixels, see `EncodedImage`."""
        return self.array


def encoded(source: bytes | str, name: str, max_image_pixels: int, page: int = 0) -> EncodedFile:
    """Read the header of an image.

    Args:
        source: the content of a file, or its path. Pillow reads the pixels from a path later.
        name: for messages.
        max_image_pixels: larger images are unreadable.
        page: the number of the image in a file with several, counted from 0.

    Raises:
        UnreadableImage: the file is missing, empty, too large or not an image. Damaged pixels are
            found when they are decoded.
    """
    is_jpeg = True
    size = jpeg_size(source) if isinstance(source, bytes) and page == 0 else None
    if size is None or math.prod(size) > max_image_pixels:
        with pillow_warnings_ignored(), opened(source, max_image_pixels, name) as image:
            turn_to(image, page, max_image_pixels)
            is_jpeg = image.format in ("JPEG", "MPO")
            size = (image.height, image.width)
    return EncodedFile(source, name, size, max_image_pixels, page, is_jpeg)


def encoded_file(path: str, name: str, max_image_pixels: int, page: int = 0) -> EncodedFile:
    """Read the header of the image in a regular file; see `encoded`."""
    with errors_named(name, max_image_pixels):
        status = os.stat(path)
        check_regular_file(status)
        if page or status.st_size > LARGEST_READ_WHOLE:
            return encoded(path, name, max_image_pixels, page)
        with open(path, "rb") as file:
            content = file.read()
    return encoded(content, name, max_image_pixels)


def turn_to(image: Image.Image, page: int, max_image_pixels: int) -> None:
    """Make `page` the current one of a Pillow image; Pillow checks the size of the first alone.

    Raises:
        EOFError: there is no such page.
        Image.DecompressionBombError: the page is too large.
    """
    image.seek(page)
    num_pixels = image.width * image.height
    if num_pixels > max_image_pixels:
        raise Image.DecompressionBombError(f"Image size ({num_pixels} pixels) exceeds")


def jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Return (height, width) of a JPEG that simplejpeg decodes as Pillow does, else None.

    This takes a tenth of the time that Pillow takes.
    """
    if not content.startswith(JPEG_START):
        return None
    try:
        height, width, color, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    return (height, width) if color in JPEG_COLORS else None


def check_bad_fraction(names: Collection[str], num_images: int, max_bad_fraction: float) -> None:
    """Raise InputError if too many images are unreadable.

    Args:
        names: of the unreadable images; the message names the first ten.
        num_images: number of all images. It is always an error if all are unreadable.
        max_bad_fraction: fraction from 0 to 1.
    """
    # A fraction of 1 would let a run go on without any image.
    are_all_bad = len(names) == num_images > 0
    if are_all_bad or len(names) > max_bad_fraction * num_images:
        first = ", ".join(map(printable, sorted(names)[:MAX_NAMED]))
        raise InputError(
            f"{len(names)} of {num_images} images cannot be read, more than "
            f"data.max_bad_fraction={max_bad_fraction}; the first are {first}"
        )
