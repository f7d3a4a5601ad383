"""Images with a class number for every pixel, by index."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from moco.data.files.images import MAX_IMAGE_PIXELS, read_mask
from moco.data.sources.source import FileImages


class Pair(NamedTuple):
    """The files of an image and of its mask."""

    image: str
    mask: str
    name: str = ""
    """The path of the image below the folder of its part of the dataset, without its ending."""


class MaskedImages:
    """Images and their masks, decoded when they are asked for.

    A mask is an image file with one number per pixel: the class, or the dataset's `ignore_index`
    where there is none.

    Args:
        pairs: the files, one pair for each of M images.
        sizes: (M, 2) height and width of each image, px.
        max_image_pixels: an image or mask with more pixels is unreadable.
    """

    def __init__(
        self, pairs: Sequence[Pair], sizes: np.ndarray, max_image_pixels: int = MAX_IMAGE_PIXELS
    ) -> None:
        self.images = FileImages([pair.image for pair in pairs], max_image_pixels)
        self.masks = FileImages([pair.mask for pair in pairs], max_image_pixels)
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the pixels that the model gets, and the mask (height, width).

        Raises:
            UnreadableImage: one of the two files is damaged.
        """
        mask_path = self.masks.name(index)
        return self.images[index], read_mask(mask_path, self.masks.max_image_pixels)

    def name(self, index: int) -> str:
        """Return the path of the image."""
        return self.images.name(index)

    def name_below(self, root: Any, index: int) -> str:
        """Return the path of the image without the dataset's folder `root`."""
        name = self.name(index)
        if isinstance(root, str):
            name = name.removeprefix(root.rstrip("/") + "/")
        return name
