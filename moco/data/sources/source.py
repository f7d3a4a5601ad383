"""The contract of a source of images: what every dataset becomes before training or evaluation.

`ArrayImages` and `FileImages` are the two common ways to hold images; other sources have their own.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from moco.data.files.encoded_image import image_type
from moco.data.files.images import (
    MAX_IMAGE_PIXELS,
    DecodedImage,
    EncodedImage,
    encoded_file,
)
from moco.data.files.listing import PathList, start_of
from moco.data.sources.label_files import first_few
from moco.data.sources.pixel_values import PixelValues
from moco.errors import InputError, printable

log = logging.getLogger(__name__)

COMMON_BANDS = (1, 3, 4)
MOST_IMAGES = 2**31
"""More images can only be a damaged or hostile file; the order of an epoch would take 16 GiB."""


@dataclass(frozen=True)
class Reading:
    """How files are decoded."""

    raw: bool = False
    """Give 8-bit images with the bands of the file. Without it they become RGB."""
    joins_pages: bool = False
    """Join the pages of a file as bands."""
    dicom_window: bool = False
    """Apply the window that a DICOM file proposes for display."""


READING = ("bands", "dicom_window")
"""The settings of the data that `reading_of` takes, beside ``pages``."""
PIXEL_SETTINGS = (*READING, "nodata", "value_range")
"""The settings of the data that say how files become the pixels that the model gets."""


def reading_of(data: Mapping[str, Any]) -> Reading:
    """Return how files are decoded.

    Args:
        data: the settings ``bands``, ``pages`` and ``dicom_window``, at least.
    """
    return Reading(
        raw=data["bands"] is not None,
        joins_pages=data["pages"] == "channels",
        dicom_window=bool(data["dicom_window"]),
    )


NUM_NAMED = 10
"""Classes that a warning names."""


class Images(Protocol):
    """Images by index."""

    values: PixelValues | None = None
    """Makes the pixels that the model gets; None leaves them as they are in the file."""
    reading: Reading = Reading()
    """How files are decoded."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray:
        """Return the pixels that the model gets. Raises `UnreadableImage` if a file is damaged."""
        return self.prepared(index).pixels()

    def prepared(self, index: int) -> EncodedImage:
        """Return the image with the pixels that the model gets, not yet decoded.

        Raises:
            UnreadableImage: the file is damaged.
        """
        image = self.opened(index)
        if self.values is None:
            return image
        return self.values.of(image, self.name(index))

    def opened(self, index: int) -> EncodedImage:
        """Return the image as it is in the file, with a known size, not yet decoded.

        Raises:
            UnreadableImage: the file is damaged.
        """
        ...

    def name(self, index: int) -> str:
        """Return the name of an image for messages; for a file it is the path."""
        ...


SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32}
"""For types of which torch knows little, one of the same size."""


class StoredLayout(NamedTuple):
    """How images lie in one array."""

    size: tuple[int, int]
    """(height, width), px."""
    bands: int
    dtype: np.dtype
    """In the byte order of this machine."""
    has_band_axis: bool
    is_band_axis_second: bool

    @property
    def is_grey(self) -> bool:
        """Whether these are 8-bit images of one band."""
        return self.bands == 1 and self.dtype == np.uint8

    def bands_last(self, array: np.ndarray) -> np.ndarray:
        """Return images (..., height, width, bands) of an array with this layout."""
        if not self.has_band_axis:
            return array[..., None]
        if self.is_band_axis_second:
            return np.moveaxis(array, -3, -1)
        return array


def stored_layout(shape: tuple[int, ...], dtype: np.dtype, what: str) -> StoredLayout:
    """Return how images lie in an array.

    The shape is (images, height, width), (images, height, width, bands) or (images, bands, height,
    width), see `is_band_axis_second`.

    Args:
        shape: of the array.
        dtype: see `image_type`.
        what: what to call the array in messages.

    Raises:
        InputError: these are no images.
    """
    expected = "(M, H, W), (M, H, W, bands) or (M, bands, H, W)"
    if len(shape) not in (3, 4) or 0 in shape:
        raise InputError(f"{what}: expected images of shape {expected}, got {dtype} {shape}")
    if shape[0] > MOST_IMAGES:
        raise InputError(f"{what}: {shape[0]:,} images, more than {MOST_IMAGES:,}")
    try:
        image_dtype = image_type(dtype)
    except ValueError as error:
        raise InputError(f"{what}: {error}") from error
    has_band_axis = len(shape) == 4
    is_second = has_band_axis and is_band_axis_second(shape)
    axes = list(shape[1:])
    bands = 1
    if has_band_axis:
        place = -1
        if is_second:
            place = 0
        bands = axes.pop(place)
    if bands == 4 and image_dtype == np.uint8:
        log.info(
            "%s: the fourth of 4 channels counts as a band and not as transparency, which an array "
            "does not tell; data.bands=[1,2,3] leaves it out",
            printable(what),
        )
    height, width = axes
    return StoredLayout((height, width), bands, image_dtype, has_band_axis, is_second)


