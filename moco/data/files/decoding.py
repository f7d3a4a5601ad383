"""From an image's encoded bytes to its pixels, with the size known before anything is decoded.

Letters: H W pixels of the whole image, H' W' of what a decoder returned.
"""

import math
import os
import stat
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import simplejpeg
from PIL import Image

from moco.data.files.images import errors_named, opened, pillow_warnings_ignored, to_rgb

# simplejpeg's names of what it decodes as Pillow does, bit for bit. It also takes CMYK, and gives other colours.
JPEG_COLORS = ("Gray", "RGB", "YCbCr")
JPEG_START = b"\xff\xd8\xff"
LARGEST_READ_WHOLE = (
    2**28
)  # bytes; Pillow reads larger files piece by piece, so that nothing fills the memory


class EncodedImage(Protocol):
    """An image whose header was read and whose pixels were not."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the whole image, px."""
        ...

    def pixels(self, reduction: int = 1) -> np.ndarray:
        """The decoded image, (H', W', 3) uint8 RGB, C-contiguous; a caller must not write to it.

        Args:
            reduction: 1, 2, 4 or 8. A decoder that can do it cheaply may return the image so many times smaller, each side
                rounded up; the others return it whole. A pixel then stands for reduction x reduction of them, also where H
                or W is no multiple of that: divide coordinates by the reduction and not by H / H'.

        Raises:
            UnreadableImage: the data is damaged.
        """
        ...


@dataclass(frozen=True)
class EncodedFile:
    """An `EncodedImage` in a file's format."""

    source: bytes | str
    """The content of a file, or the path of one that is not held in memory."""
    name: str
    """What to call it in a message."""
    size: tuple[int, int]
    max_image_pixels: int
    page: int
    """Of a file with several, from 0."""
    is_jpeg: bool

    def pixels(self, reduction: int = 1) -> np.ndarray:
        """See `EncodedImage`. JPEGs alone are reduced, by the scale of their cosine transform."""
        if self.is_jpeg and isinstance(self.source, bytes):
            try:
                return jpeg_pixels(self.source, self.size, reduction)
            except (
                ValueError
            ):  # Pillow reads some of what is odd or damaged, and says what is wrong with the rest
                pass
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
    """(H, W, 3) uint8 RGB."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width), px."""
        height, width, _ = self.array.shape
        return height, width

    def pixels(self, reduction: int = 1) -> np.ndarray:
        """See `EncodedImage`; never reduced."""
        return self.array


def encoded(source: bytes | str, name: str, max_image_pixels: int, page: int = 0) -> EncodedFile:
    """The image in a file's bytes, or in the file at a path, whose pixels Pillow then reads when they are asked for.

    Args:
        name: what to call it in a message.
        max_image_pixels: an image of more is not decoded.
        page: which of a file with several, from 0.

    Raises:
        UnreadableImage: the file is missing, empty, too large or not an image; and if its pixels are damaged, when they
            are asked for.
    """
    size = jpeg_size(source) if isinstance(source, bytes) and page == 0 else None
    if size and math.prod(size) <= max_image_pixels:
        return EncodedFile(source, name, size, max_image_pixels, page, is_jpeg=True)
    with pillow_warnings_ignored(), opened(source, max_image_pixels, name) as image:
        turn_to(image, page, max_image_pixels)
        width, height = image.size
        return EncodedFile(
            source, name, (height, width), max_image_pixels, page, image.format in ("JPEG", "MPO")
        )


def encoded_file(path: str, name: str, max_image_pixels: int, page: int = 0) -> EncodedFile:
    """The image in a regular file; raises and arguments as of `encoded`."""
    with errors_named(name, max_image_pixels):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(
                "not a regular file"
            )  # a pipe would wait for a writer, a device may do anything
        if page or status.st_size > LARGEST_READ_WHOLE:
            return encoded(path, name, max_image_pixels, page)
        with open(path, "rb") as file:
            content = file.read()
    return encoded(content, name, max_image_pixels)


def turn_to(image: Image.Image, page: int, max_image_pixels: int) -> None:
    """Make `page` the image's current one; Pillow holds only the first to a limit.

    Raises:
        EOFError, Image.DecompressionBombError: there is no such page, or it is too large.
    """
    image.seek(page)
    num_pixels = image.width * image.height
    if num_pixels > max_image_pixels:
        raise Image.DecompressionBombError(f"Image size ({num_pixels} pixels) exceeds")


def jpeg_size(content: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG file that `jpeg_pixels` may read, ten times as fast as by Pillow; None of any other."""
    if not content.startswith(JPEG_START):
        return None
    try:
        height, width, color, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    return (height, width) if color in JPEG_COLORS else None


def jpeg_pixels(content: bytes, size: tuple[int, int], reduction: int) -> np.ndarray:
    """The pixels of a JPEG file by libjpeg-turbo; at reduction 1 the same as Pillow's.

    Raises:
        ValueError: the data is damaged, however little, or not of JPEG_COLORS, or the image not of that size.
    """
    height, width, color, _ = simplejpeg.decode_jpeg_header(content)
    if (height, width) != size or color not in JPEG_COLORS:
        raise ValueError(f"{height} x {width} px, {color}")
    least = {"min_height": -(-height // reduction), "min_width": -(-width // reduction)}
    return simplejpeg.decode_jpeg(content, "RGB", **(least if reduction > 1 else {}))
