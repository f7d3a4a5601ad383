"""Images whose bands lie in files of their own, as the bands of a satellite scene often do."""

import copy
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch

from moco.data.files.encoded_image import (
    BYTES_PER_RGB_PIXEL,
    EncodedImage,
    UnreadableImage,
)
from moco.data.files.images import encoded_file
from moco.data.files.listing import Listing, PathList
from moco.data.sources.label_files import natural_order
from moco.data.sources.pixel_values import as_list
from moco.data.sources.source import Images
from moco.errors import InputError, printable

log = logging.getLogger(__name__)

MISSING = -1
PLACEHOLDERS = {"{id}": r"(?P<id>.+)", "{band}": r"(?P<band>[^/]+)"}
"""What stands for the name of an image and for that of a band, as regular expressions."""
EXACT_IN_FLOAT32 = ("uint8", "uint16", "int16", "float16", "float32")


class BandFiles:
    """A template for the names of band files, such as ``{id}_B{band}.tif``.

    ``{id}`` stands for the name of an image, with its sub-folders, and ``{band}`` for the name of a
    band, which has no slash.

    Raises:
        InputError: one of the two is not there exactly once.
    """

    def __init__(self, template: str) -> None:
        self.template = template
        for placeholder in PLACEHOLDERS:
            if template.count(placeholder) != 1:
                raise InputError(
                    f"data.band_files={template}: expected {{id}} and {{band}} once each, such as "
                    "{id}_B{band}.tif"
                )
        expression = re.escape(template)
        for placeholder, part in PLACEHOLDERS.items():
            expression = expression.replace(re.escape(placeholder), part)
        self.pattern = re.compile(expression)

    def parsed(self, name: str) -> tuple[str, str] | None:
        """Return the image and the band that a file name tells, or None."""
        match = self.pattern.fullmatch(name)
        if match is None:
            return None
        return match["id"], match["band"]

    def name(self, image_id: str) -> str:
        """Return the name of an image: its files with ``{band}`` in place of the band."""
        return self.template.replace("{id}", image_id)


class BandFileImages(Images):
    """Images each of whose bands is in a file of its own.

    All bands have the size of the first one: others are resampled by bilinear interpolation.
    Integers are rounded. The type is the smallest one that holds the values of all bands.

    Args:
        names: of the images.
        paths: of the band files.
        files: (images, bands) int64, the place of each band's file in `paths`; `MISSING`: an image
            has no such file, and is unreadable.
        bands: the names of the bands.
        max_image_pixels: larger images are unreadable.
    """

    def __init__(
        self,
        names: Sequence[str],
        paths: PathList,
        files: np.ndarray,
        bands: Sequence[str],
        max_image_pixels: int,
    ) -> None:
        # Loader processes share a tensor's memory; an array would be copied to each of them.
        self.name_text, self.name_ends = shared(PathList.of(names))
        self.text, self.ends = shared(paths)
        self.files = torch.from_numpy(files)
        self.bands = tuple(bands)
        self.max_image_pixels = max_image_pixels

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """Return the path of the image's files, with ``{band}`` in place of the band."""
        return self.names()[index]

    def opened(self, index: int) -> "JoinedBands":
        """See `Images`."""
        files = self.files[index].tolist()
        paths = PathList(self.text.numpy(), self.ends.numpy())
        name = printable(self.name(index))
        missing = []
        for band, file in zip(self.bands, files, strict=True):
            if file == MISSING:
                missing.append(band)
        if missing:
            raise UnreadableImage(f"{name}: no file of band {printable(', '.join(missing))}")
        opened = []
        for file in files:
            path = paths[file]
            image = encoded_file(path, path, self.max_image_pixels, raw=True)
            if image.bands != 1:
                raise UnreadableImage(f"{printable(path)}: {image.bands} bands; expected one")
            opened.append(image)
        joined = JoinedBands(opened, self.bands)
        num_bytes = math.prod(joined.size) * joined.bands * joined.dtype.itemsize
        if num_bytes > BYTES_PER_RGB_PIXEL * self.max_image_pixels:
            raise UnreadableImage(
                f"{name}: {joined.bands} bands of {joined.size[1]} x {joined.size[0]} px and "
                f"{joined.dtype} exceed data.max_image_pixels={self.max_image_pixels}, which is "
                "for 8-bit RGB"
            )
        return joined

    def names(self) -> PathList:
        """Return the names of all images."""
        return PathList(self.name_text.numpy(), self.name_ends.numpy())

    def of_names(self, names: PathList) -> "BandFileImages":
        """Return the images with these names, in their order."""
        rows = self.names().places(names)
        part = copy.copy(self)  # the paths of the files are shared
        part.name_text, part.name_ends = shared(names)
        part.files = self.files[rows]
        return part


class JoinedBands:
    """An `EncodedImage` of several, which are its bands."""

    def __init__(self, images: Sequence[EncodedImage], band_names: tuple[str, ...]) -> None:
        self.images = images
        self.band_names = band_names
        self.size = images[0].size
        """(height, width) of the first band, px."""
        self.bands = len(images)
        dtypes = []
        no_data = set()
        for image in images:
            dtypes.append(image.dtype)
            no_data.add(image.no_data)
        self.dtype = np.result_type(*dtypes)
        self.no_data: float | None = None
        if len(no_data) == 1:
            self.no_data = no_data.pop()
        """The value of pixels without data, if all bands have the same."""

    def pixels(self) -> np.ndarray:
        """Return the bands, (height, width, bands), C-contiguous.

        Raises:
            UnreadableImage: a file is damaged.
        """
        joined = np.empty((*self.size, self.bands), self.dtype)
        for place, image in enumerate(self.images):
            joined[:, :, place] = resampled(image.pixels()[:, :, 0], self.size)
        return joined


