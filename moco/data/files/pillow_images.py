"""Reading 8-bit images by Pillow."""

import mmap
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
from PIL import Image, features

from moco.data.files.encoded_image import (
    NO_LIMIT,
    ImageHeader,
    Request,
    check_regular_file,
    content_of,
    errors_named,
    first_bytes,
    joined_header,
    oriented,
    oriented_size,
    path_or_file,
)
from moco.data.files.formats import FORMATS
from moco.extras import install_command

# Pillow would open more formats, and it hands PostScript to an interpreter. It opens a JPEG with
# several images (MPO) as a JPEG.
PILLOW_FORMATS = tuple(known.name for known in FORMATS if known.reader in ("pillow", "tiff"))
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_BIT_DEPTH_OFFSET = 24  # after the start, a chunk's length and name, width and height
ORIENTATION = 274  # the tag of EXIF
UINT8 = np.dtype(np.uint8)
# The bands in which an image is read that keeps the bands of its file. Pillow's other modes are
# other encodings of colours: palettes, CMYK, YCbCr, LAB and HSV.
RAW_MODES = {
    "1": "L",
    "L": "L",
    "LA": "LA",
    "La": "LA",
    "RGBA": "RGBA",
    "RGBa": "RGBA",
    "PA": "RGBA",
}
MASK_MODES = ("1", "I", "I;16", "L", "P")  # Pillow's names for one whole number per pixel


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
    Image.init()
    formats = [known for known in PILLOW_FORMATS if known in Image.OPEN]
    file = path_or_file(source)
    with errors_named(name or str(source), max_image_pixels, file):
        if isinstance(file, str):
            check_regular_file(os.stat(file))
        with Image.open(file, formats=formats) as image:
            if 0 in image.size:
                raise ValueError(f"{image.width} x {image.height} px")
            yield image


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


def add_format(name: str) -> None:
    """Make sure that Pillow reads a format.

    Raises:
        ValueError: a package is missing; the message says what to install.
    """
    if name == "AVIF" and not features.check("avif"):
        raise ValueError("AVIF needs Pillow 11.3 or newer: pip install 'pillow>=11.3'")
    if name == "HEIF":
        try:
            import pillow_heif
        except ImportError as error:
            raise ValueError(f"HEIC needs pillow-heif: {install_command('heif')}") from error
        pillow_heif.register_heif_opener()


def num_pages(request: Request) -> int:
    """Return the number of images in a file, such as the frames of an animation."""
    with opened(request.source, NO_LIMIT, request.name) as image:
        return num_frames(image)


def num_frames(image: Image.Image) -> int:
    """Return the number of images in an open file.

    A JPEG counts as one: what else a camera stores in it are previews and depths.
    """
    if image.format in ("JPEG", "MPO"):
        return 1
    return getattr(image, "n_frames", 1)


def read_header(request: Request) -> ImageHeader:
    """Return what is known of an image before it is decoded."""
    with opened(request.source, request.max_image_pixels, request.name) as image:
        headers = []
        for page in pages_of(image, request):
            headers.append(page_header(page, request))
        return joined_header(headers)


def read_pixels(request: Request, header: ImageHeader) -> np.ndarray:
    """Return the pixels of an image, (height, width, bands) uint8."""
    arrays = []
    with opened(request.source, request.max_image_pixels, request.name) as image:
        for page in pages_of(image, request):
            mode = mode_of(page, request)
            if mode is None:
                array = np.array(to_rgb(page))
            else:
                array = np.array(page.convert(mode))
            arrays.append(array.reshape(*array.shape[:2], -1))
    return oriented(np.concatenate(arrays, axis=2), header.orientation)


def read_numbers(request: Request) -> np.ndarray:
    """Return the numbers in an image of one channel, (height, width).

    For a palette these are the indices and not the colours.

    Raises:
        UnreadableImage: the image has colours.
    """
    with opened(request.source, request.max_image_pixels, request.name) as image:
        if image.mode not in MASK_MODES:
            raise ValueError(
                f"mode {image.mode}: expected one number per pixel (modes {', '.join(MASK_MODES)})"
            )
        orientation = orientation_of(image, request.source)
        if image.mode.startswith("I"):
            numbers = np.array(image, dtype=np.int32)
        else:
            numbers = np.array(image, dtype=np.uint8)  # of a palette, the indices
        if image.mode == "L":
            # Pillow stretches grey values of 2 and 4 bits to 0..255.
            largest_number = 2 ** png_bit_depth(request.source) - 1
            numbers //= 255 // largest_number
    return oriented(numbers[..., None], orientation)[..., 0]


def png_bit_depth(source: bytes | str) -> int:
    """Return the bits per sample of a PNG file, or 8 for any other file."""
    header = first_bytes(source, PNG_BIT_DEPTH_OFFSET + 1)
    if not header.startswith(PNG_START):
        return 8
    return header[-1]


def pages_of(image: Image.Image, request: Request) -> Iterator[Image.Image]:
    """Yield the image at the page that is asked for, or at each if all are."""
    if request.page is not None:
        turn_to(image, request.page, request.max_image_pixels)
        yield image
        return
    for page in range(num_frames(image)):
        turn_to(image, page, request.max_image_pixels)
        yield image


def page_header(image: Image.Image, request: Request) -> ImageHeader:
    """Return the header of the current page."""
    mode = mode_of(image, request)
    bands = 3
    if mode is not None:
        bands = Image.getmodebands(mode)
    orientation = orientation_of(image, request.source)
    size = oriented_size((image.height, image.width), orientation)
    return ImageHeader(size, bands, UINT8, orientation)


def mode_of(image: Image.Image, request: Request) -> str | None:
    """Return the mode to which an image is converted to keep its bands; None for `to_rgb`."""
    is_stack = request.page is None and num_frames(image) > 1
    if not request.raw and not is_stack:
        return None
    if image.mode == "P" and "transparency" in image.info:
        return "RGBA"
    return RAW_MODES.get(image.mode, "RGB")


def orientation_of(image: Image.Image, source: bytes | str) -> int:
    """Return how the current page of a Pillow image is stored, in the numbers of EXIF.

    Pillow turns the images of a TIFF file itself.
    """
    if image.format == "TIFF":
        return 1
    if image.format == "PNG" and "exif" not in image.info:
        with content_of(source) as content:
            follows_the_pixels = png_has_exif(content)
        if follows_the_pixels:
            image.load()
    exif = image.info.get("exif")
    if not exif:
        return 1
    return orientation_in(exif)


def orientation_in(exif: bytes) -> int:
    """Return the orientation that EXIF notes; 1 if it notes none or is damaged."""
    notes = Image.Exif()
    with suppress(Exception):  # Pillow raises nearly anything on damaged EXIF
        notes.load(exif)
    orientation = notes.get(ORIENTATION, 1)
    # The standard has the numbers 1 to 8; cameras have also written 0.
    if orientation not in range(1, 9):
        return 1
    return orientation


def png_has_exif(png: bytes | mmap.mmap) -> bool:
    """Return whether a PNG has an EXIF, by a walk over its chunks."""
    place = len(PNG_START)
    while place + 8 <= len(png):
        if png[place + 4 : place + 8] == b"eXIf":
            return True
        place += 12 + int.from_bytes(png[place : place + 4], "big")
    return False


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
