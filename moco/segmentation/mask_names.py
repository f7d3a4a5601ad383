"""The names of predicted masks: those of the images, with their sub-folders."""

import os
import re
from collections.abc import Iterable, Sequence

from moco.data.files.formats import FORMAT_OF_ENDING
from moco.errors import InputError, printable

NUMBERED = re.compile(r".*\[(\d+)\]", re.DOTALL)
"""The name of an image in an array, such as ``digits.npz[12]``."""
PAGE = re.compile(r"(.*?)((?:#\d+)?)", re.DOTALL)
"""A file, and which of its pages."""
DIGITS = 6
"""Of the number of an image without a name, so that names are sorted like numbers."""


def mask_name(name: str, roots: Sequence[str]) -> str:
    """Return the path of an image's mask below the folder of masks, without its ending.

    Args:
        name: of the image: a path, or as `ArrayImages.name` makes it.
        roots: the folders of the images. Of several, the mask's path begins with the folder's name.

    Raises:
        InputError: the name leads out of the folder.
    """
    for root in roots:
        start = os.path.join(root, "")
        if name.startswith(start):
            below = name.removeprefix(start)
            if len(roots) > 1:
                below = os.path.join(os.path.basename(os.path.abspath(root)), below)
            return without_ending(below)
    numbered = NUMBERED.fullmatch(name)
    if numbered is not None:
        return numbered[1].zfill(DIGITS)
    path = without_ending(name.lstrip("/"))
    if not path or ".." in path.split("/") or "\0" in path:
        raise InputError(f"the image {printable(name)}: no mask can have that name")
    return path


def without_ending(path: str) -> str:
    """Return a path without the ending of an image file; ``#2`` for a page stays."""
    found = PAGE.fullmatch(path)
    assert found is not None
    file, page = found.groups()
    stem, ending = os.path.splitext(file)
    if ending.lower() in FORMAT_OF_ENDING:
        file = stem
    return file + page


def check_names(names: Iterable[str], roots: Sequence[str]) -> None:
    """Check that every image has a mask of its own.

    Args:
        names: of all images.
        roots: see `mask_name`.

    Raises:
        InputError: two images would have the same mask. The message names both.
    """
    image_of: dict[str, str] = {}
    for name in names:
        path = mask_name(name, roots)
        if path in image_of:
            raise InputError(same_mask(image_of[path], name, path))
        image_of[path] = name
    for path, name in image_of.items():
        # A folder a.png of images would take the place of the mask a.png.
        for number, char in enumerate(path):
            other = path[:number].removesuffix(".png")
            if char == "/" and path[:number].endswith(".png") and other in image_of:
                raise InputError(same_mask(image_of[other], name, other))


def same_mask(first: str, second: str, path: str) -> str:
    """Return the message about two images that would have the same mask."""
    return (
        f"{printable(first)} and {printable(second)} would have the same mask, "
        f"{printable(path)}.png; rename one, or predict them with an output each"
    )
