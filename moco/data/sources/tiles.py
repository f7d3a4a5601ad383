"""Windows of large rasters as images, each read on its own."""

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from moco.data.files.encoded_image import NO_LIMIT, EncodedImage, UnreadableImage, Window
from moco.data.files.images import encoded, image_size, pillow_warnings_ignored, read_window
from moco.data.files.listing import PathList, start_of
from moco.data.sources.source import MOST_IMAGES, Images
from moco.errors import InputError, printable

log = logging.getLogger(__name__)

NUM_THREADS = 16  # a file system on a network answers slowly, but many requests at a time
PROGRESS_SECONDS = 10.0


class TileImages(Images):
    """The windows of a grid over each file.

    The windows of the last column and the last row are moved inwards, so that they have the full
    size and all pixels are used. A side of a raster that is shorter than a window stays as it is.

    Args:
        paths: of the files.
        sizes: (files, 2) int64, height and width of each, px; zeros for a file that cannot be read,
            which counts as one image.
        tile: side of the windows, px.
        max_image_pixels: larger windows are unreadable, and so is a larger strip or tile of a file.
    """

    def __init__(
        self, paths: PathList, sizes: np.ndarray, tile: int, max_image_pixels: int
    ) -> None:
        # Loader processes share a tensor's memory; an array would be copied to each of them.
        self.text = torch.from_numpy(paths.text)
        self.ends = torch.from_numpy(paths.ends)
        self.sizes = torch.from_numpy(sizes)
        grid = np.maximum(1, -(-sizes // tile))  # rows and columns of windows
        self.grid = torch.from_numpy(grid)
        self.tile_ends = torch.from_numpy(np.cumsum(grid.prod(axis=1)))
        self.tile = tile
        self.max_image_pixels = max_image_pixels

    def __len__(self) -> int:
        return int(self.tile_ends[-1])

    def opened(self, index: int) -> "Tile":
        """See `Images`."""
        path, window = self.find(index)
        name = self.name(index)
        # By its path, so that the file is not read into memory.
        whole = encoded(path, name, NO_LIMIT, raw=self.reading.raw)
        if window.height == 0:
            raise UnreadableImage(f"{name}: could not be read when the files were listed")
        return Tile(whole, path, name, window, self.max_image_pixels, self.reading.raw)

    def name(self, index: int) -> str:
        """Return PATH#top,left; the path alone if the file is one image."""
        path, window = self.find(index)
        file = self.file_of(index)
        if int(self.grid[file].prod()) == 1:
            return path
        return f"{path}#{window.top},{window.left}"

    def num_tiles(self) -> np.ndarray:
        """Return the number of images of each file, (files,) int64."""
        return np.diff(self.tile_ends.numpy(), prepend=0)

    def of_files(self, paths: PathList) -> "TileImages":
        """Return the images of these files, in their order."""
        rows = self.files().places(paths)
        return TileImages(paths, self.sizes.numpy()[rows], self.tile, self.max_image_pixels)

    def files(self) -> PathList:
        """Return the paths of the files, each once."""
        return PathList(self.text.numpy(), self.ends.numpy())

    def file_of(self, index: int) -> int:
        """Return the place of an image's file in `files`."""
        return int(np.searchsorted(self.tile_ends.numpy(), index, side="right"))

    def find(self, index: int) -> tuple[str, Window]:
        """Return the path of an image's file, and which part of it the image is."""
        file = self.file_of(index)
        number = index - start_of(self.tile_ends, file)
        row, column = divmod(number, int(self.grid[file, 1]))
        height, width = self.sizes[file].tolist()
        top = max(0, min(row * self.tile, height - self.tile))
        left = max(0, min(column * self.tile, width - self.tile))
        window = Window(top, left, min(self.tile, height), min(self.tile, width))
        return self.files()[file], window


@dataclass(frozen=True)
class PartOfFile:
    """What a part of a file has in common with the whole."""

    whole: EncodedImage
    """Its pixels are not read."""
    path: str

    @property
    def bands(self) -> int:
        """The number of bands."""
        return self.whole.bands

    @property
    def dtype(self) -> np.dtype:
        """The type of the pixels."""
        return self.whole.dtype

    @property
    def no_data(self) -> float | None:
        """The value that stands for missing pixels, if the file says one."""
        return self.whole.no_data

    @property
    def band_names(self) -> tuple[str, ...] | None:
        """The names of the bands, if the file has them."""
        return self.whole.band_names


@dataclass(frozen=True)
class Tile(PartOfFile):
    """An `EncodedImage` that is a part of a file."""

    name: str
    """For messages."""
    window: Window
    max_image_pixels: int
    raw: bool
    """Whether 8-bit images keep the bands of the file."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width), px."""
        return self.window.height, self.window.width

    def pixels(self) -> np.ndarray:
        """Return the pixels, (height, width, bands), see `read_window`.

        Raises:
            UnreadableImage: the part is damaged.
        """
        window = self.window
        return read_window(
            self.path,
            self.name,
            0,
            window.top,
            window.left,
            window.height,
            window.width,
            self.max_image_pixels,
            raw=self.raw,
        )


def tile_images(paths: PathList, tile: int, max_image_pixels: int) -> TileImages:
    """Read the size of each file from its header, and return the windows of all files.

    Args:
        paths: of the files.
        tile: side of the windows, px.
        max_image_pixels: see `TileImages`.

    Raises:
        InputError: there are too many windows.
    """
    sizes = np.zeros((len(paths), 2), np.int64)
    for number, size in enumerate(sizes_of_files(paths)):
        sizes[number] = size
    # As floats, since the header of a damaged file can claim any size.
    num_windows = np.ceil(sizes / tile).prod(axis=1)
    if num_windows.sum() > MOST_IMAGES:
        largest = printable(paths[int(num_windows.argmax())])
        raise InputError(
            f"data.tile={tile}: {num_windows.sum():.3g} windows, more than {MOST_IMAGES:,}; "
            f"the largest file is {largest}"
        )
    images = TileImages(paths, sizes, tile, max_image_pixels)
    log.info("data.tile=%d: %s windows of %s files", tile, f"{len(images):,}", f"{len(paths):,}")
    return images


def sizes_of_files(paths: PathList) -> Iterator[tuple[int, int]]:
    """Yield (height, width) of the image in each file, px; (0, 0) if it cannot be read."""
    last_report = time.perf_counter()
    with pillow_warnings_ignored(), ThreadPoolExecutor(NUM_THREADS) as pool:
        for number, size in enumerate(pool.map(size_of_file, paths)):
            yield size
            if time.perf_counter() - last_report > PROGRESS_SECONDS:
                last_report = time.perf_counter()
                log.info("read the size of %s of %s files", f"{number:,}", f"{len(paths):,}")


def size_of_file(path: str) -> tuple[int, int]:
    """Return (height, width) of the image in a file, px; (0, 0) if it cannot be read."""
    try:
        return image_size(path, NO_LIMIT)
    except UnreadableImage:
        return 0, 0
