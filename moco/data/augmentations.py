"""Augmentation pairs from numbers: each view is an ordered mapping from operation to its settings.

This is the reference engine: torchvision.transforms.v2 per sample on Pillow pictures, as the official recipes run them.
An operation with a `probability` is applied with that probability. Sizes in px; scales as fractions of the area.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import v2

from moco.data.randomness import draws_from
from moco.errors import InputError, unknown_name

Transform = Callable[[Any], Any]


class GaussianBlur:
    """Pillow's Gaussian blur with a radius (its sigma, px) drawn uniformly, as in SimCLR and MoCo v2."""

    def __init__(self, sigma: Sequence[float]) -> None:
        self.sigma = sigma

    def __call__(self, picture: Image.Image) -> Image.Image:
        low, high = self.sigma
        radius = float(torch.empty(1).uniform_(low, high))
        return picture.filter(ImageFilter.GaussianBlur(radius=radius))


def random_resized_crop(image_size: int, scale: Sequence[float], ratio: Sequence[float] = (3 / 4, 4 / 3)) -> Transform:
    """A crop of `scale` of the area and `ratio` width / height, resized to a square of `image_size` px, bilinear."""
    _expect(_is_range(scale) and 0 < scale[0] <= scale[1] <= 1, "scale", scale, "two areas, 0 < low <= high <= 1")
    _expect(_is_range(ratio) and ratio[0] > 0, "ratio", ratio, "two positive numbers, low <= high")
    return v2.RandomResizedCrop(image_size, scale=tuple(scale), ratio=tuple(ratio))


def random_affine(degrees: float, translate: float = 0.0, shear: float = 0.0) -> Transform:
    """Rotation and shear of up to so many degrees either way, shift of up to a fraction of the side; bilinear."""
    _expect(0 <= translate <= 1, "translate", translate, "a fraction of the side, 0 to 1")
    mode = v2.InterpolationMode.BILINEAR
    return v2.RandomAffine(degrees, translate=(translate, translate), shear=shear, interpolation=mode)


def color_jitter(brightness: float = 0, contrast: float = 0, saturation: float = 0, hue: float = 0) -> Transform:
    """Factors from 1 - x to 1 + x, hue shift up to x of a turn either way; the four in random order."""
    _expect(0 <= hue <= 0.5, "hue", hue, "a fraction of a turn, 0 to 0.5")
    return v2.ColorJitter(brightness, contrast, saturation, hue)


def gaussian_blur(sigma: Sequence[float]) -> Transform:
    """Blur with a sigma between the two given, px."""
    _expect(_is_range(sigma) and sigma[0] >= 0, "sigma", sigma, "two numbers of px, 0 <= low <= high")
    return GaussianBlur(sigma)


def solarize(threshold: int = 128) -> Transform:
    """Invert the values from `threshold` (0 to 256) upwards."""
    _expect(isinstance(threshold, int) and 0 <= threshold <= 256, "threshold", threshold, "a whole number, 0 to 256")
    return v2.Lambda(partial(v2.functional.solarize, threshold=threshold))


def grayscale() -> Transform:
    """Luma in all three channels."""
    return v2.Grayscale(num_output_channels=3)


def horizontal_flip() -> Transform:
    """Left and right exchanged."""
    return v2.Lambda(v2.functional.horizontal_flip)


OPERATIONS: dict[str, Callable[..., Transform]] = {
    operation.__name__: operation
    for operation in (
        random_resized_crop, random_affine, color_jitter, gaussian_blur, solarize, grayscale, horizontal_flip
    )
}  # fmt: skip


def build_view(operations: Mapping[str, Mapping[str, Any]], image_size: int, where: str) -> Transform:
    """Pillow picture to Pillow picture, the operations in the mapping's order.

    Args:
        image_size: side of the result, px; the view must hold a `random_resized_crop`.
        where: the mapping's key in the config, for error messages.

    Raises:
        InputError: unknown operation, setting or value; it names the key.
    """
    if "random_resized_crop" not in operations:
        raise InputError(f"{where}: random_resized_crop is missing; without it views have no common size")
    return v2.Compose([build_operation(name, settings, image_size, where) for name, settings in operations.items()])


