"""What an operation of augmentation is, and which images it gets.

There are two kinds of image. 8-bit RGB is (height, width, 3) uint8. All others are
(height, width, bands) float32 in 0..1, with any number of bands.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moco.data.augment.image_kernels import split_bands

Drawn = dict[str, Tensor]
"""The numbers of one operation by name, (batch, ...) each."""
Numbers = Mapping[str, Any]
"""The numbers of one operation for one image."""


class ImageKind(NamedTuple):
    """What all images of a dataset are."""

    bands: int = 3
    is_float: bool = False
    """float32 in 0..1; otherwise uint8 RGB."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of the values between loader processes and the device."""
        return torch.float32 if self.is_float else torch.uint8

    @property
    def array_dtype(self) -> Any:
        """The same as a type of NumPy."""
        return np.float32 if self.is_float else np.uint8

    @property
    def largest(self) -> int:
        """The value of white."""
        return 1 if self.is_float else 255


RGB_8_BIT = ImageKind()


def kind_of_images(bands: int, is_float: bool) -> ImageKind:
    """Return the kind of images with these bands.

    Raises:
        ValueError: there is no such kind.
    """
    if bands < 1:
        raise ValueError(f"bands={bands}: expected at least 1")
    if not is_float and bands != 3:
        raise ValueError(f"bands={bands}: 8-bit images have 3; others need is_float=True")
    return ImageKind(bands, is_float)


class Operation:
    """One step of a view.

    A subclass defines `on_image` or `on_batch`, or both. The one that it leaves out is derived from
    the other. The derived `on_image` converts to a batch of one and back. The derived `on_batch`
    goes through the images one by one on the CPU, and waits for the device.

    A run has one of two kinds of image. `on_image` gets 8-bit RGB, (height, width, 3) uint8, or any
    other images as (height, width, bands) float32 in 0..1, and returns what it gets. `on_batch`
    gets float32 in 0..1 for both kinds. `image_kind` says which kind the run has; it is set before
    the first image. An operation that works on one kind alone says so in `check_kind`.

    All randomness comes from `draw`, so that the result does not depend on who computes it. A
    subclass returns new images: it must not write to those that it is given.

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> @dataclass
        ... class Fade(moco.Operation):
        ...     lowest: float = 0.5
        ...     num_draws: ClassVar[int] = 1
        ...
        ...     def draw(self, draws, sizes):
        ...         return {"factor": self.lowest + (1 - self.lowest) * draws[:, 0]}
        ...
        ...     def on_image(self, image, drawn):
        ...         return (image * drawn["factor"]).astype(image.dtype)
    """

    num_draws: ClassVar[int] = 0
    """How many numbers `draw` gets for each image."""
    needs_square: ClassVar[bool] = False
    """It has to come after the crop, which makes images square."""
    limits: ClassVar[dict[str, tuple[float, float]]] = {}
    """The lowest and the highest value of settings that are a number."""
    pair_limits: ClassVar[dict[str, tuple[float, float]]] = {}
    """The same for settings that are two numbers, the lower one first."""
    image_kind = RGB_8_BIT
    """The images of the run. Until it is set, they are 8-bit RGB."""

    def __post_init__(self) -> None:
        for name, (low, high) in self.limits.items():
            value = getattr(self, name)
            if not is_number(value, low, high):
                raise ValueError(f"{name}={value}: expected a number from {low} to {high}")
        for name, (low, high) in self.pair_limits.items():
            value = getattr(self, name)
            if not is_pair(value, low, high):
                raise ValueError(f"{name}={value}: expected two numbers in order, {low} to {high}")

    def check_kind(self, kind: ImageKind) -> None:
        """Raise ValueError, with the alternative, if the operation cannot work on these images."""

    def draw(self, draws: Tensor, sizes: Tensor) -> Drawn:
        """Return the numbers of the operation for each image.

        Args:
            draws: (batch, num_draws) float64, in [0, 1).
            sizes: (batch, 2) int64, height and width of each image, px.
        """
        return {}

    def on_image(self, image: np.ndarray, drawn: Numbers) -> np.ndarray:
        """Change one image by its numbers: (height, width, 3) uint8, or float32 with any bands."""
        numbers = {name: torch.as_tensor(value)[None] for name, value in drawn.items()}
        if image.dtype == np.uint8:
            images = torch.tensor(image).permute(2, 0, 1)[None] / 255  # (1, 3, height, width)
            return as_arrays_of(self.on_batch(images, numbers), RGB_8_BIT)[0]
        # Planes, because loops over the bands of each pixel are slow.
        height, width, bands = image.shape
        planes = np.empty((bands, height, width), np.float32)
        split_bands(image, planes)
        changed = self.on_batch(torch.from_numpy(planes)[None], numbers)
        return as_arrays_of(changed, ImageKind(bands, True))[0]

    def on_batch(self, images: Tensor, drawn: Drawn) -> Tensor:
        """Change a batch, (batch, bands, height, width) float32 in 0..1, by the numbers of all."""
        numbers = {name: values.cpu().numpy() for name, values in drawn.items()}
        results = []
        for row, image in enumerate(as_arrays_of(images, self.image_kind)):
            own = {name: values[row] for name, values in numbers.items()}
            results.append(self.on_image(image, own))
        changed = torch.from_numpy(np.stack(results)).to(images.device)
        planes = changed.permute(0, 3, 1, 2).contiguous()  # (batch, bands, height, width)
        if self.image_kind.is_float:
            return planes
        return planes / 255

    def source_map(self, drawn: Drawn, sizes: Tensor) -> Tensor | None:
        """Return where the pixels of the result were in the input, or None if all stay in place.

        ``method.dense_match=location`` needs to know it. An operation of a user's that stays
        without this method is refused there, because nothing says whether it moves pixels.

        Args:
            drawn: what `draw` returned.
            sizes: (batch, 2) int64, height and width of each input, px.

        Returns:
            (batch, 2, 3) float64, see `moco.data.augment.placements`.
        """
        return None

    def describe(self, drawn: Numbers) -> str:
        """Return the numbers of one image in words; empty if there are none."""
        return ""


