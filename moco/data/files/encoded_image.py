"""What every reader of image files takes and gives, and how a file is refused.

A reader is a module with three functions: ``num_pages(request)``, ``read_header(request)`` and
``read_pixels(request, header)``. `moco.data.files.images` chooses one by a file's first bytes.
"""

import io
import mmap
import os
import stat
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from moco.errors import InputError, printable

# Pillow's own limit, half a gigabyte as RGB: it takes a larger image for an attack.
MAX_IMAGE_PIXELS = 178_956_970
NO_LIMIT = 2**62  # px
BYTES_PER_RGB_PIXEL = 3
MAX_NAMED = 10
# The numbers of EXIF for the ways in which an image is stored (CIPA DC-008, tag 274). It is
# transposed first.
TRANSPOSED = (5, 6, 7, 8)
ROWS_REVERSED = (3, 4, 7, 8)
COLUMNS_REVERSED = (2, 3, 6, 7)
IMAGE_TYPES = ("uint8", "uint16", "int16", "int32", "uint32", "float16", "float32", "float64")
# These become a type of images that holds all their values.
WIDER_TYPES = {"bool": "uint8", "int8": "int16"}


class UnreadableImage(Exception):
    """An image that cannot be decoded; the message names the file and the reason."""


class ImageHeader(NamedTuple):
    """What is known of an image before it is decoded."""

    size: tuple[int, int]
    """(height, width), px, the right way up."""
    bands: int
    dtype: np.dtype
    """One of `IMAGE_TYPES`."""
    orientation: int = 1
    """How the image is stored, in the numbers of EXIF: 1 upright, 2 to 8 mirrored or turned."""
    no_data: float | None = None
    """The value that says "nothing was measured here", from the file."""
    band_names: tuple[str, ...] | None = None
    """The names of the bands, from the file."""


class Request(NamedTuple):
    """Which image of a file is asked for, and in which form."""

    source: bytes | str
    """The content of a file, or its path."""
    name: str
    """For messages."""
    max_image_pixels: int
    """A larger image is refused, see `check_memory`."""
    page: int | None = 0
    """The number of the image in a file with several, counted from 0. None: all, as bands."""
    raw: bool = False
    """Whether 8-bit images keep the bands of the file instead of becoming RGB."""
    window: bool = False
    """Whether a DICOM image goes through the window of its file."""
    numbers: bool = False
    """Whether the numbers of a mask are asked for: a palette's indices, bits without stretching."""


class Window(NamedTuple):
    """A part of an image, px."""

    top: int
    left: int
    height: int
    width: int

    @property
    def rows(self) -> slice:
        """The rows of the image that it has."""
        return slice(self.top, self.top + self.height)

    @property
    def columns(self) -> slice:
        """The columns of the image that it has."""
        return slice(self.left, self.left + self.width)


class EncodedImage(Protocol):
    """An image whose header was read, and whose pixels were not."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width), px, after the orientation of EXIF."""
        ...

    @property
    def bands(self) -> int:
        """The number of bands."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """The type of the pixels: uint8, uint16, int16, int32, uint32 or float16/32/64."""
        ...

    @property
    def no_data(self) -> float | None:
        """The value that stands for missing pixels, if the file says one."""
        ...

    @property
    def band_names(self) -> tuple[str, ...] | None:
        """The names of the bands, if the file has them."""
        ...

    def pixels(self) -> np.ndarray:
        """Return the decoded image, (height, width, bands) of `dtype`, C-contiguous.

        The caller must not write to it.

        Raises:
            UnreadableImage: the data is damaged.
        """
        ...


@dataclass(frozen=True)
class DecodedImage:
    """An `EncodedImage` whose pixels are in memory already."""

    array: np.ndarray
    """(height, width, bands), of one of `IMAGE_TYPES`."""
    no_data: float | None = None
    band_names: tuple[str, ...] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width), px."""
        height, width, _ = self.array.shape
        return height, width

    @property
    def bands(self) -> int:
        """The number of bands."""
        return self.array.shape[2]

    @property
    def dtype(self) -> np.dtype:
        """The type of the pixels."""
        return self.array.dtype

    def pixels(self) -> np.ndarray:
        """Return the pixels, see `EncodedImage`."""
        return self.array


def image_type(dtype: np.dtype, what: str = "values") -> np.dtype:
    """Return the type, in the byte order of this machine, in which an image of `dtype` is read.

    Raises:
        ValueError: no type of images holds the values of `dtype`.
    """
    name = WIDER_TYPES.get(dtype.name, dtype.name)
    if name not in IMAGE_TYPES:
        raise ValueError(f"{what} of type {dtype.name}; expected one of {', '.join(IMAGE_TYPES)}")
    return np.dtype(name)


def joined_header(headers: Sequence[ImageHeader]) -> ImageHeader:
    """Return the header of all pages of a file as the bands of one image.

    Raises:
        ValueError: their sizes or types differ.
    """
    first = headers[0]
    for number, header in enumerate(headers[1:], start=2):
        if header.size != first.size or header.dtype != first.dtype:
            raise ValueError(
                f"page {number} has {described(header)}, page 1 has {described(first)}: "
                "they cannot be the bands of one image"
            )
    bands = 0
    for header in headers:
        bands += header.bands
    return first._replace(bands=bands, band_names=None)


