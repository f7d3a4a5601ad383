"""The operations of augmentation: what each draws, and its work on one image and on a batch.

An operation says how its numbers follow from draws between 0 and 1, and does its work on one image (``on_image``, in the
loader's workers) or on a whole batch (``on_batch``, on the device). The reference for both is torchvision.transforms.v2 on
Pillow images.

Letters: N batch, H W pixels of the source, S side of a view. Sizes in px; scales as fractions of the area.
"""

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from moco.data.augment import batch_kernels
from moco.data.augment import image_kernels as image_kernels

Drawn = dict[str, Tensor]
"""What was drawn for one operation, by name, (N, ...) each."""


class Operation(ABC):
    """One step of a view.

    ``on_image`` takes (H, W, 3) uint8 and one image's numbers,
    ``on_batch`` (N, 3, H, W) float32 in 0..1 and those of all.
    """

    num_draws: ClassVar[int] = 0

    def drawn(self, draws: Tensor, sizes: Tensor) -> Drawn:
        """The operation's numbers.

        Args:
            draws: (N, num_draws) float64, from 0 up to 1.
            sizes: (N, 2) int64, height and width of each image.
        """
        return {}

    @abstractmethod
    def on_image(self, image: np.ndarray, drawn: Mapping[str, Any]) -> np.ndarray: ...

    @abstractmethod
    def on_batch(self, images: Tensor, drawn: Drawn) -> Tensor: ...

    def described(self, drawn: Mapping[str, Any]) -> str:
        """One image's numbers in words, for people; empty if there are none."""
        return ""