def as_arrays_of(images: Tensor, kind: ImageKind) -> np.ndarray:
    """Return images (batch, bands, height, width) in 0..1 as (batch, height, width, bands).

    They are uint8 or float32, as the kind says.
    """
    if not kind.is_float:
        images = torch.round(images * 255).clamp(0, 255).to(torch.uint8)
    return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def check_rgb(kind: ImageKind, what: str, alternative: str) -> None:
    """Raise ValueError if the images are not RGB.

    Args:
        what: what needs RGB, with its verb.
        alternative: an operation.
    """
    if kind.bands != 3:
        raise ValueError(f"{what} 3 bands (RGB), the images have {kind.bands}; use {alternative}")


def defines(operation: type[Operation], method: str) -> bool:
    """Return whether a class has its own method of this name, and not the derived one."""
    return getattr(operation, method) is not getattr(Operation, method)


def between(limits: Sequence[float], draws: Tensor) -> Tensor:
    """Map draws from 0..1 to the range between the limits."""
    low, high = limits
    return low + (high - low) * draws


def about_one(largest: float, draws: Tensor) -> Tensor:
    """Map draws from 0..1 to factors from 1 - largest, and at least 0, to 1 + largest."""
    return between([max(0, 1 - largest), 1 + largest], draws)


def per_image(values: Tensor, images: Tensor) -> Tensor:
    """Return a number for each image, (batch, 1, 1, 1), in the type of the images."""
    return values.to(images.dtype)[:, None, None, None]


def is_number(value: Any, low: float, high: float) -> bool:
    """Return whether this is a number in the range; NaN is in none."""
    return isinstance(value, (int, float)) and low <= value <= high


def is_pair(values: Any, low: float, high: float) -> bool:
    """Return whether these are two numbers in the range, the lower one first."""
    if not isinstance(values, (list, tuple)) or len(values) != 2:
        return False
    first, second = values
    if not is_number(first, low, high) or not is_number(second, low, high):
        return False
    return first <= second