def described(header: ImageHeader) -> str:
    """Return the size and type of an image, for a message."""
    height, width = header.size
    return f"{width} x {height} px of {header.dtype}"


def oriented(array: np.ndarray, orientation: int) -> np.ndarray:
    """Return an image, (height, width, bands), the right way up, C-contiguous.

    Args:
        orientation: how it is stored, in the numbers of EXIF.
    """
    if orientation == 1:
        return array
    # NumPy copies element by element, so a pixel is one element: 2.4 times as fast for RGB. OpenCV
    # is 10 times as fast.
    if array.dtype == np.uint8 and array.shape[2] == 3:
        return oriented_rgb(array, orientation)
    array = np.ascontiguousarray(array)
    pixels = array.view(np.dtype((np.void, array.dtype.itemsize * array.shape[2])))[..., 0]
    if orientation in TRANSPOSED:
        pixels = pixels.T
    if orientation in ROWS_REVERSED:
        pixels = pixels[::-1]
    if orientation in COLUMNS_REVERSED:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)[..., None].view(array.dtype)


def oriented_rgb(array: np.ndarray, orientation: int) -> np.ndarray:
    """Do what `oriented` does, for (height, width, 3) uint8."""
    import cv2

    if orientation in TRANSPOSED:
        array = cv2.transpose(array)
    if orientation in ROWS_REVERSED and orientation in COLUMNS_REVERSED:
        return cv2.flip(array, -1)
    if orientation in ROWS_REVERSED:
        return cv2.flip(array, 0)
    if orientation in COLUMNS_REVERSED:
        return cv2.flip(array, 1)
    return array


def oriented_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Return the (height, width) of an image the right way up."""
    height, width = size
    if orientation in TRANSPOSED:
        return width, height
    return height, width


def check_memory(header: ImageHeader, max_image_pixels: int) -> None:
    """Raise ValueError if an image would take more memory than 8-bit RGB of the largest size."""
    height, width = header.size
    num_bytes = height * width * header.bands * header.dtype.itemsize
    if height == 0 or width == 0 or header.bands == 0:
        raise ValueError(f"{width} x {height} px, {header.bands} bands")
    if num_bytes <= BYTES_PER_RGB_PIXEL * max_image_pixels:
        return
    if header.dtype == np.uint8 and header.bands <= BYTES_PER_RGB_PIXEL:
        # Pillow's words.
        raise ValueError(
            f"Image size ({height * width} pixels) exceeds data.max_image_pixels={max_image_pixels}"
        )
    size = f"{width} x {height} px x {header.bands} {header.dtype}"
    limit = BYTES_PER_RGB_PIXEL * max_image_pixels
    raise ValueError(
        f"{size} ({num_bytes / 1e9:,.1f} GB) exceeds data.max_image_pixels={max_image_pixels}, "
        f"which is for 8-bit RGB ({limit / 1e9:,.1f} GB); data.tile=512 reads windows"
    )


def first_bytes(source: bytes | str, count: int) -> bytes:
    """Return up to `count` bytes of the start of a file."""
    if isinstance(source, bytes):
        return source[:count]
    with open(source, "rb") as file:
        return file.read(count)


def path_or_file(source: bytes | str) -> io.BytesIO | str:
    """Return a path as it is, and the content of a file as a file: what libraries open."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    return source


@contextmanager
def content_of(source: bytes | str) -> Iterator[bytes | mmap.mmap]:
    """Give the content of a file, memory-mapped if `source` is a path."""
    if isinstance(source, bytes):
        yield source
        return
    with (
        open(source, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        yield content


def values_at(source: bytes | str, dtype: np.dtype, count: int, offset: int) -> np.ndarray:
    """Return values that stand in a file as they are, (count,), without reading them.

    The caller must not write to them.

    Args:
        offset: where they start, bytes.

    Raises:
        ValueError: the file ends before.
    """
    if isinstance(source, bytes):
        return np.frombuffer(source, dtype, count, offset)
    return np.memmap(source, dtype, "r", offset, (count,))


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
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise UnreadableImage(f"{printable(name)}: {reason(error, file)}") from error


def reason(error: Exception, file: object) -> str:
    """Return an error's message without the file that system and Pillow repeat in it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    message = str(error).removesuffix(f" {file!r}")
    return printable(message) or type(error).__name__


def check_bad_fraction(
    names: Collection[str], num_images: int, max_bad_fraction: float, reason: str = ""
) -> None:
    """Raise InputError if too many images are unreadable.

    Args:
        names: of the unreadable images; the message names the first ten.
        num_images: number of all images. It is always an error if all are unreadable.
        max_bad_fraction: fraction from 0 to 1.
        reason: what is wrong with one of them, for the message.
    """
    # A fraction of 1 would let a run go on without any image.
    are_all_bad = len(names) == num_images > 0
    if are_all_bad or len(names) > max_bad_fraction * num_images:
        first = ", ".join(map(printable, sorted(names)[:MAX_NAMED]))
        example = ""
        if reason:
            example = f" ({reason})"
        raise InputError(
            f"{len(names)} of {num_images} images cannot be read, more than "
            f"data.max_bad_fraction={max_bad_fraction}; the first are {first}{example}"
        )
