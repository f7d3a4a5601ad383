"""Reading images: any common format and pixel type to 8-bit RGB, masks to class numbers.

Letters: H W pixels.
"""

import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from moco.errors import printable

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Those of the extensions, whatever a file is called. Pillow would open others as well, and it hands PostScript to an
# interpreter.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_IMAGE_PIXELS = 178_956_970  # Pillow's own: from there on it takes an image for an attack; half a gigabyte as RGB
MASK_MODES = ("1", "I", "I;16", "L", "P")  # Pillow's names of one whole number per pixel
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class UnreadableImage(Exception):
    """A file that is not an image that can be decoded; the message names the file and the reason."""


def read_mask(path: str, max_image_pixels: int = MAX_IMAGE_PIXELS) -> np.ndarray:
    """The numbers in a one-channel image: (H, W) uint8, or int32 of a 16-bit file. A palette's indices, not its colours.

    Args:
        max_image_pixels: an image of more is not decoded.

    Raises:
        UnreadableImage: the file is missing, empty, cut short, too large, not an image, or not even a regular file, or
            the image has colours instead of numbers.
    """
    with pillow_warnings_ignored():
        return decoded_mask(path, max_image_pixels)


def decoded_mask(path: str, max_image_pixels: int) -> np.ndarray:
    """`read_mask` for threads; the caller has to ignore Pillow's warnings around all of them."""
    with opened(path, max_image_pixels) as image:
        if image.mode not in MASK_MODES:
            raise ValueError(
                f"mode {image.mode}: expected one number per pixel (modes {', '.join(MASK_MODES)})"
            )
        numbers = np.array(image, dtype=np.int32 if image.mode.startswith("I") else np.uint8)
        if image.mode == "L":
            numbers //= 255 // (
                2 ** png_bit_depth(path) - 1
            )  # Pillow stretches grey of 2 and 4 bits to 0..255
        return numbers


def png_bit_depth(path: str) -> int:
    """Bits per sample, from the header of a PNG file; 8 of any other file."""
    with open(path, "rb") as file:
        start = file.read(
            25
        )  # signature, then the header's length, name, width, height and bit depth
    return start[24] if start.startswith(PNG_SIGNATURE) else 8


@contextmanager
def pillow_warnings_ignored() -> Iterator[None]:
    """Inside, there are no warnings: Pillow warns of odd metadata and of sizes that it still reads.

    For one thread at a time: the filters belong to the whole process, and the last of several threads to leave would put
    back what another one had set.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def opened(
    source: str | bytes, max_image_pixels: int, name: str | None = None
) -> Iterator[Image.Image]:
    """The image in a file, its header read and its pixels not yet. Pillow's warnings pass.

    Sets Pillow's own limit in this process, since its decoders also meet sizes that are not in the header: frames, tiles.

    Args:
        source: the file's path, or its content.
        max_image_pixels: an image of more is refused.
        name: what to call it in a message; of a path the path itself.

    Raises:
        UnreadableImage: for what Pillow raises here or inside the ``with`` block.
    """
    Image.MAX_IMAGE_PIXELS = max_image_pixels / 2  # type: ignore[assignment]  # Pillow refuses what is twice as large
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with errors_named(name or str(source), max_image_pixels, file):
        if isinstance(file, str) and not stat.S_ISREG(os.stat(file).st_mode):
            raise OSError(
                "not a regular file"
            )  # a pipe would wait for a writer, a device may do anything
        with Image.open(file, formats=FORMATS) as image:
            if 0 in image.size:
                raise ValueError(f"{image.width} x {image.height} px")
            yield image


@contextmanager
def errors_named(name: str, max_image_pixels: int, file: object = None) -> Iterator[None]:
    """Inside, whatever goes wrong with an image becomes an `UnreadableImage` that names it.

    Args:
        file: what Pillow was handed, which its messages repeat.
    """
    try:
        yield
    except UnreadableImage:
        raise
    except Image.DecompressionBombError as error:
        size, _, _ = str(error).partition(
            " exceeds"
        )  # Image size (200000000 pixels) exceeds limit of ...
        raise UnreadableImage(
            f"{printable(name)}: {size} exceeds data.max_image_pixels={max_image_pixels}"
        ) from error
    except Exception as error:  # on damaged data Pillow's decoders raise nearly anything
        raise UnreadableImage(f"{printable(name)}: {reason(error, file)}") from error


def reason(error: Exception, file: object) -> str:
    """What an error says, without the file that the operating system's and Pillow's errors repeat."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return printable(str(error).removesuffix(f" {file!r}")) or type(error).__name__


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB.

    16-bit values are scaled by 1/257, so that black and white stay black and white (Pillow's own conversion clips at
    255); transparent pixels are laid over white.

    Raises:
        ValueError: floating-point pixels, whose range is unknown.
    """
    if image.mode == "F":
        raise ValueError(
            "floating-point pixels have no agreed range; convert the image to 8 or 16 bits"
        )
    if image.mode.startswith(
        "I"
    ):  # I;16, I;16B, and I, in which some Pillow versions hand out 16-bit files
        values = np.asarray(image).clip(0, 65535).astype(np.int32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