def build_operation(name: str, settings: Mapping[str, Any] | None, image_size: int, where: str) -> Transform:
    """One operation of a view; arguments and errors as in `build_view`."""
    if name not in OPERATIONS:
        raise InputError(f"{where}: {unknown_name('operation', name, OPERATIONS)}")
    if settings is not None and not isinstance(settings, Mapping):
        raise InputError(f"{where}.{name}: expected settings, {{name: number, ...}}, got {settings}")
    arguments = dict(settings or {})
    probability = arguments.pop("probability", 1.0)
    if name == "random_resized_crop" and probability != 1:
        raise InputError(f"{where}.{name}: probability={probability}: it gives the views their common size, so always")
    allowed = [*inspect.signature(OPERATIONS[name]).parameters, "probability"]
    for argument in arguments:
        if argument not in allowed or argument == "image_size":
            names = [other for other in allowed if other != "image_size"]
            raise InputError(f"{where}.{name}: {unknown_name('setting', argument, names)}")
    if "image_size" in allowed:
        arguments["image_size"] = image_size
    try:
        is_number = isinstance(probability, (int, float))
        _expect(is_number and 0 <= probability <= 1, "probability", probability, "a number from 0 to 1")
        operation = OPERATIONS[name](**arguments)
    except (TypeError, ValueError, IndexError) as error:
        raise InputError(f"{where}.{name}: {error}") from error
    return operation if probability == 1 else v2.RandomApply([operation], p=probability)


def _is_range(values: Any) -> bool:
    """Two numbers, the lower first."""
    is_pair = isinstance(values, (list, tuple)) and len(values) == 2
    return is_pair and all(isinstance(value, (int, float)) for value in values) and values[0] <= values[1]


def _expect(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value}: expected {expected}")


def to_normalized(mean: Sequence[float], std: Sequence[float]) -> Transform:
    """Pillow picture to (3, H, W) float32: pixels in 0..1, minus `mean`, over `std`, per channel.

    Raises:
        InputError: they are not three each, or a std is not above 0.
    """
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise InputError(f"augmentation.mean={mean}, augmentation.std={std}: expected three numbers each, std above 0")
    scale = 1 / (255 * torch.tensor(std).view(3, 1, 1))
    shift = torch.tensor(mean).view(3, 1, 1) / torch.tensor(std).view(3, 1, 1)
    # One product and one difference: on small pictures ToImage, ToDtype and Normalize cost as much as the colour jitter.
    return Normalized(scale, shift)


class Normalized:
    """(3, H, W) float32: 8-bit pixels times `scale` minus `shift`, (3, 1, 1) each."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        self.scale = scale
        self.shift = shift

    def __call__(self, picture: Image.Image) -> Tensor:
        return v2.functional.pil_to_tensor(picture) * self.scale - self.shift


class ViewPair:
    """The query view and the key view of a picture, each with its own draws.

    A draw depends on (seed, epoch, index, view) alone: not on the worker, nor on what was drawn before.

    Args:
        query, key: operations of the two views.
        image_size: side of both views, px.
    """

    def __init__(
        self,
        query: Mapping[str, Any],
        key: Mapping[str, Any],
        mean: Sequence[float],
        std: Sequence[float],
        image_size: int,
        seed: int,
    ) -> None:
        self.views = [
            build_view(query, image_size, "augmentation.query"),
            build_view(key, image_size, "augmentation.key"),
        ]
        self.mean, self.std = mean, std
        self.normalize = to_normalized(mean, std)
        self.seed = seed

    def __call__(self, picture: Image.Image, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Two views (3, H, W) of image `index` in epoch `epoch`, normalised."""
        pair = []
        for number, view in enumerate(self.views):
            with draws_from(self.seed, epoch, index, number):
                pair.append(self.normalize(view(picture)))
        return pair[0], pair[1]


def build_evaluation_view(image_size: int, crop_ratio: float, mean: Sequence[float], std: Sequence[float]) -> Transform:
    """Pillow picture to (3, H, W) without chance: resize the shorter side to image_size / crop_ratio, centre crop."""
    resized = round(image_size / crop_ratio)
    return v2.Compose([middle_of_stripe, v2.Resize(resized), v2.CenterCrop(image_size), to_normalized(mean, std)])


def middle_of_stripe(picture: Image.Image) -> Image.Image:
    """Of a picture that is more than 32 times as long as wide the middle, 32 times as long.

    Enlarged to a shorter side of 224 px, a line of one pixel by a million would take 150 GB.
    """
    longest = 32 * min(picture.size)
    if max(picture.size) <= longest:
        return picture
    return v2.functional.center_crop(picture, [min(picture.height, longest), min(picture.width, longest)])
