"""The distribution of the values of a dataset, band by band, from one pass over all images.

Values of 8 and 16 bits are counted one by one. Wider ones are counted in bins that are at most
0.025 % wide, so that one pass is enough and the memory stays small.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moco.data.files.images import EncodedImage, UnreadableImage
from moco.data.sources.pixel_values import band_indices

# Float32 has 23 bits of mantissa; 11 of them make bins of 0.025 to 0.05 % of a value.
BITS_DROPPED = 12
IMAGES_AT_ONCE = 64  # their counts are added together, which is faster than one by one
PERCENTS = (0.1, 50.0, 99.9)
SMALLEST_STD = 1e-3  # of a band whose values are all alike
NEAR_ZERO = 0.02  # of the range: a low end nearer to 0 is rounded to 0


@dataclass
class BandCounts:
    """How often the values of one band occur."""

    places: np.ndarray
    """(bins,) int64, sorted: the value for integers of up to 16 bits, else `bin_of`."""
    counts: np.ndarray
    """(bins,) int64."""
    total: float = 0.0
    """Sum of the values."""
    total_squares: float = 0.0
    lowest: float = np.inf
    highest: float = -np.inf
    num_nan: int = 0
    """Values that are NaN or infinite."""
    num_no_data: int = 0
    """Values that the file or the setting names as no data."""
    num_zeros: int = 0


@dataclass
class ImageCounts:
    """What a loader process found in one image."""

    bands: list[BandCounts]
    dtype: str
    size: tuple[int, int]
    """(height, width), px."""


@dataclass
class Reading:
    """How images are counted; called in loader processes with each of them."""

    selection: tuple[int | str, ...] | None
    no_data: float | None

    def __call__(self, image: EncodedImage) -> ImageCounts:
        """Return the counts of an image as it is in the file.

        Raises:
            UnreadableImage: it is damaged, or lacks a band.
        """
        try:
            return self._counted(image)
        except ValueError as error:
            raise UnreadableImage(str(error)) from error

    def _counted(self, image: EncodedImage) -> ImageCounts:
        pixels = image.pixels()
        if self.selection is not None:
            indices = band_indices(self.selection, pixels.shape[2], image.band_names)
            pixels = pixels[:, :, indices]
        no_data = self.no_data
        if no_data is None:
            no_data = image.no_data
        bands = []
        for band in range(pixels.shape[2]):
            bands.append(counted(pixels[:, :, band].ravel(), no_data))
        return ImageCounts(bands, str(pixels.dtype), pixels.shape[:2])


def counted(values: np.ndarray, no_data: float | None) -> BandCounts:
    """Return the counts of values of one band, (values,) of any type."""
    is_float = np.issubdtype(values.dtype, np.floating)
    num_nan = 0
    if is_float:
        finite = np.isfinite(values)
        num_nan = int(len(values) - finite.sum())
        values = values[finite]
    num_no_data = 0
    if no_data is not None and not np.isnan(no_data):
        is_missing = values == no_data
        num_no_data = int(is_missing.sum())
        values = values[~is_missing]
    places, counts = np.unique(bins_of(values), return_counts=True)
    found = BandCounts(places, counts, num_nan=num_nan, num_no_data=num_no_data)
    if len(values):
        doubles = values.astype(np.float64)
        found.total = float(doubles.sum())
        found.total_squares = float(np.square(doubles).sum())
        found.lowest = float(doubles.min())
        found.highest = float(doubles.max())
        found.num_zeros = int((values == 0).sum())
    return found


def is_counted_exactly(dtype: np.dtype[Any]) -> bool:
    """Return whether each value of a type has its own bin."""
    return dtype.kind in "iub" and dtype.itemsize <= 2


def bins_of(values: np.ndarray) -> np.ndarray:
    """Return the bin of each value, int64; larger values have larger numbers."""
    if is_counted_exactly(values.dtype):
        return values.astype(np.int64)
    bits = values.astype(np.float32).view(np.int32).astype(np.int64)
    # The bits of negative numbers grow with the size of the number.
    ordered = np.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))
    return ordered >> BITS_DROPPED


def middles_of(places: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Return the value in the middle of each bin, float64."""
    if is_counted_exactly(dtype):
        return places.astype(np.float64)
    ordered = (places << BITS_DROPPED) + (1 << (BITS_DROPPED - 1))
    bits = np.where(ordered >= 0, ordered, -ordered | 0x80000000)
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


