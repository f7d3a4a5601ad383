"""Reading .npz archives without running code, and without memory for more than they hold.

Letters: M images.
"""

import math
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from moco.data.files.images import MAX_IMAGE_PIXELS

MOST_DEFLATED = 1032  # bytes that one byte of zlib's compression can stand for (https://zlib.net/zlib_tech.html)
# What zipfile and NumPy raise on damaged archives; zipfile has NotImplementedError, which is a RuntimeError, for what it
# cannot unpack, and RuntimeError for what is encrypted.
DAMAGED = (
    ValueError,
    OSError,
    EOFError,
    RuntimeError,
    MemoryError,
    KeyError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_arrays(
    path: str | Path, names: Sequence[str], max_image_pixels: int = MAX_IMAGE_PIXELS
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Those of the arrays that an archive holds; and the names of all that are in there.

    Raises:
        DAMAGED: it is not an archive, or not of plain arrays; see `check_members`.
    """
    with zipfile.ZipFile(path) as archive:
        present = [name.removesuffix(".npy") for name in archive.namelist()]
        wanted = [name for name in names if name in present]
        check_members(archive, wanted, max_image_pixels)
        return {name: read_member(archive, name) for name in wanted}, present


def check_members(archive: zipfile.ZipFile, names: Sequence[str], max_image_pixels: int) -> None:
    """Hold what the arrays claim against what the archive holds, before there is memory for any of them.

    Raises:
        ValueError: an array holds Python objects or too large images, another amount than its header says, or more than
            its compressed bytes can; or all together are more than this machine's memory.
    """
    total = 0
    for name in names:
        member = archive.getinfo(f"{name}.npy")
        if member.compress_type not in (
            zipfile.ZIP_STORED,
            zipfile.ZIP_DEFLATED,
        ):  # zipfile would unpack others unbounded
            raise ValueError(f"{name} is compressed in another way than NumPy does")
        with archive.open(member) as file:
            shape, dtype = read_header(file)
            claimed = file.tell() + math.prod(shape) * dtype.itemsize
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects, whose loading would run code")
        if claimed != member.file_size or claimed > MOST_DEFLATED * member.compress_size:
            raise ValueError(
                f"{name} says that it is {dtype} {shape}, {claimed:,} bytes, and is not"
            )
        if name.endswith("_images") and math.prod(shape[1:3]) > max_image_pixels:
            raise ValueError(
                f"{name} is {shape}: its images exceed data.max_image_pixels={max_image_pixels}"
            )
        total += claimed
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if total > memory:
        raise ValueError(
            f"its arrays take {total / 1e9:,.1f} GB, and this machine has {memory / 1e9:,.1f}"
        )


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of the array in an opened .npy file."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):  # 3 is for arrays with named fields
        raise ValueError(f"version {version} of NumPy's format")
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = read(file)
    return shape, dtype


def read_member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array of the archive; zipfile compares its checksum."""
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)
