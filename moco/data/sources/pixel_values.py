"""From the values in files to those that the model gets: bands, no-data, value range.

Everything that reads images for a model gets one of two kinds: uint8 (height, width, 3) RGB, which
is as it was in the file; or float32 (height, width, bands) from 0 to 1, for all other images.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moco.data.files.images import EncodedImage, UnreadableImage
from moco.errors import InputError, printable

log = logging.getLogger(__name__)

SAMPLE_SIZE = 64  # images that are looked at before a run
RGB_BANDS = 3
UINT8_RANGE = (0.0, 255.0)
STRETCH = (2, 98)  # percentiles that plots show as black and white
MOST_CLIPPED = 0.01  # a larger share of clipped values is a warning
LEAST_USED = 0.25  # a smaller share of the value range is a warning


@dataclass(frozen=True)
class PixelValues:
    """How the arrays of a dataset's files become images for the model."""

    bands: int
    """Of the result."""
    dtype: np.dtype[Any]
    """Of the arrays in the files."""
    selection: tuple[int | str, ...] | None = None
    """The bands to take, in this order: numbers from 1, or names. None takes all."""
    low: tuple[float, ...] | None = None
    """The value of each band that becomes 0. None: the images are 8-bit RGB and stay as they are.
    """
    high: tuple[float, ...] | None = None
    """The value of each band that becomes 1."""
    no_data: float | None = None
    """The value of pixels without data. None: what the file says. NaN and infinity are such, too.
    """
    fill: tuple[float, ...] | None = None
    """What pixels without data become in each band, from 0 to 1. None: 0."""
    display: tuple[int, ...] | None = None
    """The bands of the result that plots show as red, green and blue, or as grey, from 1. None:
    the first three, or the only one."""

    @property
    def is_float(self) -> bool:
        """Whether the result is float32 from 0 to 1, and not 8-bit RGB."""
        return self.low is not None

    def of(self, image: EncodedImage, name: str) -> "PreparedImage":
        """Return an image that gives its pixels with these values.

        Args:
            image: as it is in the file.
            name: for messages.
        """
        return PreparedImage(image, name, self)

    def array(
        self, pixels: np.ndarray, names: Sequence[str] | None = None, no_data: float | None = None
    ) -> np.ndarray:
        """Return pixels (height, width, bands of the file) as the model gets them.

        Args:
            names: of the bands in the file.
            no_data: the file's own value of pixels without data.

        Raises:
            ValueError: the pixels have another type, or lack a band.
        """
        self.check(pixels.dtype, pixels.shape[2], names)
        if self.selection is not None:
            pixels = pixels[:, :, band_indices(self.selection, pixels.shape[2], names)]
        if not self.is_float:
            return np.ascontiguousarray(pixels)
        if self.no_data is not None:
            no_data = self.no_data
        return self.unit(as_tensor(pixels), no_data).numpy()

    def batch(self, pixels: Tensor) -> Tensor:
        """Return images in memory (n, height, width, bands) as the model gets them, on any device.

        Raises:
            ValueError: they lack a band.
        """
        if self.selection is not None:
            pixels = pixels[..., band_indices(self.selection, pixels.shape[3], None)]
        if not self.is_float:
            return pixels
        return self.unit(pixels, self.no_data)

    def check(self, dtype: np.dtype[Any], bands: int, names: Sequence[str] | None = None) -> None:
        """Raise ValueError if an image is unlike those that these values are for."""
        if dtype != self.dtype and not (dtype.kind == self.dtype.kind == "f"):
            raise ValueError(f"{described(dtype, bands)}; the dataset has {self.dtype}")
        if self.selection is not None:
            band_indices(self.selection, bands, names)
        elif bands != self.bands:
            raise ValueError(f"{described(dtype, bands)}; the dataset has {self.bands}")

    def unit(self, pixels: Tensor, no_data: float | None = None) -> Tensor:
        """Return values of the chosen bands as float32 from 0 to 1.

        Args:
            pixels: (..., bands) of the files' type, after the selection.
            no_data: the value of pixels without data.
        """
        assert self.low is not None
        assert self.high is not None
        # Float32 holds all values of 16 bits exactly, but not those of 32.
        precise = torch.float64
        if pixels.dtype.itemsize <= 2:
            precise = torch.float32
        low = torch.tensor(self.low, dtype=precise, device=pixels.device)
        high = torch.tensor(self.high, dtype=precise, device=pixels.device)
        missing = missing_values(pixels, no_data)
        values = pixels.to(precise) - low
        values = values.div_(high - low).clamp_(0, 1).to(torch.float32)
        if missing is not None:
            fill = torch.tensor(self.fill or (0.0,), dtype=torch.float32, device=pixels.device)
            values = torch.where(missing, fill, values)
        return values

    def shown(self, pixels: np.ndarray) -> np.ndarray:
        """Return an image for the eye, (height, width, 3) uint8.

        8-bit RGB stays as it is. Of other images the bands of `display` are stretched from their
        2nd to their 98th percentile.

        Args:
            pixels: (height, width, bands), uint8 or from 0 to 1.
        """
        if pixels.dtype == np.uint8 and self.display is None:
            return pixels
        chosen = self.display
        if chosen is None:
            chosen = (1,)
            if pixels.shape[2] >= RGB_BANDS:
                chosen = (1, 2, 3)
        planes = []
        for band in chosen:
            planes.append(stretched(pixels[:, :, band - 1]))
        return np.stack(planes * (RGB_BANDS // len(planes)), axis=2)

    def in_words(self) -> str:
        """Return bands, type and value range for the log."""
        words = described(self.dtype, self.bands)
        if self.selection is not None:
            words += f" ({', '.join(map(str, self.selection))})"
        if self.low is None or self.high is None:
            return words
        pairs = set(zip(self.low, self.high, strict=True))
        if len(pairs) > 1:
            return f"{words}; each band's range becomes 0 to 1"
        return f"{words}; {self.low[0]:g} to {self.high[0]:g} becomes 0 to 1"

    def described(self) -> dict[str, Any]:
        """Return what the values depend on, as plain data for the key of a cache."""
        settings: dict[str, Any] = {
            "bands": self.bands,
            "dtype": str(self.dtype),
            "selection": self.selection,
            "low": self.low,
            "high": self.high,
            "no_data": self.no_data,
            "fill": self.fill,
        }
        for name, value in settings.items():
            # JSON has no tuples, and what is read from it is compared with this.
            if isinstance(value, tuple):
                settings[name] = list(value)
        return settings


def as_tensor(pixels: np.ndarray) -> Tensor:
    """Return an array as a tensor, which nobody writes to."""
    # PyTorch warns of memory that it must not write to, such as that of a file.
    return torch.from_numpy(np.require(pixels, requirements=["C", "W"]))


def missing_values(pixels: Tensor, no_data: float | None) -> Tensor | None:
    """Return which values are no data, a bool for each; None if there cannot be any."""
    missing = None
    if pixels.dtype.is_floating_point:
        missing = ~torch.isfinite(pixels)
    if no_data is not None and not np.isnan(no_data):
        # Compared in double precision, since the value may not fit the type.
        equal = pixels.double() == no_data
        if missing is None:
            return equal
        missing |= equal
    return missing


@dataclass(frozen=True)
class PreparedImage:
    """An `EncodedImage` whose pixels are as the model gets them."""

    image: EncodedImage
    name: str
    """For messages."""
    values: PixelValues
    no_data: float | None = None
    """Always None: there is no such value any more."""
    band_names: tuple[str, ...] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width), px."""
        return self.image.size

    @property
    def bands(self) -> int:
        """The number of bands."""
        return self.values.bands

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8 or float32."""
        if self.values.is_float:
            return np.dtype(np.float32)
        return np.dtype(np.uint8)

    def pixels(self) -> np.ndarray:
        """Return uint8 (height, width, 3) RGB, or float32 (height, width, bands) from 0 to 1.

        Raises:
            UnreadableImage: the data is damaged, or unlike that of the dataset.
        """
        image = self.image
        try:
            return self.values.array(image.pixels(), image.band_names, image.no_data)
        except ValueError as error:
            raise UnreadableImage(f"{printable(self.name)}: {error}") from error


def band_indices(
    selection: Sequence[int | str], bands: int, names: Sequence[str] | None
) -> list[int]:
    """Return the places of the chosen bands, counted from 0.

    Raises:
        ValueError: a number is out of range, or the file has no band of that name.
    """
    indices = []
    for chosen in selection:
        if isinstance(chosen, int):
            if not 1 <= chosen <= bands:
                raise ValueError(f"has no band {chosen}, only 1 to {bands}")
            indices.append(chosen - 1)
        elif names is not None and chosen in names:
            indices.append(list(names).index(chosen))
        else:
            there = "its bands have no names"
            if names:
                there = f"its bands are {', '.join(names)}"
            raise ValueError(f"has no band '{chosen}'; {there}")
    return indices


def stretched(plane: np.ndarray) -> np.ndarray:
    """Return a band (height, width) as uint8, its 2nd to its 98th percentile as 0 to 255."""
    low, high = np.percentile(plane, STRETCH)
    if high <= low:
        low, high = 0, 1
    share = ((plane - low) / (high - low)).clip(0, 1)
    return np.rint(255 * share).astype(np.uint8)


def described(dtype: np.dtype[Any], bands: int) -> str:
    """Return type and number of bands in words."""
    if bands == 1:
        return f"1 band of {dtype}"
    return f"{bands} bands of {dtype}"


class Sampled(NamedTuple):
    """An image of the sample that is looked at before a run, decoded."""

    pixels: np.ndarray
    """(height, width, bands) of the file's type, with the chosen bands."""
    no_data: float | None
    """The value of pixels without data, as the file says."""

    def values_and_missing(self, nodata: float | None) -> tuple[Tensor, Tensor | None]:
        """Return the values as float64, and which of them are no data; None if there cannot be any.

        Args:
            nodata: the setting, which counts more than what the file says.
        """
        if nodata is None:
            nodata = self.no_data
        pixels = as_tensor(self.pixels)
        return pixels.double(), missing_values(pixels, nodata)


def settle_values(
    sample: Iterable[tuple[str, EncodedImage]],
    *,
    bands: Any = None,
    value_range: Any = None,
    nodata: float | None = None,
    mean: Sequence[float] | None = None,
    display: Any = None,
    command: str = "data=NAME data.root=PATH",
) -> PixelValues:
    """Return how the images of a dataset are read, by a sample of them.

    The most frequent type and number of bands count. 8-bit RGB images are not decoded for it.

    Args:
        sample: names and images, not decoded; without unreadable ones.
        bands: numbers from 1, or names, of the bands to take; None takes all.
        value_range: ``[low, high]``, the values that become 0 and 1; or such a pair for each band.
            None: 0 to 255 for 8-bit images.
        nodata: the value of pixels without data; None: what the files say.
        mean: what pixels without data become, from 0 to 1: for each band, or one number.
        display: one or three bands of the result that plots show: numbers from 1, or names.
        command: the settings with which moco.stats reads these images, for messages.

    Raises:
        InputError: the settings fit no image, or the value range is missing.
    """
    selection = checked_selection(bands)
    images = list(sample)
    if not images:
        return PixelValues(RGB_BANDS, np.dtype(np.uint8), selection)
    of_kind: dict[tuple[np.dtype[Any], int], list[tuple[str, EncodedImage]]] = {}
    for name, image in images:
        kind = (image.dtype, image.bands)
        of_kind.setdefault(kind, []).append((name, image))
    # Of two kinds that are equally frequent, the first one counts.
    (dtype, num_bands), alike = max(of_kind.items(), key=lambda item: len(item[1]))
    if selection is not None:
        num_bands = len(selection)
        check_selection(selection, *alike[0])
    if value_range is None and dtype == np.uint8:
        value_range = UINT8_RANGE
    is_plain = dtype == np.uint8 and num_bands == RGB_BANDS and nodata is None
    names = names_of_bands(selection, alike[0][1])
    shown = checked_display(display, num_bands, names)
    if is_plain and tuple(as_list(value_range)) == UINT8_RANGE:
        return PixelValues(num_bands, dtype, selection, display=shown)
    decoded = decoded_sample(alike, selection)
    if value_range is None:
        known = described(dtype, num_bands)
        raise InputError(missing_range(decoded, known, nodata, command))
    low, high = checked_range(value_range, num_bands)
    if mean is not None and len(mean) == 1:
        mean = [*mean] * num_bands
    fill = None
    if mean is not None and len(mean) == num_bands:
        fill = tuple(mean)
    values = PixelValues(num_bands, dtype, selection, low, high, nodata, fill, shown)
    warn_of_values(decoded, values)
    return values


def checked_selection(bands: Any) -> tuple[int | str, ...] | None:
    """Return the setting ``data.bands`` as a tuple.

    Raises:
        InputError: it is no list of numbers from 1 or of names.
    """
    if bands is None:
        return None
    chosen = as_list(bands)
    if not chosen or not all(map(is_band, chosen)):
        raise InputError(
            f"data.bands={bands}: expected numbers from 1, or names, such as [4, 3, 2, 8]"
        )
    return tuple(chosen)


def names_of_bands(selection: Sequence[int | str] | None, image: EncodedImage) -> tuple[str, ...]:
    """Return the names of the bands that the model gets; empty where the files have none.

    Args:
        selection: the bands that are taken; None: all. They are in the image.
        image: one of the dataset.
    """
    there = image.band_names
    if selection is None:
        return tuple(there or ())
    names = []
    for chosen in selection:
        if isinstance(chosen, str):
            names.append(chosen)
        elif there:
            names.append(there[chosen - 1])
    return tuple(names) if len(names) == len(selection) else ()


def checked_display(display: Any, bands: int, names: Sequence[str] = ()) -> tuple[int, ...] | None:
    """Return the setting ``preview.bands`` as numbers from 1.

    Args:
        display: the setting: numbers, or names.
        bands: the number of bands that the model gets.
        names: their names; empty if they have none.

    Raises:
        InputError: it is no list of one or three of the bands.
    """
    if display is None:
        return None
    chosen = []
    for band in as_list(display):
        if isinstance(band, str) and band in names:
            chosen.append(list(names).index(band) + 1)
        elif isinstance(band, int) and 1 <= band <= bands:
            chosen.append(band)
        else:
            chosen = []  # no such band
            break
    if len(chosen) not in (1, RGB_BANDS):
        named = f" or names ({', '.join(names)})" if names else ""
        raise InputError(
            f"preview.bands={display}: expected one or three numbers from 1 to {bands}{named}, the "
            "bands that the model gets"
        )
    return tuple(chosen)


def as_list(setting: Any) -> list[Any]:
    """Return a setting that is one value or a list of them as a list."""
    if isinstance(setting, (list, tuple)):
        return list(setting)
    return [setting]


def is_band(band: Any) -> bool:
    """Return whether this can stand for a band: a number from 1, or a name."""
    if isinstance(band, str):
        return True
    return isinstance(band, int) and not isinstance(band, bool) and band >= 1


def check_selection(selection: Sequence[int | str], name: str, image: EncodedImage) -> None:
    """Raise InputError if the first image lacks a chosen band."""
    try:
        band_indices(selection, image.bands, image.band_names)
    except ValueError as error:
        chosen = ",".join(map(str, selection))
        raise InputError(f"data.bands=[{chosen}]: {printable(name)} {error}") from error


def checked_range(value_range: Any, bands: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the lowest and the highest value of each band.

    Raises:
        InputError: the setting is no pair of numbers in order, and no such pair for each band.
    """
    pairs = value_range
    if is_pair(value_range):
        pairs = [value_range] * bands
    is_list = isinstance(pairs, (list, tuple)) and all(map(is_pair, pairs))
    if not is_list or not all(low < high for low, high in pairs):
        raise InputError(
            f"data.value_range={value_range}: expected [low, high] with low below high, or such a "
            "pair for each band"
        )
    if len(pairs) != bands:
        raise InputError(f"data.value_range: {len(pairs)} pairs, and the images have {bands} bands")
    lows, highs = zip(*pairs, strict=True)
    return tuple(map(float, lows)), tuple(map(float, highs))


def is_pair(value: Any) -> bool:
    """Return whether this is a list of two finite numbers."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return False
    for number in value:
        if not isinstance(number, (int, float)) or not np.isfinite(number):
            return False
    return True


def decoded_sample(
    images: Sequence[tuple[str, EncodedImage]], selection: Sequence[int | str] | None
) -> list[Sampled]:
    """Return those of the images that can be decoded, with the chosen bands."""
    decoded = []
    for _, image in images:
        try:
            pixels = image.pixels()
            if selection is not None:
                indices = band_indices(selection, pixels.shape[2], image.band_names)
                pixels = pixels[:, :, indices]
        except (UnreadableImage, ValueError):
            continue  # the run itself counts and names it
        decoded.append(Sampled(pixels, image.no_data))
    return decoded


def valid_values(sampled: Sampled, nodata: float | None) -> np.ndarray:
    """Return the values of an image that are data, (values,) float64."""
    values, missing = sampled.values_and_missing(nodata)
    if missing is not None:
        values = values[~missing]
    return values.flatten().numpy()


def missing_range(
    decoded: Sequence[Sampled], known: str, nodata: float | None, command: str
) -> str:
    """Return the line that asks for ``data.value_range``, with what the sample holds.

    Args:
        known: type and number of bands in words.
    """
    parts = [np.empty(0)]
    for sampled in decoded:
        parts.append(valid_values(sampled, nodata))
    values = np.concatenate(parts)
    seen = "no value in them is data"
    if len(values):
        top = np.percentile(values, 99.9)
        seen = f"from {values.min():g} to {values.max():g}, 99.9 % of them up to {top:g}"
    return (
        f"data.value_range: missing; the images have {known} ({images_in_words(decoded)}: {seen}). "
        f"Give the values that become 0 and 1, data.value_range=[low,high]; "
        f"python -m moco.stats {command} measures them"
    )


def images_in_words(decoded: Sequence[Sampled]) -> str:
    """Return how many images these are, for a message."""
    if len(decoded) > 1:
        return f"{len(decoded)} images"
    return "one image"


def warn_of_values(decoded: Sequence[Sampled], values: PixelValues) -> None:
    """Warn if the value range clips many values or is hardly used, and log what is no data."""
    assert values.low is not None
    assert values.high is not None
    num_all = num_missing = num_below = num_above = 0
    highest = 0.0
    for sampled in decoded:
        measured, missing = sampled.values_and_missing(values.no_data)
        low = torch.tensor(values.low).double()  # (bands,)
        high = torch.tensor(values.high).double()
        places = (measured - low) / (high - low)
        num_all += places.numel()
        if missing is not None:
            num_missing += int(missing.sum())
            places = places[~missing]
        num_below += int((places < 0).sum())
        num_above += int((places > 1).sum())
        if places.numel() > 0:
            highest = max(highest, float(places.max()))
    if num_all == 0:
        return
    number = images_in_words(decoded)
    if num_missing:
        share = num_missing / num_all
        log.info(
            "no data in %.3g %% of the values of %s; they become the mean", 100 * share, number
        )
    clipped = (num_below + num_above) / num_all
    if clipped > MOST_CLIPPED:
        log.warning(
            "data.value_range clips %.3g %% of the values of %s (%.3g %% below, %.3g %% above)",
            100 * clipped,
            number,
            100 * num_below / num_all,
            100 * num_above / num_all,
        )
    if highest < LEAST_USED:
        log.warning(
            "data.value_range: the values of %s use %.2g %% of it; is the upper end too high?",
            number,
            100 * highest,
        )
