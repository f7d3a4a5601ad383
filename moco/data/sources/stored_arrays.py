"""Images in one array of a file that stays on disk: HDF5, zarr, and a NumPy file.

Only the rows that are asked for are read. Each process opens the file for itself. Nothing in a file
is run: Python objects and the codec that unpickles are refused.
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moco.data.files.encoded_image import IMAGE_TYPES, ImageHeader, check_memory
from moco.data.files.images import DecodedImage, UnreadableImage
from moco.data.sources.folders import is_held_out
from moco.data.sources.label_sets import is_matrix_of_classes, numbered_sets
from moco.data.sources.source import (
    DataSource,
    Images,
    Labelled,
    StoredLayout,
    stored_layout,
)
from moco.errors import InputError, near_path, printable, unknown_name
from moco.extras import install_command

NPY_START = b"\x93NUMPY"
LARGEST_IMAGE_SIZE = 224
"""The usual side of images in px, unless they are smaller."""
MOST_NAMED = 10
PACKAGES = {"hdf5": "h5py", "zarr": "zarr"}
"""What reads a kind of file that an extra of this project is for. The extra has the kind's name."""
UNSAFE_CODEC = "pickle"
"""The name of numcodecs' codec that runs what is in the file."""


@dataclass(eq=False)
class StoredImages(Images):
    """Some rows of an array in a file."""

    open_array: Callable[[], Any]
    """Opens the file, and returns the array."""
    layout: StoredLayout
    what: str
    """What to call the file in names of images."""
    rows: Tensor
    """(images,) int64, where each image is in the array."""
    array: Any = None
    """The array, if this process has opened the file."""

    def __getstate__(self) -> dict[str, Any]:
        # An open file cannot be sent to another process.
        return self.__dict__ | {"array": None}

    def __len__(self) -> int:
        return len(self.rows)

    def opened(self, index: int) -> DecodedImage:
        """Return the image, decoded.

        Raises:
            UnreadableImage: its part of the file is damaged.
        """
        if self.array is None:
            self.array = self.open_array()
        try:
            row = np.asarray(self.array[int(self.rows[index])])
        except Exception as error:  # the codecs of chunks raise nearly any exception
            reason = printable(str(error)) or type(error).__name__
            raise UnreadableImage(f"{printable(self.name(index))}: {reason}") from error
        pixels = np.ascontiguousarray(self.layout.bands_last(row), dtype=self.layout.dtype)
        if self.layout.is_grey:
            pixels = np.repeat(pixels, 3, axis=2)
        return DecodedImage(pixels)

    def name(self, index: int) -> str:
        """Return FILE[row]."""
        return f"{self.what}[{int(self.rows[index])}]"


def npy_source(root: str, max_image_pixels: int) -> DataSource:
    """Return the images of a ``.npy`` file, mapped into memory, without labels.

    Raises:
        InputError: the file is damaged, or holds no images.
    """
    return stored_source(NpyFile(root), root, max_image_pixels=max_image_pixels)


def hdf5_source(root: str, **settings: Any) -> DataSource:
    """Return the images of an HDF5 file; see `stored_source`."""
    check_package("hdf5")
    return stored_source(Hdf5File(root), root, **settings)


def zarr_source(root: str, **settings: Any) -> DataSource:
    """Return the images of a zarr group or array; see `stored_source`."""
    check_package("zarr")
    return stored_source(ZarrFile(root), root, **settings)


def check_package(kind: str) -> None:
    """Raise InputError if the package that reads a kind of file is not installed."""
    package = PACKAGES[kind]
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise InputError(
            f"data={kind} needs {package}: {install_command(kind)} ({error})"
        ) from error


@dataclass(frozen=True)
class NpyFile:
    """A ``.npy`` file, which is one array without a name."""

    path: str

    def arrays(self) -> dict[str, Any]:
        """Return the arrays of the file by name; an array alone has the name ''."""
        return {"": np.load(self.path, mmap_mode="r", allow_pickle=False)}


@dataclass(frozen=True)
class Hdf5File:
    """An HDF5 file."""

    path: str

    def arrays(self) -> dict[str, Any]:
        """Return the arrays of the file by name. Links to other files are not followed."""
        import h5py

        found = {}

        def note(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset):
                found[name] = item

        # The file stays open as long as one of its arrays is in use.
        file = h5py.File(self.path, "r", locking="best-effort")
        file.visititems(note)
        return found


@dataclass(frozen=True)
class ZarrFile:
    """A zarr folder: an array, or a group of arrays."""

    path: str

    def arrays(self) -> dict[str, Any]:
        """Return the arrays of the folder by name; an array alone has the name ''.

        Raises:
            ValueError: an array is packed by a codec that runs what is in the file.
        """
        import zarr

        # A local store, so that no name is taken for an address on the network.
        store = zarr.storage.LocalStore(self.path, read_only=True)
        root = zarr.open(store, mode="r")
        if isinstance(root, zarr.Array):
            found = {"": root}
        else:
            found = {}
            for name, member in root.members(max_depth=None):
                if isinstance(member, zarr.Array):
                    found[name] = member
        for name, array in found.items():
            for codec in (*array.filters, *array.compressors):
                if getattr(codec, "codec_id", "") == UNSAFE_CODEC:
                    raise ValueError(f"array '{name}' is packed by {UNSAFE_CODEC}, which runs code")
        return found