def is_band_axis_second(shape: tuple[int, ...]) -> bool:
    """Return whether four axes are (images, bands, height, width) and not (..., bands).

    1, 3 or 4 on the last axis are channels. Otherwise two equal neighbours are height and width of
    square images, and of images that are not square the shorter axis holds the bands.
    """
    _, second, third, last = shape
    if last in COMMON_BANDS or second == third:
        return False
    return third == last or second < last


class ArrayImages(Images):
    """Images in memory, `tensor` (images, height, width, bands) of the array's own type.

    8-bit images of one band are grey and have three equal bands in `tensor`, so that 8-bit images
    of one or three bands are RGB.

    Args:
        array: see `stored_layout`.
        what: what to call the array in messages.

    Raises:
        InputError: it is no such array.
    """

    def __init__(self, array: np.ndarray, what: str) -> None:
        layout = stored_layout(array.shape, array.dtype, what)
        pixels = layout.bands_last(array)
        pixels = np.ascontiguousarray(pixels, dtype=layout.dtype)
        # Loader processes share a tensor's memory; an array would be copied to each of them.
        self.tensor = torch.from_numpy(pixels)
        self.is_grey = layout.is_grey
        if layout.is_grey:
            # Three channels in the memory of one.
            self.tensor = self.tensor.expand(-1, -1, -1, 3)
        self.what = what

    def __len__(self) -> int:
        return len(self.tensor)

    def batch(self, pixels: Tensor) -> Tensor:
        """Return images of `tensor` as the model gets them, (n, bands, height, width).

        Args:
            pixels: (n, height, width, bands of the array), on any device.

        Returns:
            uint8 RGB, or float32 from 0 to 1.
        """
        if self.is_grey and self.reading.raw:
            pixels = pixels[..., :1]
        if self.values is not None:
            pixels = self.values.batch(pixels)
        # Whole images are copied as they lie in memory. On a CPU this is several times as fast as
        # choosing from images in planes.
        return pixels.permute(0, 3, 1, 2).contiguous()

    def chosen(self, pixels: Tensor, rows: Tensor) -> Tensor:
        """Return the rows of `pixels`, which is `tensor` on any device."""
        if pixels.dtype not in SIGNED:
            return pixels.index_select(0, rows)
        # torch has few operations for these types.
        signed = pixels.view(SIGNED[pixels.dtype])
        return signed.index_select(0, rows).view(pixels.dtype)

    def opened(self, index: int) -> DecodedImage:
        """See `Images`."""
        pixels = self.tensor[index]
        if self.is_grey and self.reading.raw:
            pixels = pixels[..., :1]
        return DecodedImage(np.ascontiguousarray(pixels.numpy()))

    def name(self, index: int) -> str:
        """See `Images`."""
        return f"{self.what}[{index}]"


class FileImages(Images):
    """Images in files, decoded when they are asked for.

    Args:
        max_image_pixels: larger images are unreadable.
        num_pages: (files,) number of images in each file; None takes the first image of each file.
    """

    def __init__(
        self,
        paths: Sequence[str],
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        num_pages: np.ndarray | None = None,
    ) -> None:
        if not isinstance(paths, PathList):
            paths = PathList.of(paths)
        # Loader processes share a tensor's memory; a list of millions of str would be copied.
        self.text = torch.from_numpy(paths.text)
        self.ends = torch.from_numpy(paths.ends)
        if num_pages is None:
            num_pages = np.ones(len(paths), np.int64)
        self.page_ends = torch.from_numpy(np.cumsum(num_pages))
        self.max_image_pixels = max_image_pixels

    def __len__(self) -> int:
        return int(self.page_ends[-1])

    def opened(self, index: int) -> EncodedImage:
        """See `Images`."""
        path, number, _ = self._find_page(index)
        page = None  # all pages
        if not self.reading.joins_pages:
            page = number
        return encoded_file(
            path,
            self.name(index),
            self.max_image_pixels,
            page,
            raw=self.reading.raw,
            window=self.reading.dicom_window,
        )

    def name(self, index: int) -> str:
        """Return the path; images of a file with several get #1, #2, ... behind it."""
        path, page, num_pages = self._find_page(index)
        if num_pages == 1:
            return path
        return f"{path}#{page + 1}"

    def files(self) -> PathList:
        """Return the paths of the files, each once."""
        return PathList(self.text.numpy(), self.ends.numpy())

    def _find_page(self, index: int) -> tuple[str, int, int]:
        """Return an image's path, its page in that file, and the number of pages of the file."""
        paths = self.files()
        # `page_ends` holds for each file how many images there are up to its end.
        file = int(np.searchsorted(self.page_ends.numpy(), index, side="right"))
        start = start_of(self.page_ends, file)
        end = int(self.page_ends[file])
        return paths[file], index - start, end - start


