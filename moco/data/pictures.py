"""Reading pictures: any common format and pixel type to 8-bit RGB, masks to class numbers, folder trees to sorted lists.

Letters: H W pixels.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from moco.errors import InputError

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
MASK_MODES = ("1", "I", "I;16", "L", "P")  # Pillow's names of one whole number per pixel
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class UnreadablePicture(Exception):
    """A file that is not a picture that can be decoded; the message names the file and the reason."""


def read_picture(path: str) -> Image.Image:
    """The picture in a file, in mode RGB.

    Raises:
        UnreadablePicture: the file is missing, empty, cut short, too large to be real, or not a picture.
    """
    with pillow_warnings_ignored(), opened(path) as picture:
        return to_rgb(picture)


def read_mask(path: str) -> np.ndarray:
    """The numbers in a one-channel picture: (H, W) uint8, or int32 of a 16-bit file. A palette's indices, not its colours.

    Raises:
        UnreadablePicture: as of `read_picture`, or the picture has colours instead of numbers.
    """
    with pillow_warnings_ignored():
        return decoded_mask(path)


def decoded_mask(path: str) -> np.ndarray:
    """`read_mask` for threads; the caller has to ignore Pillow's warnings around all of them."""
    with opened(path) as picture:
        if picture.mode not in MASK_MODES:
            raise ValueError(f"mode {picture.mode}: expected one number per pixel (modes {', '.join(MASK_MODES)})")
        numbers = np.array(picture, dtype=np.int32 if picture.mode.startswith("I") else np.uint8)
        if picture.mode == "L":
            numbers //= 255 // (2 ** png_bit_depth(path) - 1)  # Pillow stretches grey of 2 and 4 bits to 0..255
        return numbers


def png_bit_depth(path: str) -> int:
    """Bits per sample, from the header of a PNG file; 8 of any other file."""
    with open(path, "rb") as file:
        start = file.read(25)  # signature, then the header's length, name, width, height and bit depth
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
def opened(path: str) -> Iterator[Image.Image]:
    """The picture in a file, its header read and its pixels not yet. Pillow's warnings pass.

    Raises:
        UnreadablePicture: for what Pillow raises here or inside the ``with`` block.
    """
    try:
        with Image.open(path) as picture:
            yield picture
    # Pillow's decoders raise these on damaged data; SyntaxError is its PNG reader's.
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, Image.DecompressionBombError) as error:
        raise UnreadablePicture(f"{path}: {error}") from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any Pillow picture as 8-bit RGB.

    16-bit values are scaled by 1/257, so that black and white stay black and white (Pillow's own conversion clips at
    255); transparent pixels are laid over white.

    Raises:
        ValueError: floating-point pixels, whose range is unknown.
    """
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; convert the picture to 8 or 16 bits")
    if picture.mode.startswith("I"):  # I;16, I;16B, and I, in which some Pillow versions hand out 16-bit files
        values = np.asarray(picture).astype(np.int64)
        return Image.fromarray(((values.clip(0, 65535) + 128) // 257).astype(np.uint8)).convert("RGB")
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def list_pictures(root: str | Path) -> list[str]:
    """Paths of all pictures below a folder, by extension, in sorted order; symbolic links are followed once.

    Raises:
        InputError: the folder does not exist or holds no pictures.
    """
    if not os.path.isdir(root):
        raise InputError(f"data.root={root}: no such folder")
    found: list[str] = []
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back into the tree
            folders.clear()
            continue
        seen.add(real)
        found += [os.path.join(folder, file) for file in files if file.lower().endswith(EXTENSIONS)]
    if not found:
        raise InputError(f"data.root={root}: no pictures in there (looked for {', '.join(EXTENSIONS)} at any depth)")
    return sorted(found)
