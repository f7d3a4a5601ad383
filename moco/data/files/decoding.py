"""From the encoded bytes of an image to its pixels. The size is known before anything is decoded.

JPEGs are decoded by libjpeg-turbo (simplejpeg), bit for bit as by Pillow and faster. Pillow decodes
all other formats.
"""

import math
import os
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import simplejpeg
from PIL import Image

from moco.data.files.images import (
    check_regular_file,
    errors_named,
    opened,
    pillow_warnings_ignored,
    to_rgb,
)

# simplejpeg's names of the colours that it decodes as Pillow does. It also reads CMYK, but the
# resulting colours differ.
JPEG_COLORS = ("Gray", "RGB", "YCbCr")
JPEG_START = b"\xff\xd8\xff"
# Bytes. Pillow reads larger files piece by piece, so that they cannot fill the memory.
LARGEST_READ_WHOLE = 2**28


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
            try:
                return simplejpeg.decode_jpeg(self.source, "RGB")
            except ValueError:
                # Pillow can read some of the damaged files, and its messages say more.
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
    size = jpeg_size(source) if isinstance(source, bytes) and page == 0 else None
    if size and math.prod(size) <= max_image_pixels:
        return EncodedFile(source, name, size, max_image_pixels, page, is_jpeg=True)
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