def numbered_class(number: int) -> str:
    """Return what tables, plots and messages call a class that has no name."""
    return f"class {number}"


def classes_in_words(names: Sequence[str]) -> list[str]:
    """Return the names of classes for tables, plots and messages: ``class 3`` without a name.

    Args:
        names: one for each class. Where nobody named the classes, it is the number as text.
    """
    numbers = range(len(names))
    if list(names) == list(map(str, numbers)):
        return list(map(numbered_class, numbers))
    return list(names)


@dataclass(frozen=True)
class Labelled:
    """Images with a class number each."""

    images: Images
    labels: np.ndarray
    """(images,) int64, 0 or more; numbers may have gaps."""
    class_names: tuple[str, ...] | None = None
    """The name of each class by its number; None if only the numbers are known."""
    label_sets: np.ndarray | None = None
    """(label numbers, classes) bool, the classes that each label number stands for, of images with
    several classes each. None: a label is the number of a class."""

    def class_name(self, number: int) -> str:
        """Return the name of a class, or its number as text."""
        if self.class_names is None or not 0 <= number < len(self.class_names):
            return str(number)
        return self.class_names[number]

    def class_in_words(self, number: int) -> str:
        """Return the name of a class for tables, plots and messages: ``class 3`` without a name."""
        if number >= len(self.class_names or ()):
            return numbered_class(number)
        return self.class_name(number)

    def label_name(self, label: int) -> str:
        """Return the name of the class, or the names of the classes, of an image's label."""
        if self.label_sets is None or label < 0:
            return self.class_in_words(label)
        numbers = np.flatnonzero(self.label_sets[label]).tolist()
        names = [self.class_in_words(number) for number in numbers]
        return " + ".join(names) or "no class"

    def targets_of(self, labels: np.ndarray) -> np.ndarray:
        """Return the class numbers of labels (rows,), or (rows, classes) bool for label sets."""
        if self.label_sets is None:
            return labels
        sets: np.ndarray = self.label_sets[labels]
        return sets

    def share_a_class(self, label: int, other: int) -> bool:
        """Return whether images with these two labels have a class in common."""
        if self.label_sets is None or label < 0 or other < 0:
            return label == other
        return bool((self.label_sets[label] & self.label_sets[other]).any())

    def classes_there(self) -> set[int]:
        """Return the numbers of the classes that at least one image has."""
        labels = np.unique(self.labels)
        if self.label_sets is None:
            return set(labels.tolist())
        return set(np.flatnonzero(self.label_sets[labels].any(axis=0)).tolist())


def warn_of_missing_classes(bank: Labelled, queries: Labelled) -> None:
    """Warn of the classes that only one of bank and queries has, if there are any."""
    in_bank = bank.classes_there()
    in_queries = queries.classes_there()
    for side, missing in (("bank", in_queries - in_bank), ("queries", in_bank - in_queries)):
        if missing:
            names = first_few(map(bank.class_in_words, sorted(missing)), NUM_NAMED)
            count = f"{len(missing)} of {len(in_bank | in_queries)} classes"
            log.warning("%s have no image among the %s: %s", count, side, names)


@dataclass(frozen=True)
class DataSource:
    """The images that a run trains on, and the labelled images that the kNN monitor compares."""

    train: Images
    bank: Labelled | None
    """Labelled training images; None without labels."""
    queries: Labelled | None
    """Labelled images that are not in the bank; None without labels."""
    image_size: int
    """Side at which the dataset is usually used, px."""
    groups: np.ndarray | None = None
    """(images of `train`,) int64, the group of each, see `moco.data.sources.groups`; -1: unknown.
    None: the dataset has no groups."""

    def sets(self) -> list[Images]:
        """Return training images, bank and queries, as far as there are such."""
        sets = [self.train]
        for side in (self.bank, self.queries):
            if side is not None:
                sets.append(side.images)
        return sets

    def read_as(self, reading: Reading) -> None:
        """Decode all files in this way."""
        for images in self.sets():
            images.reading = reading

    def prepare(self, values: PixelValues) -> None:
        """Give the model pixels with these values, of all images."""
        for images in self.sets():
            images.values = values
