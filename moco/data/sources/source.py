"""The contract of a source of images: what every dataset becomes before training or evaluation.

`ArrayImages` and `FileImages` are the two common ways to hold images; other sources have their own.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from moco.data.files.images import (
    MAX_IMAGE_PIXELS,
    DecodedImage,
    EncodedImage,
    encoded_file,
    to_rgb,
)
from moco.data.files.listing import PathList, start_of
from moco.errors import InputError, printable

log = logging.getLogger(__name__)

NUM_NAMED = 10
"""Classes that a warning names."""


class Images(Protocol):
    """RGB images by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Image.Image:
        """Return the decoded image. Raises `UnreadableImage` if the file is damaged."""
        return Image.fromarray(self.opened(index).pixels())

    def opened(self, index: int) -> EncodedImage:
        """Return the image with a known size, not yet decoded.

        Raises:
            UnreadableImage: the file is damaged.
        """
        ...

    def name(self, index: int) -> str:
        """Return the name of an image for messages; for a file it is the path."""
        ...


class ArrayImages(Images):
    """Images in memory, `tensor` (images, height, width, 3) uint8 RGB.

    Args:
        array: uint8 of shape (images, height, width), or with a last axis of 1 (grey), 3 (RGB)
            or 4 (RGBA) channels. Transparent pixels become white.
        what: what to call the array in messages.
    """

    def __init__(self, array: np.ndarray, what: str) -> None:
        has_channels = array.ndim == 4 and array.shape[-1] in (1, 3, 4)
        if array.dtype != np.uint8 or not (array.ndim == 3 or has_channels) or len(array) == 0:
            raise InputError(
                f"{what}: expected uint8 of shape (M, H, W) or (M, H, W, 1 or 3 or 4), "
                f"got {array.dtype} {array.shape}"
            )
        if array.ndim == 3:
            array = array[..., None]
        if array.shape[-1] == 4:
            array = np.stack([np.asarray(to_rgb(Image.fromarray(image))) for image in array])
        # Loader processes share a tensor's memory; an array would be copied to each of them. Grey
        # images have three channels in the memory of one.
        self.tensor = torch.from_numpy(np.ascontiguousarray(array)).expand(-1, -1, -1, 3)
        self.what = what

    def __len__(self) -> int:
        return len(self.tensor)

    def opened(self, index: int) -> DecodedImage:
        """See `Images`."""
        return DecodedImage(np.ascontiguousarray(self.tensor[index].numpy()))

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
        path, page, _ = self._find_page(index)
        return encoded_file(path, self.name(index), self.max_image_pixels, page)

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
        file = int(np.searchsorted(self.page_ends.numpy(), index, side="right"))
        start = start_of(self.page_ends, file)
        end = int(self.page_ends[file])
        return paths[file], index - start, end - start


@dataclass(frozen=True)
class Labelled:
    """Images with a class number each."""

    images: Images
    labels: np.ndarray
    """(images,) int64, 0 or more; numbers may have gaps."""
    class_names: tuple[str, ...] | None = None
    """The name of each class by its number; None if only the numbers are known."""

    def class_name(self, number: int) -> str:
        """Return the name of a class, or its number as text."""
        if self.class_names is None or not 0 <= number < len(self.class_names):
            return str(number)
        return self.class_names[number]


def warn_of_missing_classes(bank: Labelled, queries: Labelled) -> None:
    """Warn of the classes that only one of bank and queries has, if there are any."""
    in_bank = set(np.unique(bank.labels).tolist())
    in_queries = set(np.unique(queries.labels).tolist())
    for side, missing in (("bank", in_queries - in_bank), ("queries", in_bank - in_queries)):
        if missing:
            first = sorted(missing)[:NUM_NAMED]
            names = ", ".join(printable(bank.class_name(number)) for number in first)
            rest = ", ..." if len(missing) > NUM_NAMED else ""
            count = f"{len(missing)} of {len(in_bank | in_queries)} classes"
            log.warning("%s have no image among the %s: %s%s", count, side, names, rest)


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