@dataclass
class RandomResizedCrop(Operation):
    """A crop of `scale` of the area and `ratio` width / height, resized to a square of `image_size`, bilinear.

    As in torchvision the first of ten candidates that fits is taken, else the largest in the middle with a ratio in range.
    Without `antialias` each pixel comes from the nearest four alone, also where the crop shrinks; a JPEG that was decoded
    smaller is antialiased in any case.
    """

    image_size: int
    scale: Sequence[float]
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    antialias: bool = True
    num_draws: ClassVar[int] = 22

    def __post_init__(self) -> None:
        is_scale, is_ratio = is_range(self.scale), is_range(self.ratio)
        expect(
            is_scale and 0 < self.scale[0] <= self.scale[1] <= 1,
            "scale",
            self.scale,
            "two areas, 0 < low <= high <= 1",
        )
        expect(
            is_ratio and self.ratio[0] > 0, "ratio", self.ratio, "two positive numbers, low <= high"
        )
        expect(isinstance(self.antialias, bool), "antialias", self.antialias, "true or false")

    def drawn(self, draws: Tensor, sizes: Tensor) -> Drawn:
        height, width = sizes.double().unbind(1)
        area = (height * width)[:, None] * between(self.scale, draws[:, :10])
        root = torch.exp(between([math.log(side) for side in self.ratio], draws[:, 10:20]) / 2)
        # Half to even, as Python's round.
        heights, widths = (
            torch.round(area.sqrt() / root),
            torch.round(area.sqrt() * root),
        )  # (N, 10)
        fits = (
            (heights > 0) & (heights <= height[:, None]) & (widths > 0) & (widths <= width[:, None])
        )
        first = fits.to(torch.uint8).argmax(1, keepdim=True)
        found = fits.any(1)
        middle_height, middle_width = self._largest(height, width)
        crop_height = torch.where(found, heights.gather(1, first)[:, 0], middle_height)
        crop_width = torch.where(found, widths.gather(1, first)[:, 0], middle_width)
        room = torch.stack([height - crop_height, width - crop_width], 1)
        corner = torch.where(
            found[:, None], torch.floor(draws[:, 20:22] * (room + 1)), torch.floor(room / 2)
        )
        box = torch.cat([corner, torch.stack([crop_height, crop_width], 1)], 1).long()
        return {"box": box, "size": sizes}

    def _largest(self, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.ratio
        ratio = width / height
        return (
            torch.where(ratio < low, torch.round(width / low).clamp(1), height),
            torch.where(ratio > high, torch.round(height * high).clamp(1), width),
        )

    def on_image(self, image: np.ndarray, drawn: Mapping[str, Any]) -> np.ndarray:
        reduction = drawn.get("reduction", 1)  # by how much the image was decoded smaller
        if reduction == 1:
            return image_kernels.resized_crop(image, drawn["box"], self.image_size, self.antialias)
        return image_kernels.resized_crop_between_pixels(
            image, drawn["box"] / reduction, self.image_size
        )

    def on_batch(self, images: Tensor, drawn: Drawn) -> Tensor:
        return batch_kernels.resized_crop(images, drawn["box"], self.image_size, self.antialias)

    def described(self, drawn: Mapping[str, Any]) -> str:
        (top, left, height, width), (rows, columns) = drawn["box"].tolist(), drawn["size"].tolist()
        return f"{height} x {width} px at {top}, {left} of {rows} x {columns}"


@dataclass
class RandomAffine(Operation):
    """Rotation and horizontal shear of up to so many degrees either way, shift of up to a fraction of the side; bilinear."""

    degrees: float
    translate: float = 0.0
    shear: float = 0.0
    num_draws: ClassVar[int] = 4

    def __post_init__(self) -> None:
        expect(
            is_number(self.translate, 0, 1),
            "translate",
            self.translate,
            "a fraction of the side, 0 to 1",
        )
        expect(
            is_number(self.degrees, 0, 360),
            "degrees",
            self.degrees,
            "a number of degrees, 0 to 360",
        )
        expect(is_number(self.shear, 0, 89), "shear", self.shear, "a number of degrees, 0 to 89")

    def drawn(self, draws: Tensor, sizes: Tensor) -> Drawn:
        most = self.translate * sizes.flip(1)
        return {
            "angle": between([-self.degrees, self.degrees], draws[:, 0]),
            "shift": torch.round((2 * draws[:, 1:3] - 1) * most),  # right, down
            "shear": between([-self.shear, self.shear], draws[:, 3]),
        }

    def on_image(self, image: np.ndarray, drawn: Mapping[str, Any]) -> np.ndarray:
        images = torch.tensor(image).permute(2, 0, 1)[None] / 255
        turned = self.on_batch(
            images, {name: torch.as_tensor(value)[None] for name, value in drawn.items()}
        )
        return np.ascontiguousarray(
            torch.round(turned[0] * 255).to(torch.uint8).permute(1, 2, 0).numpy()
        )

    def on_batch(self, images: Tensor, drawn: Drawn) -> Tensor:
        return batch_kernels.affine(images, drawn["angle"], drawn["shift"], drawn["shear"])

    def described(self, drawn: Mapping[str, Any]) -> str:
        right, down = drawn["shift"].tolist()
        angles = f"turned by {drawn['angle']:.1f}, sheared by {drawn['shear']:.1f} degrees"
        return f"{angles}, shifted by {right:.0f}, {down:.0f} px"


@dataclass
class ColorJitter(Operation):
    """Factors from 1 - x to 1 + x, hue shift up to x of a turn either way; the four in random order.

    `linear` takes all four as one matrix, an approximation: see `moco.data.augment.linear_colors`.
    """

    brightness: float = 0
    contrast: float = 0
    saturation: float = 0
    hue: float = 0
    linear: bool = False
    num_draws: ClassVar[int] = 8
    STEPS: ClassVar[tuple[str, ...]] = ("brightness", "contrast", "saturation", "hue")

    def __post_init__(self) -> None:
        for name in self.STEPS[:3]:
            expect(
                is_number(getattr(self, name), 0, 100),
                name,
                getattr(self, name),
                "a number, 0 to 100",
            )
        expect(is_number(self.hue, 0, 0.5), "hue", self.hue, "a fraction of a turn, 0 to 0.5")
        expect(isinstance(self.linear, bool), "linear", self.linear, "true or false")

    def drawn(self, draws: Tensor, sizes: Tensor) -> Drawn:
        values = [
            between([max(0, 1 - most), 1 + most], draws[:, number])
            for number, most in enumerate((self.brightness, self.contrast, self.saturation))
        ]
        hue = between([-self.hue, self.hue], draws[:, 3])
        return {"factors": torch.stack([*values, hue], 1), "order": draws[:, 4:8].argsort(1)}

    def on_image(self, image: np.ndarray, drawn: Mapping[str, Any]) -> np.ndarray:
        factors = drawn["factors"]
        if self.linear:
            return image_kernels.linear_color_jitter(image, factors, drawn["order"])
        for step in drawn["order"]:
            if getattr(self, self.STEPS[step]):
                image = image_kernels.COLOR_STEPS[step](image, float(factors[step]))
        return image

    def on_batch(self, images: Tensor, drawn: Drawn) -> Tensor:
        if self.linear:
            return batch_kernels.linear_color_jitter(images, drawn["factors"], drawn["order"])
        return batch_kernels.color_jitter(
            images, drawn["factors"], drawn["order"], has_hue=self.hue > 0
        )

    def described(self, drawn: Mapping[str, Any]) -> str:
        steps = [step for step in drawn["order"].tolist() if getattr(self, self.STEPS[step])]
        return ", ".join(f"{self.STEPS[step]} {drawn['factors'][step]:.2f}" for step in steps)


@dataclass
class GaussianBlur(Operation):
    """Blur with a sigma drawn uniformly between the two given, px, cut off at three sigma; edges are continued."""

    sigma: Sequence[float]
    num_draws: ClassVar[int] = 1

    def __post_init__(self) -> None:
        holds = is_range(self.sigma) and self.sigma[0] >= 0 and self.sigma[1] <= 100
        expect(holds, "sigma", self.sigma, "two numbers of px, 0 <= low <= high <= 100")

    def drawn(self, draws: Tensor, sizes: Tensor) -> Drawn:
        return {"sigma": between(self.sigma, draws[:, 0])}

    def on_image(self, image: np.ndarray, drawn: Mapping[str, Any]) -> np.ndarray:
        return image_kernels.gaussian_blur(image, float(drawn["sigma"]))

    def on_batch(self, images: Tensor, drawn: Drawn) -> Tensor:
        return batch_kernels.gaussian_blur(images, drawn["sigma"], max_sigma=self.sigma[1])

    def described(self, drawn: Mapping[str, Any]) -> str:
        return f"sigma {drawn['sigma']:.2f} px"


@dataclass
class Solarize(Operation):
    """Invert the values from `threshold` (0 to 256) upwards."""

    threshold: int = 128

    def __post_init__(self) -> None:
        is_whole = isinstance(self.threshold, int)
        expect(
            is_whole and 0 <= self.threshold <= 256,
            "threshold",
            self.threshold,
            "a whole number, 0 to 256",
        )

    def on_image(self, image: np.ndarray, drawn: Mapping[str, Any]) -> np.ndarray:
        return image_kernels.solarize(image, self.threshold)

    def on_batch(self, images: Tensor, drawn: Drawn) -> Tensor:
        return torch.where(images >= self.threshold / 255, 1 - images, images)


@dataclass
class Grayscale(Operation):
    """Luma in all three channels."""

    def on_image(self, image: np.ndarray, drawn: Mapping[str, Any]) -> np.ndarray:
        return image_kernels.grayscale(image)

    def on_batch(self, images: Tensor, drawn: Drawn) -> Tensor:
        return batch_kernels.luma(images).expand_as(images)


@dataclass
class HorizontalFlip(Operation):
    """Left and right exchanged."""

    def on_image(self, image: np.ndarray, drawn: Mapping[str, Any]) -> np.ndarray:
        return image_kernels.horizontal_flip(image)

    def on_batch(self, images: Tensor, drawn: Drawn) -> Tensor:
        return images.flip(-1)


OPERATIONS: dict[str, type[Operation]] = {
    "random_resized_crop": RandomResizedCrop,
    "random_affine": RandomAffine,
    "color_jitter": ColorJitter,
    "gaussian_blur": GaussianBlur,
    "solarize": Solarize,
    "grayscale": Grayscale,
    "horizontal_flip": HorizontalFlip,
}


def between(limits: Sequence[float], draws: Tensor) -> Tensor:
    """From 0..1 to the range."""
    low, high = limits
    return low + (high - low) * draws


def is_range(values: Any) -> bool:
    """Two numbers, the lower first."""
    is_pair = isinstance(values, (list, tuple)) and len(values) == 2
    return is_pair and all(is_number(value) for value in values) and values[0] <= values[1]


def is_number(
    value: Any, lowest: float = -sys.float_info.max, highest: float = sys.float_info.max
) -> bool:
    """A number in the range; infinity and NaN are in none."""
    return isinstance(value, (int, float)) and lowest <= value <= highest


def expect(holds: bool, name: str, value: Any, expected: str) -> None:
    """Raises ValueError if it does not hold."""
    if not holds:
        raise ValueError(f"{name}={value}: expected {expected}")
