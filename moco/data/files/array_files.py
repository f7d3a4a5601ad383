"""Reading NumPy's files: ``.npy`` by memory map, and ``.npz``. No objects are unpickled.

An array is (height, width), (height, width, bands) or (bands, height, width): the band axis is the
shorter one of the first and the last, and the last if they are equal. Four axes are a stack of
images. In an archive, each array is one image.
"""

import io
import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, NamedTuple

import numpy as np

from moco.data.files.archives import NUMPY_COMPRESSIONS
from moco.data.files.encoded_image import (
    ImageHeader,
    Request,
    Window,
    first_bytes,
    image_type,
    joined_header,
    path_or_file,
    values_at,
)

ZIP_START = b"PK"
NPY = ".npy"
HEADER_BYTES = 2**14  # NumPy's headers are shorter: it refuses more than 10,000 characters


class StoredArray(NamedTuple):
    """An array in a file, as its header describes it."""

    name: str
    """In its archive, else empty."""
    shape: tuple[int, ...]
    dtype: np.dtype
    is_fortran: bool
    """Whether it is stored in columns, as in Fortran."""
    start: int
    """Where its values start, bytes."""

    @property
    def num_values(self) -> int:
        """The number of its values."""
        return math.prod(self.shape)


def num_pages(request: Request) -> int:
    """Return the number of images: the first of four axes, or the arrays of a .npz."""
    if is_archive(request):
        return len(stored_in_archive(request))
    shape = stored_in_file(request).shape
    if len(shape) < 4:
        return 1
    return shape[0]


def read_header(request: Request) -> ImageHeader:
    """Return what is known of an image before it is read."""
    if is_archive(request):
        chosen = chosen_of(stored_in_archive(request), request.page)
    else:
        chosen = stored_pages(request)
    headers = []
    names = []
    for stored in chosen:
        headers.append(image_header(stored, request))
        names.append(stored.name)
    header = joined_header(headers)
    # Arrays of several bands do not tell what each band is.
    if is_archive(request) and len(names) == header.bands > 1:
        return header._replace(band_names=tuple(names))
    return header


def read_pixels(request: Request, header: ImageHeader) -> np.ndarray:
    """Return the pixels of an image, (height, width, bands)."""
    return read_window(request, Window(0, 0, *header.size))


def read_window(request: Request, window: Window) -> np.ndarray:
    """Return a part of an image, (height, width, bands)."""
    parts = []
    for array in read_arrays(request):
        part = as_image(array)[window.rows, window.columns]
        if part.dtype == bool and not request.numbers:
            part = part * np.uint8(255)  # black and white
        parts.append(part)
    return np.concatenate(parts, axis=2)


def is_archive(request: Request) -> bool:
    """Return whether the file is a .npz."""
    return first_bytes(request.source, len(ZIP_START)) == ZIP_START


def chosen_of(pages: Sequence[StoredArray], page: int | None) -> Sequence[StoredArray]:
    """Return the page that is asked for, or all.

    Raises:
        EOFError: there is no such page.
    """
    if page is None:
        return pages
    if page >= len(pages):
        raise EOFError(f"there is no image {page + 1} among {len(pages)}")
    return [pages[page]]


def stored_pages(request: Request) -> Sequence[StoredArray]:
    """Return the chosen images of a .npy, which are equal but for their places."""
    stored = stored_in_file(request)
    if len(stored.shape) != 4:
        return chosen_of([stored], request.page)
    return chosen_of([stored._replace(shape=stored.shape[1:])] * stored.shape[0], request.page)


def image_header(stored: StoredArray, request: Request) -> ImageHeader:
    """Return the header of the image in an array."""
    if request.numbers:
        dtype = stored.dtype.newbyteorder("=")
    else:
        dtype = image_type(stored.dtype)
    shape = stored.shape
    if len(shape) not in (2, 3):
        raise ValueError(f"an array of shape {shape}; expected (H, W), (H, W, B) or (B, H, W)")
    if len(shape) == 2:
        height, width, bands = *shape, 1
    elif shape[0] < shape[2]:
        bands, height, width = shape
    else:
        height, width, bands = shape
    return ImageHeader((height, width), bands, dtype)


def as_image(array: np.ndarray) -> np.ndarray:
    """Return a view of an array as (height, width, bands)."""
    if array.ndim == 2:
        return array[..., None]
    if array.shape[0] < array.shape[2]:
        return array.transpose(1, 2, 0)
    return array


def stored_in_file(request: Request) -> StoredArray:
    """Return what a .npy file holds.

    Raises:
        ValueError: it is damaged or shorter than its header says.
    """
    stored = read_array_header(io.BytesIO(first_bytes(request.source, HEADER_BYTES)), "")
    if isinstance(request.source, bytes):
        num_bytes = len(request.source)
    else:
        num_bytes = os.path.getsize(request.source)
    check_size(stored, num_bytes)
    return stored


def stored_in_archive(request: Request) -> list[StoredArray]:
    """Return the arrays in a .npz, in its order.

    Raises:
        ValueError: it holds no array, or one that NumPy did not write.
    """
    arrays = []
    with opened_archive(request.source) as archive:
        for member in archive.infolist():
            if not member.filename.endswith(NPY):
                continue
            if member.compress_type not in NUMPY_COMPRESSIONS:
                raise ValueError(f"{member.filename} is compressed in another way than NumPy does")
            with archive.open(member) as file:
                stored = read_array_header(file, member.filename.removesuffix(NPY))
            check_size(stored, member.file_size)
            arrays.append(stored)
    if not arrays:
        raise ValueError("an archive without an array")
    return arrays


@contextmanager
def opened_archive(source: bytes | str) -> Iterator[zipfile.ZipFile]:
    """Open a .npz."""
    with zipfile.ZipFile(path_or_file(source)) as archive:
        yield archive


def read_array_header(file: IO[bytes], name: str) -> StoredArray:
    """Return what NumPy's header at the start of a file says.

    Raises:
        ValueError: it is damaged, or of a structured array.
    """
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"NumPy's format {version}, which is for records")
    if dtype.hasobject or dtype.names is not None or min(shape, default=0) < 1:
        raise ValueError(f"an array of {dtype} of shape {shape}")
    return StoredArray(name, tuple(shape), dtype, is_fortran, file.tell())


def check_size(stored: StoredArray, num_bytes: int) -> None:
    """Raise ValueError if a file is shorter than its header says."""
    expected = stored.start + stored.num_values * stored.dtype.itemsize
    if num_bytes < expected:
        raise ValueError(f"truncated: {num_bytes} bytes, its header says {expected}")


def read_arrays(request: Request) -> Iterator[np.ndarray]:
    """Yield the arrays of the chosen images; those of a .npy are views of the file."""
    if not is_archive(request):
        stored = stored_in_file(request)
        values = values_at(request.source, stored.dtype, stored.num_values, stored.start)
        if stored.is_fortran:
            array = values.reshape(stored.shape, order="F")
        else:
            array = values.reshape(stored.shape)
        if array.ndim != 4:
            yield array
        elif request.page is None:
            yield from array
        else:
            yield array[request.page]
        return
    chosen = chosen_of(stored_in_archive(request), request.page)
    with opened_archive(request.source) as archive:
        for stored in chosen:
            with archive.open(stored.name + NPY) as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
                # zipfile compares the checksum only when a member is read to its end.
                if file.read(1):
                    raise ValueError(f"{stored.name} holds more than its header says")
            yield array