def resampled(band: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a band (height, width) at another size by bilinear interpolation.

    Pixel centres are at half numbers, and pixels at the border are repeated, as in
    ``torch.nn.functional.interpolate(mode="bilinear", align_corners=False)``.
    """
    if band.shape == size:
        return band
    height, width = size
    values: np.ndarray
    if band.dtype.name in EXACT_IN_FLOAT32:
        values = band.astype(np.float32)
    else:
        values = band.astype(np.float64)
    values = cv2.resize(values, (width, height), interpolation=cv2.INTER_LINEAR)
    if np.issubdtype(band.dtype, np.integer):
        values = np.rint(values)
    return values.astype(band.dtype)


def shared(paths: PathList) -> tuple[torch.Tensor, torch.Tensor]:
    """Return text and ends of paths as tensors."""
    return torch.from_numpy(paths.text), torch.from_numpy(paths.ends)


def band_file_images(
    listing: Listing, roots: Sequence[str], template: str, bands: Any, max_image_pixels: int
) -> BandFileImages:
    """Return the images that the files below some folders make up, sorted by name.

    Files that the template does not fit are left out, with a line that counts them.

    Args:
        listing: of the folders.
        roots: the folders; names are relative to them.
        template: see `BandFiles`.
        bands: the names of the bands to take, in this order; 4 stands for 04, too. None takes all
            bands that any image has, in natural order.
        max_image_pixels: larger images are unreadable.

    Raises:
        InputError: the template or the names of the bands fit no file.
    """
    parse = BandFiles(template)
    place_of: dict[str, dict[str, int]] = {}  # the files of each image by band
    counts: Counter[str] = Counter()
    num_others = 0
    files_below = roots_and_names(listing.paths, roots)
    for place, (root, name) in enumerate(files_below):
        parsed = parse.parsed(name)
        if parsed is None:
            num_others += 1
            continue
        image_id, band = parsed
        image = os.path.join(root, parse.name(image_id))
        place_of.setdefault(image, {})[band] = place
        counts[band] += 1
    if not place_of:
        first = ", ".join(printable(name) for _, name in files_below[:2])
        raise InputError(f"data.band_files={template}: fits no file; the first are {first}")
    if num_others:
        log.info("data.band_files: left out %d files that it does not fit", num_others)
    chosen = sorted(counts, key=natural_order)
    if bands is not None:
        chosen = chosen_bands(bands, counts)
    names = sorted(place_of)
    files = np.full((len(names), len(chosen)), MISSING, np.int64)
    for row, name in enumerate(names):
        for column, band in enumerate(chosen):
            files[row, column] = place_of[name].get(band, MISSING)
    images = BandFileImages(names, listing.paths, files, chosen, max_image_pixels)
    log_bands(images)
    return images


def log_bands(images: BandFileImages) -> None:
    """Log the bands, the images that lack one, and the size that all bands get."""
    log.info("%d images of the bands %s", len(images), printable(", ".join(images.bands)))
    is_missing = images.files == MISSING
    is_incomplete = is_missing.any(dim=1)
    if is_incomplete.any():
        counts = []
        for band, number in zip(images.bands, is_missing.sum(dim=0).tolist(), strict=True):
            if number:
                counts.append(f"{printable(band)} {number}")
        log.warning(
            "%d images lack a band and are unreadable (%s); data.bands=[...] chooses bands",
            int(is_incomplete.sum()),
            ", ".join(counts),
        )
    complete = (~is_incomplete).nonzero().flatten().tolist()
    try:
        first = images.opened(complete[0])
    except (IndexError, UnreadableImage):
        return  # the run names what is unreadable
    others = []
    for band, image in zip(images.bands, first.images, strict=True):
        if image.size != first.size:
            others.append(f"{printable(band)} {image.size[1]} x {image.size[0]}")
    if others:
        log.info(
            "bands of other sizes are resampled to band %s, %d x %d px: %s; the first name in "
            "data.bands decides the size",
            printable(images.bands[0]),
            first.size[1],
            first.size[0],
            ", ".join(others),
        )


def roots_and_names(paths: PathList, roots: Sequence[str]) -> list[tuple[str, str]]:
    """Return the folder of each path, and its name relative to that folder."""
    prefixes = {root: os.path.join(root, "") for root in roots}
    names = []
    for path in paths:
        for root, prefix in prefixes.items():
            if path.startswith(prefix):
                names.append((root, path[len(prefix) :]))
                break
    return names


def chosen_bands(bands: Any, counts: Counter[str]) -> list[str]:
    """Return the names of the bands of the setting ``data.bands``.

    Raises:
        InputError: the setting is no list of names, or no file is of such a band.
    """
    wanted = as_list(bands)
    if not wanted:
        raise InputError("data.bands=[]: expected the names of the bands, or null for all")
    there = sorted(counts, key=natural_order)
    chosen = []
    for band in wanted:
        if str(band) in counts:
            chosen.append(str(band))
            continue
        equal = []
        for name in there:
            # YAML reads 04 as a number.
            if name.isdecimal() and str(int(name)) == str(band):
                equal.append(name)
        if len(equal) != 1:
            listed = printable(", ".join(there))
            raise InputError(f"data.bands={bands}: no file is of band {band}; there are {listed}")
        chosen += equal
    return chosen