StoredFile = NpyFile | Hdf5File | ZarrFile


@dataclass(frozen=True)
class ArrayOpener:
    """Open one array of a file, in any process."""

    file: StoredFile
    key: str

    def __call__(self) -> Any:
        return self.file.arrays()[self.key]


def stored_source(
    file: StoredFile,
    root: str,
    *,
    max_image_pixels: int,
    image_key: str | None = None,
    label_key: str | None = None,
    held_out: float = 0,
) -> DataSource:
    """Return the images of a file as a source.

    With labels, a hash of each image's number says whether it is in the bank or held out as a query
    of the kNN monitor. Training uses all images.

    Args:
        file: at the path `root`.
        max_image_pixels: images that take more memory than 8-bit RGB of so many pixels are refused.
        image_key: the array of the images; None: the only one of three or four axes.
        label_key: the array of the labels: whole numbers from 0, (images,) or (images, 1); or 0 and
            1, (images, classes), for images with several classes each. None: there are no labels.
        held_out: fraction of the images that are queries, from 0 to 1.

    Raises:
        InputError: the file is missing or damaged, or the arrays are no images and labels.
    """
    where = f"data.root={printable(root)}"
    if not os.path.exists(root):
        raise InputError(f"{where}: no such file{near_path(root)}")
    try:
        arrays = dict(sorted(file.arrays().items()))
    except Exception as error:  # each library raises what it likes on a damaged file
        reason = printable(str(error)) or type(error).__name__
        raise InputError(f"{where}: cannot be read ({reason})") from error
    key = chosen_image_key(arrays, image_key, where)
    array = arrays[key]
    what = where
    if key:
        what = f"{where}: {printable(key)}"
    layout = stored_layout(array.shape, np.dtype(array.dtype), what)
    try:
        check_memory(ImageHeader(layout.size, layout.bands, layout.dtype), max_image_pixels)
    except ValueError as error:
        raise InputError(f"{what}: {error}") from error
    rows = torch.arange(array.shape[0])
    train = StoredImages(ArrayOpener(file, key), layout, root, rows)
    image_size = min(max(layout.size), LARGEST_IMAGE_SIZE)
    source = DataSource(train, None, None, image_size)
    if label_key is None:
        return source
    if label_key not in arrays:
        raise InputError(f"data.label_key: {unknown_name('array', label_key, arrays)}")
    what = f"data.label_key={label_key}"
    labels, label_sets = read_labels(arrays[label_key], len(train), what)
    names = (str(row).encode() for row in range(len(train)))
    is_query = is_held_out(names, held_out)
    # A monitor needs images on both sides.
    if is_query.all() or not is_query.any():
        return replace(source, bank=Labelled(train, labels, label_sets=label_sets))
    sides = []
    for is_chosen in (~is_query, is_query):
        part = replace(train, rows=rows[torch.from_numpy(is_chosen)])
        sides.append(Labelled(part, labels[is_chosen], label_sets=label_sets))
    return replace(source, bank=sides[0], queries=sides[1])


def chosen_image_key(arrays: dict[str, Any], image_key: str | None, where: str) -> str:
    """Return the name of the array of the images.

    Raises:
        InputError: there is no such array, or there are several.
    """
    if image_key is not None:
        if image_key not in arrays:
            raise InputError(f"data.image_key: {unknown_name('array', image_key, arrays)}")
        return image_key
    candidates = []
    for key, array in arrays.items():
        if array.ndim in (3, 4) and np.dtype(array.dtype).name in IMAGE_TYPES:
            candidates.append(key)
    if len(candidates) == 1:
        return candidates[0]
    listed = []
    for key in (candidates or list(arrays))[:MOST_NAMED]:
        listed.append(f"{printable(key)} {arrays[key].dtype} {tuple(arrays[key].shape)}")
    there = ", ".join(listed) or "nothing"
    if candidates:
        raise InputError(
            f"{where}: several arrays could be the images ({there}); give "
            f"data.image_key={printable(candidates[0])} or another"
        )
    raise InputError(f"{where}: no array of images in there (found {there})")


def read_labels(array: Any, num_images: int, what: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Return labels (images,) int64, and the classes that they stand for, see `Labelled`.

    Raises:
        InputError: they are not one class number for each image, nor 0 and 1 for each class, or
            cannot be read.
    """
    dtype, shape = np.dtype(array.dtype), tuple(array.shape)
    is_integer = dtype.kind in "iub"
    values = None
    if is_integer and len(shape) in (1, 2) and shape[0] == num_images:
        try:
            values = np.asarray(array[:])
        except Exception as error:  # as in `StoredImages.opened`
            raise InputError(f"{what}: cannot be read ({printable(str(error))})") from error
        if is_matrix_of_classes(values, num_images):
            return numbered_sets(values)
    if values is None or values.size != num_images or (values < 0).any():
        raise InputError(
            f"{what}: expected one class number (0 or more) for each of the {num_images} images, "
            f"or a row of 0 and 1, got {dtype} {shape}"
        )
    return values.reshape(-1).astype(np.int64), None


def is_npy(path: str) -> bool:
    """Return whether a file is a ``.npy`` file, by its first bytes."""
    if not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(NPY_START)) == NPY_START