@dataclass
class Statistics:
    """The counts of all images so far."""

    dtype: np.dtype[Any] | None = None
    bands: list[BandCounts] = field(default_factory=list)
    num_images: int = 0
    num_pixels: int = 0
    pending: list[ImageCounts] = field(default_factory=list)
    """Images whose counts are not in `bands` yet."""

    def add(self, image: ImageCounts) -> str:
        """Add the counts of an image; return what is wrong with it, or an empty text."""
        dtype = np.dtype(image.dtype)
        if self.dtype is None:
            self.dtype = dtype
            self.bands = [empty_counts() for _ in image.bands]
        if dtype != self.dtype or len(image.bands) != len(self.bands):
            return (
                f"{len(image.bands)} bands of {dtype}; the others have {len(self.bands)} of "
                f"{self.dtype}"
            )
        self.pending.append(image)
        self.num_images += 1
        self.num_pixels += image.size[0] * image.size[1]
        if len(self.pending) == IMAGES_AT_ONCE:
            self.finish()
        return ""

    def finish(self) -> None:
        """Add the counts of the pending images; call this after the last one."""
        for band, own in enumerate(self.bands):
            merge(own, [image.bands[band] for image in self.pending])
        self.pending = []

    def percentiles(self, band: int, percents: Sequence[float]) -> np.ndarray:
        """Return percentiles of a band's values: the smallest value that so many do not exceed."""
        assert self.dtype is not None
        counts = self.bands[band]
        cumulative = np.cumsum(counts.counts)
        if len(cumulative) == 0:
            return np.full(len(percents), np.nan)
        wanted = np.asarray(percents) / 100 * cumulative[-1]
        rows = np.searchsorted(cumulative, wanted.clip(1))
        rows = rows.clip(max=len(cumulative) - 1)
        values = middles_of(counts.places, self.dtype)[rows]
        # The middle of the outermost bins may lie outside the values.
        return values.clip(counts.lowest, counts.highest)

    def value_ranges(self, low: float, high: float, *, per_band: bool) -> list[list[float]]:
        """Return the value range for each band, or one for all.

        Args:
            low, high: percentiles.
        """
        ranges = []
        for band in range(len(self.bands)):
            ranges.append(self.percentiles(band, [low, high]).tolist())
        if not per_band:
            lows, highs = zip(*ranges, strict=True)
            ranges = [[min(lows), max(highs)]]
        return [rounded_range(low, high, self.is_unsigned) for low, high in ranges]

    @property
    def is_unsigned(self) -> bool:
        """Whether no value is negative."""
        return all(counts.lowest >= 0 for counts in self.bands)

    def mean_and_std(self, band: int, low: float, high: float) -> tuple[float, float]:
        """Return mean and standard deviation of a band, of values mapped to 0..1 and clipped."""
        assert self.dtype is not None
        counts = self.bands[band]
        num = counts.counts.sum()
        if num == 0:
            return np.nan, np.nan
        middles = middles_of(counts.places, self.dtype)
        values = ((middles - low) / (high - low)).clip(0, 1)
        mean = float((values * counts.counts).sum() / num)
        squares = np.square(values - mean)
        variance = float((squares * counts.counts).sum() / num)
        return mean, variance**0.5


def empty_counts() -> BandCounts:
    """Return the counts of no values."""
    return BandCounts(np.empty(0, np.int64), np.empty(0, np.int64))


def merge(own: BandCounts, others: Sequence[BandCounts]) -> None:
    """Add the counts of the others to `own`."""
    if not others:
        return
    all_places = [own.places]
    all_counts = [own.counts]
    for other in others:
        all_places.append(other.places)
        all_counts.append(other.counts)
    places, rows = np.unique(np.concatenate(all_places), return_inverse=True)
    counts = np.zeros(len(places), np.int64)
    np.add.at(counts, rows, np.concatenate(all_counts))
    own.places = places
    own.counts = counts
    for other in others:
        own.total += other.total
        own.total_squares += other.total_squares
        own.lowest = min(own.lowest, other.lowest)
        own.highest = max(own.highest, other.highest)
        own.num_nan += other.num_nan
        own.num_no_data += other.num_no_data
        own.num_zeros += other.num_zeros


def rounded_range(low: float, high: float, is_unsigned: bool) -> list[float]:
    """Return a value range that a person would write, which never is empty."""
    if is_unsigned and low <= NEAR_ZERO * high:
        low = 0.0
    low, high = float(f"{low:.4g}"), float(f"{high:.4g}")
    if not high > low:
        high = low + 1
    return [as_written(low), as_written(high)]


def as_written(number: float) -> float:
    """Return a whole number as an int, which is written without a point."""
    if number.is_integer():
        return int(number)
    return number


def figures_of(
    statistics: Statistics,
    names: Sequence[int | str] | None,
    low: float,
    high: float,
    *,
    per_band: bool,
) -> dict[str, Any]:
    """Return all figures as plain data.

    Args:
        statistics: of all images.
        names: of the bands; None: their numbers, from 1.
        low, high: percentiles that the proposed value range maps to 0 and 1.
        per_band: propose a value range for each band.

    Returns:
        ``images``, ``pixels``, ``type``; ``bands``, the figures of each; and ``settings``, the
        proposed settings by name.
    """
    ranges = statistics.value_ranges(low, high, per_band=per_band)
    value_range: Any = ranges
    if not per_band:
        value_range = ranges[0]
        ranges = ranges * len(statistics.bands)
    if names is None:
        names = range(1, len(statistics.bands) + 1)
    bands = []
    means = []
    stds = []
    for number, counts in enumerate(statistics.bands):
        num_valid = int(counts.counts.sum())
        num_missing = counts.num_nan + counts.num_no_data
        mean = counts.total / max(1, num_valid)
        variance = counts.total_squares / max(1, num_valid) - mean**2
        percentiles = statistics.percentiles(number, PERCENTS).tolist()
        bands.append(
            {
                "band": names[number],
                "min": counts.lowest,
                "max": counts.highest,
                "mean": mean,
                "std": math.sqrt(max(0.0, variance)),
                "percentiles": dict(zip(map(str, PERCENTS), percentiles, strict=True)),
                "share_of_zeros": counts.num_zeros / max(1, num_valid),
                "share_without_data": num_missing / max(1, num_valid + num_missing),
            }
        )
        mapped_mean, mapped_std = statistics.mean_and_std(number, *ranges[number])
        means.append(float(f"{mapped_mean:.4g}"))
        stds.append(float(f"{max(mapped_std, SMALLEST_STD):.4g}"))
    return {
        "images": statistics.num_images,
        "pixels": statistics.num_pixels,
        "type": str(statistics.dtype),
        "bands": bands,
        "settings": {
            "data.value_range": value_range,
            "augmentation.mean": means,
            "augmentation.std": stds,
        },
    }
