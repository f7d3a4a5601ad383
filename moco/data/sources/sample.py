"""A sample of a dataset's images, to learn their type, bands and values before a run."""

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from moco.data.files.images import (
    EncodedImage,
    UnreadableImage,
    header,
    pillow_warnings_ignored,
)
from moco.data.sources.own_dataset import DatasetImages, IterableImages
from moco.data.sources.pixel_values import SAMPLE_SIZE, PixelValues, settle_values
from moco.data.sources.shards import Sample, ShardedImages, images_in
from moco.data.sources.source import DataSource, FileImages, Images, reading_of
from moco.errors import InputError, printable
from moco.phases import counted

log = logging.getLogger(__name__)

NUM_FILES = 8  # whose pages are counted at the start
MOST_OF_ITERABLE = 8  # making the images of an iterable dataset may be expensive


def prepare_source(
    source: DataSource,
    data: Mapping[str, Any],
    mean: Sequence[float] | None,
    display: Any = None,
) -> PixelValues:
    """Let a dataset give the pixels that the model gets, and return how they are made.

    Args:
        source: it is changed in place.
        data: the settings of the data as plain data.
        mean, display: see `settle_values`.

    Raises:
        InputError: the settings fit no image, or the value range is missing.
    """
    command = f"data={data['name']}"
    if isinstance(data["root"], str):
        command += f" data.root={data['root']}"
    source.read_as(reading_of(data))
    problems: list[str] = []
    sample = list(counted(sample_of(source.train, problems), "looking at a sample"))
    if problems and not sample:
        what = "the only image cannot be read"
        if len(problems) > 1:
            what = f"none of {len(problems)} images can be read"
        raise InputError(f"data.root={data['root']}: {what}; {problems[0]}")
    value_range = data["value_range"]
    is_window = source.train.reading.dicom_window
    if value_range is None and (is_window or are_shares(source.train, sample)):
        value_range = [0, 1]
    tell_of_pages(source.train)
    values = settle_values(
        sample,
        bands=chosen_bands(data),
        value_range=value_range,
        nodata=data["nodata"],
        mean=mean,
        display=display,
        command=command,
    )
    source.prepare(values)
    log.info("the first images have %s, %s", sizes_in_words(sample), values.in_words())
    return values


def tell_of_pages(images: Images) -> None:
    """Log that files have several pages if only their first one is read."""
    if not isinstance(images, FileImages) or images.reading.joins_pages:
        return
    for number in range(min(NUM_FILES, len(images))):
        path = images.files()[number]
        if len(images) > len(images.files()):  # each page is an image
            return
        with pillow_warnings_ignored():
            try:
                num_pages = header(path).pages
            except UnreadableImage:
                continue
        if num_pages > 1:
            log.warning(
                "%s has %d pages or channels, and only the first is read; "
                "data.pages=channels joins them as bands, data.pages=each makes each an image",
                printable(path),
                num_pages,
            )
            return


def are_shares(images: Images, sample: Sequence[tuple[str, EncodedImage]]) -> bool:
    """Return whether these are a dataset's float images from 0 to 1, as torchvision makes them."""
    if not isinstance(images, (DatasetImages, IterableImages)):
        return False
    for _, image in sample:
        if image.dtype.kind != "f":
            return False
        pixels = image.pixels()
        # Written so that NaN is outside, too.
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            return False
    return bool(sample)


def sizes_in_words(sample: Sequence[tuple[str, EncodedImage]]) -> str:
    """Return the sizes of the images in a sample."""
    sizes = sorted({image.size for _, image in sample}, key=math.prod)
    if not sizes:
        return "no readable one among the first"
    words = []
    for height, width in dict.fromkeys([sizes[0], sizes[-1]]):
        words.append(f"{width} x {height} px")
    return " to ".join(words)


def chosen_bands(data: Mapping[str, Any]) -> Any:
    """Return the bands that are taken of the images of a dataset; None: all.

    If bands are in files of their own, the source reads the chosen ones alone.

    Args:
        data: the settings of the data as plain data.
    """
    if data.get("band_files") is not None:
        return None
    return data["bands"]


def sample_of(images: Images, problems: list[str]) -> Iterator[tuple[str, EncodedImage]]:
    """Yield names and images as they are in the files, at most `SAMPLE_SIZE`, evenly spaced.

    Of shards and iterable datasets these are the first images.

    Args:
        problems: gets what is wrong with each unreadable image.
    """
    if isinstance(images, ShardedImages):
        found = images_in(images.shards[0], images.max_image_pixels, raw=images.reading.raw)
        for sample in itertools.islice(found, SAMPLE_SIZE):
            if isinstance(sample, Sample):
                yield sample.name, sample.image
            else:
                problems.append(sample.reason)
        return
    if isinstance(images, IterableImages):
        items = itertools.islice(images.items(epoch=0), MOST_OF_ITERABLE)
        for number, item in enumerate(items):
            try:
                yield images.name(number), images.opened_item(number, item)
            except UnreadableImage as error:
                problems.append(str(error))
        return
    num_images = min(SAMPLE_SIZE, len(images))
    for index in np.linspace(0, len(images) - 1, num_images, dtype=int).tolist():
        try:
            yield images.name(index), images.opened(index)
        except UnreadableImage as error:
            problems.append(str(error))
