"""The pixels of one image in parts: of an image in memory, or of a raster that stays on disk."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from moco.data.augment.views import as_planes
from moco.data.files.encoded_image import NO_LIMIT, EncodedImage, UnreadableImage, Window
from moco.data.files.images import encoded, encoded_file, read_window
from moco.data.sources.pixel_values import PixelValues, PreparedImage
from moco.data.sources.source import Images
from moco.data.sources.tiles import PartOfFile, TileImages
from moco.errors import printable

READ_BY_WINDOWS = ("numpy", "tiff")
"""The readers that decode a part of a file alone, see `moco.data.files.images.read_window`."""
ROWS_AT_ONCE = 512
"""Rows of an image that are read together to make it smaller."""


@dataclass(frozen=True)
class Raster(PartOfFile):
    """An `EncodedImage` in a file, of which parts are decoded."""

    max_image_pixels: int
    raw: bool
    """Whether 8-bit images keep the bands of the file."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width), px."""
        return self.whole.size

    def part(self, window: Window) -> np.ndarray:
        """Return a part of the pixels, (height, width, bands).

        Raises:
            UnreadableImage: the part is damaged, or larger than an image may be.
        """
        limit = self.max_image_pixels
        return read_window(self.path, self.path, 0, *window, limit, raw=self.raw)

    def pixels(self) -> np.ndarray:
        """Return all pixels, (height, width, bands)."""
        return self.part(Window(0, 0, *self.size))


class RasterImages(Images):
    """The files of `TileImages`, each as one image of any size.

    Files whose format cannot be read in parts have to hold to the limit of pixels.

    Args:
        tiles: the windows of these files, prepared.
    """

    def __init__(self, tiles: TileImages) -> None:
        self.tiles = tiles
        self.values = tiles.values
        self.reading = tiles.reading

    def __len__(self) -> int:
        return len(self.tiles.files())

    def opened(self, index: int) -> EncodedImage:
        """See `Images`."""
        path, limit = self.name(index), self.tiles.max_image_pixels
        raw = self.reading.raw
        # By its path, so that the file is not read into memory.
        whole = encoded(path, path, NO_LIMIT, raw=raw)
        if whole.reader not in READ_BY_WINDOWS:
            return encoded_file(path, path, limit, raw=raw)
        return Raster(whole, path, limit, raw)

    def name(self, index: int) -> str:
        """Return the path."""
        return self.tiles.files()[index]


class ImageParts:
    """Read the parts of an image as the model gets them.

    Args:
        image: a `Raster` is read part by part. Any other image is decoded here.

    Raises:
        UnreadableImage: it is damaged.
    """

    def __init__(self, image: PreparedImage) -> None:
        self.image = image.image
        self.name = image.name
        self.values: PixelValues = image.values
        self.size = image.size
        self.pixels: np.ndarray | None = None
        if not isinstance(self.image, Raster):
            self.pixels = self.image.pixels()

    def read(self, top: int, left: int, height: int, width: int) -> Tensor:
        """Return a part, (bands, height, width), 8-bit or from 0 to 1.

        Args:
            top: first row, px.
            left: first column, px.
            height, width: px.

        Raises:
            UnreadableImage: it is damaged, or unlike the images of the dataset.
        """
        return as_planes(self._array(Window(top, left, height, width)))

    def smaller(self, step: int) -> np.ndarray:
        """Return every n-th pixel of every n-th row as an image for the eye.

        Args:
            step: n.

        Returns:
            (height / step, width / step, 3) uint8, rounded up.
        """
        height, width = self.size
        strips = []
        rows_at_once = -(-ROWS_AT_ONCE // step) * step
        for top in range(0, height, rows_at_once):
            num_rows = min(rows_at_once, height - top)
            strips.append(self._array(Window(top, 0, num_rows, width), step))
        return self.values.shown(np.concatenate(strips))

    def _array(self, window: Window, step: int = 1) -> np.ndarray:
        """Return a part (height, width, bands), of which every n-th pixel is taken."""
        if self.pixels is None:
            assert isinstance(self.image, Raster)
            pixels = self.image.part(window)
        else:
            pixels = self.pixels[window.rows, window.columns]
        pixels = pixels[::step, ::step]
        try:
            return self.values.array(pixels, self.image.band_names, self.image.no_data)
        except ValueError as error:
            raise UnreadableImage(f"{printable(self.name)}: {error}") from error
