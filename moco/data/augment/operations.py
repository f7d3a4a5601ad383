"""The operations of the published pairs, and the registry of all operations.

An operation turns draws between 0 and 1 into its own numbers (``draw``). It does its work on one
image in a loader process (``on_image``), or on a whole batch on the device (``on_batch``). The
reference for both is torchvision.transforms.v2 on Pillow images. Operations for images of other
fields, such as satellite images and X-rays, are in modules of their own.

Users add operations of their own: by `register_operation`, or by a target in the config.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from moco.data.augment import batch_kernels, image_kernels
from moco.data.augment.bands import BandDrop, BandJitter, BandMean
from moco.data.augment.noise import Cutout, GaussianNoise, PoissonNoise
from moco.data.augment.operation import (
    RGB_8_BIT,
    Drawn,
    ImageKind,
    Numbers,
    Operation,
    about_one,
    between,
    check_rgb,
    defines,
    is_number,
)
from moco.data.augment.placements import (
    about_middle,
    affine_maps,
    composed,
    crop_maps,
    turn_maps,
)
from moco.data.augment.stains import StainJitter
from moco.data.augment.tone import HistogramShift, LocalContrast, Sharpness
from moco.errors import InputError, unknown_name
from moco.targets import import_target


@dataclass
class RandomResizedCrop(Operation):
    """Cut out a random box and resize it to a square of `image_size`, bilinear, antialiased.

    As in torchvision, the first of ten random boxes that fits is used. If none fits, it is the
    largest box in the middle whose ratio is in range.

    Args:
        image_size: side of the result, px.
        scale: smallest and largest area, as fractions of the image.
        ratio: smallest and largest width / height.
    """

    image_size: int
    scale: Sequence[float]
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    # Ten areas, ten ratios, and the two coordinates of the corner.
    num_draws: ClassVar[int] = 22
    pair_limits: ClassVar = {"scale": (1e-6, 1), "ratio": (1e-3, 1e3)}

    def draw(self, draws: Tensor, sizes: Tensor) -> Drawn:
        height, width = sizes.double().unbind(1)
        area = (height * width)[:, None] * between(self.scale, draws[:, :10])  # (batch, 10)
        # The logarithm is uniform, so that 1:2 is as probable as 2:1.
        log_ratio = list(map(math.log, self.ratio))
        root = torch.exp(between(log_ratio, draws[:, 10:20]) / 2)  # of width / height
        # torch.round rounds half to even, as Python's round does in torchvision.
        heights = torch.round(area.sqrt() / root)  # (batch, 10)
        widths = torch.round(area.sqrt() * root)  # (batch, 10)
        fits_height = (heights > 0) & (heights <= height[:, None])
        fits_width = (widths > 0) & (widths <= width[:, None])
        fits = fits_height & fits_width
        found = fits.any(1)
        # The first box that fits: argmax takes the first of equal values.
        first = fits.to(torch.uint8).argmax(1, keepdim=True)
        # The largest box whose ratio is in range.
        low, high = self.ratio
        ratio = width / height
        middle_height = torch.where(ratio < low, torch.round(width / low).clamp(1), height)
        middle_width = torch.where(ratio > high, torch.round(height * high).clamp(1), width)
        crop_height = torch.where(found, heights.gather(1, first)[:, 0], middle_height)
        crop_width = torch.where(found, widths.gather(1, first)[:, 0], middle_width)
        room = torch.stack([height - crop_height, width - crop_width], 1)
        random_corner = torch.floor(draws[:, 20:22] * (room + 1))  # (batch, 2)
        corner = torch.where(found[:, None], random_corner, torch.floor(room / 2))
        box = torch.cat([corner, torch.stack([crop_height, crop_width], 1)], 1)
        return {"box": box.long(), "size": sizes}

    def on_image(self, image: np.ndarray, drawn: Numbers) -> np.ndarray:
        return image_kernels.resized_crop(image, drawn["box"], self.image_size)

    def on_batch(self, images: Tensor, drawn: Drawn) -> Tensor:
        return batch_kernels.resized_crop(images, drawn["box"], self.image_size)

    def source_map(self, drawn: Drawn, sizes: Tensor) -> Tensor:
        return crop_maps(drawn["box"], sizes)

    def describe(self, drawn: Numbers) -> str:
        top, left, height, width = drawn["box"].tolist()
        rows, columns = drawn["size"].tolist()
        return f"{height} x {width} px at {top}, {left} of {rows} x {columns}"


@dataclass
class RandomAffine(Operation):
    """Rotate, shear horizontally and shift, bilinear.

    Args:
        degrees: largest angle of the rotation, either way.
        translate: largest shift in each direction, as a fraction of the side.
        shear: largest angle of the shear in degrees, either way.
    """

    degrees: float
    translate: float = 0.0
    shear: float = 0.0
    num_draws: ClassVar[int] = 4
    limits: ClassVar = {"degrees": (0, 360), "translate": (0, 1), "shear": (0, 89)}

    def draw(self, draws: Tensor, sizes: Tensor) -> Drawn:
        largest = self.translate * sizes.flip(1)
        return {
            "angle": between([-self.degrees, self.degrees], draws[:, 0]),
            "shift": torch.round((2 * draws[:, 1:3] - 1) * largest),  # right, down
            "shear": between([-self.shear, self.shear], draws[:, 3]),
        }

    def on_batch(self, images: Tensor, drawn: Drawn) -> Tensor:
        return batch_kernels.affine(images, drawn["angle"], drawn["shift"], drawn["shear"])

    def source_map(self, drawn: Drawn, sizes: Tensor) -> Tensor:
        height, width = sizes.double().unbind(1)
        right, down = drawn["shift"].unbind(1)
        cos = drawn["angle"].deg2rad().cos()
        sin = drawn["angle"].deg2rad().sin()
        tan = drawn["shear"].deg2rad().tan()
        # The inverse: back by the shift, then the inverse of rotation times shear, whose
        # determinant is 1. It is a matrix of px, and places are fractions of the sides.
        shifted_back = affine_maps([[1, 0, -right / width], [0, 1, -down / height]], height)
        turned_back = about_middle(
            cos - sin * tan, (cos * tan + sin) * height / width, -sin * width / height, cos
        )
        return composed(turned_back, shifted_back)

    def describe(self, drawn: Numbers) -> str:
        right, down = drawn["shift"].tolist()
        angles = f"turned by {drawn['angle']:.1f}, sheared by {drawn['shear']:.1f} degrees"
        return f"{angles}, shifted by {right:.0f}, {down:.0f} px"


JITTER_OF_BANDS = "band_jitter, as augmentation=satellite, xray and microscopy do"


@dataclass
class ColorJitter(Operation):
    """Change brightness, contrast, saturation and hue in random order.

    Contrast blends with the mean of the luma. In images that are not RGB it is the mean of all
    bands. Saturation and hue need RGB.

    Args:
        brightness, contrast, saturation: the factor is drawn from 1 - x to 1 + x.
        hue: largest turn of the colour circle, as a fraction of a turn, either way.
    """

    brightness: float = 0
    contrast: float = 0
    saturation: float = 0
    hue: float = 0
    num_draws: ClassVar[int] = 8
    STEPS: ClassVar[tuple[str, ...]] = ("brightness", "contrast", "saturation", "hue")
    limits: ClassVar = dict.fromkeys(STEPS[:3], (0, 100)) | {"hue": (0, 0.5)}

    def check_kind(self, kind: ImageKind) -> None:
        if self.hue > 0 or self.saturation > 0:
            check_rgb(kind, "hue and saturation need", JITTER_OF_BANDS)

    def draw(self, draws: Tensor, sizes: Tensor) -> Drawn:
        values = []
        for number, name in enumerate(self.STEPS[:3]):
            values.append(about_one(getattr(self, name), draws[:, number]))
        values.append(between([-self.hue, self.hue], draws[:, 3]))
        return {"factors": torch.stack(values, 1), "order": draws[:, 4:8].argsort(1)}

    def on_image(self, image: np.ndarray, drawn: Numbers) -> np.ndarray:
        for step in drawn["order"]:
            if self._has(step):
                image = image_kernels.COLOR_STEPS[step](image, float(drawn["factors"][step]))
        return image

    def on_batch(self, images: Tensor, drawn: Drawn) -> Tensor:
        factors, order = drawn["factors"], drawn["order"]
        return batch_kernels.color_jitter(images, factors, order, has_hue=self.hue > 0)

    def describe(self, drawn: Numbers) -> str:
        words = []
        for step in drawn["order"].tolist():
            if self._has(step):
                words.append(f"{self.STEPS[step]} {drawn['factors'][step]:.2f}")
        return ", ".join(words)

    def _has(self, step: int) -> bool:
        """Return whether a step changes anything."""
        return getattr(self, self.STEPS[step]) > 0


@dataclass
class GaussianBlur(Operation):
    """Blur with a random sigma. The kernel ends at three sigma; edge pixels are repeated.

    Args:
        sigma: smallest and largest, px.
    """

    sigma: Sequence[float]
    num_draws: ClassVar[int] = 1
    pair_limits: ClassVar = {"sigma": (0, 100)}

    def draw(self, draws: Tensor, sizes: Tensor) -> Drawn:
        return {"sigma": between(self.sigma, draws[:, 0])}

    def on_image(self, image: np.ndarray, drawn: Numbers) -> np.ndarray:
        return image_kernels.gaussian_blur(image, float(drawn["sigma"]))

    def on_batch(self, images: Tensor, drawn: Drawn) -> Tensor:
        return batch_kernels.gaussian_blur(images, drawn["sigma"], max_sigma=self.sigma[1])

    def describe(self, drawn: Numbers) -> str:
        return f"sigma {drawn['sigma']:.2f} px"


@dataclass
class Solarize(Operation):
    """Invert the values from `threshold` upwards, of 256; only for RGB."""

    threshold: int = 128
    limits: ClassVar = {"threshold": (0, 256)}

    def check_kind(self, kind: ImageKind) -> None:
        check_rgb(kind, "its threshold of 256 needs", "histogram_shift")

    def on_image(self, image: np.ndarray, drawn: Numbers) -> np.ndarray:
        if image.dtype == np.float32:
            return np.where(image >= np.float32(self.threshold / 255), 1 - image, image)
        values = image_kernels.VALUES
        inverted = np.where(values >= self.threshold, 255 - values, values)
        return cv2.LUT(image, inverted.astype(np.uint8))

    def on_batch(self, images: Tensor, drawn: Drawn) -> Tensor:
        return torch.where(images >= self.threshold / 255, 1 - images, images)


@dataclass
class Grayscale(Operation):
    """Put the luma into all three channels; only for RGB."""

    def check_kind(self, kind: ImageKind) -> None:
        check_rgb(kind, "luma needs", "band_mean")

    def on_image(self, image: np.ndarray, drawn: Numbers) -> np.ndarray:
        return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)

    def on_batch(self, images: Tensor, drawn: Drawn) -> Tensor:
        return batch_kernels.luma(images).expand_as(images)


@dataclass
class HorizontalFlip(Operation):
    """Exchange left and right."""

    def source_map(self, drawn: Drawn, sizes: Tensor) -> Tensor:
        return affine_maps([[-1, 0, 1], [0, 1, 0]], sizes[:, 0].double())

    def on_image(self, image: np.ndarray, drawn: Numbers) -> np.ndarray:
        return image_kernels.horizontal_flip(image)

    def on_batch(self, images: Tensor, drawn: Drawn) -> Tensor:
        return images.flip(-1)


@dataclass
class VerticalFlip(Operation):
    """Exchange top and bottom."""

    def source_map(self, drawn: Drawn, sizes: Tensor) -> Tensor:
        return affine_maps([[1, 0, 0], [0, -1, 1]], sizes[:, 0].double())

    def on_image(self, image: np.ndarray, drawn: Numbers) -> np.ndarray:
        return np.ascontiguousarray(image[::-1])

    def on_batch(self, images: Tensor, drawn: Drawn) -> Tensor:
        return images.flip(-2)


@dataclass
class QuarterTurns(Operation):
    """Turn by 0, 90, 180 or 270 degrees, which are equally probable."""

    num_draws: ClassVar[int] = 1
    needs_square: ClassVar[bool] = True

    def draw(self, draws: Tensor, sizes: Tensor) -> Drawn:
        return {"turns": (4 * draws[:, 0]).long()}

    def on_image(self, image: np.ndarray, drawn: Numbers) -> np.ndarray:
        return np.ascontiguousarray(np.rot90(image, int(drawn["turns"])))

    def on_batch(self, images: Tensor, drawn: Drawn) -> Tensor:
        return batch_kernels.quarter_turns(images, drawn["turns"])

    def source_map(self, drawn: Drawn, sizes: Tensor) -> Tensor:
        return turn_maps(drawn["turns"])

    def describe(self, drawn: Numbers) -> str:
        return f"by {90 * int(drawn['turns'])} degrees to the left"


OPERATIONS: dict[str, type[Operation]] = {
    "random_resized_crop": RandomResizedCrop,
    "random_affine": RandomAffine,
    "color_jitter": ColorJitter,
    "gaussian_blur": GaussianBlur,
    "solarize": Solarize,
    "grayscale": Grayscale,
    "horizontal_flip": HorizontalFlip,
    "vertical_flip": VerticalFlip,
    "quarter_turns": QuarterTurns,
    "band_jitter": BandJitter,
    "band_mean": BandMean,
    "band_drop": BandDrop,
    "gaussian_noise": GaussianNoise,
    "poisson_noise": PoissonNoise,
    "cutout": Cutout,
    "stain_jitter": StainJitter,
    "histogram_shift": HistogramShift,
    "local_contrast": LocalContrast,
    "sharpness": Sharpness,
}


REGISTERED: dict[str, type[Operation]] = {}
"""Added by `register_operation`."""
RESERVED = ("transforms", "options")
"""The keys of a view that is a whole pipeline."""


def register_operation(name: str, operation: type[Operation] | None = None) -> Any:
    """Make a class known as an operation of augmentations: a function, or a decorator.

    Args:
        name: an identifier that no other operation has. Registering the same class again, such as
            in a cell of a notebook, replaces it.
        operation: derived from `Operation`; without it, the result is a decorator for the class.

    Returns:
        The class.

    Raises:
        InputError: the name cannot be used, or the class is no operation.

    Example:
        >>> @moco.register_operation("fade")
        ... @dataclass
        ... class Fade(moco.Operation): ...
        >>> views = moco.ViewPair({"random_resized_crop": {"scale": [0.2, 1]}, "fade": {}})
    """
    key = f"register_operation({name!r})"
    if not isinstance(name, str) or not name.isidentifier():
        raise InputError(f"{key}: expected a name of letters, digits and underscores")
    if name in RESERVED:
        raise InputError(f"{key}: 'transforms' and 'options' stand for a whole pipeline")
    if operation is None:
        return partial(register_operation, name)
    check_class(operation, key)
    known = known_operations().get(name)
    if known is not None and full_name(known) != full_name(operation):
        raise InputError(f"{key}: there is an operation of that name, {full_name(known)}")
    REGISTERED[name] = operation
    return operation


def known_operations() -> dict[str, type[Operation]]:
    """Return all operations that are known by a name."""
    return {**OPERATIONS, **REGISTERED}


def full_name(operation: type) -> str:
    """Return the name of a class as ``package.module:name``."""
    return f"{operation.__module__}:{operation.__qualname__}"


def check_class(operation: Any, key: str) -> None:
    """Raise InputError, which begins with `key`, if this is no class of a usable operation."""
    if not isinstance(operation, type) or not issubclass(operation, Operation):
        raise InputError(f"{key}: expected a class derived from moco.Operation, got {operation!r}")
    if not defines(operation, "on_image") and not defines(operation, "on_batch"):
        raise InputError(f"{key}: {operation.__name__} defines neither on_image nor on_batch")


class Step(NamedTuple):
    """An operation of a view and the probability that it is applied."""

    name: str
    operation: Operation
    probability: float
    where: str
    """Its key in the config, for error messages."""

    @property
    def is_own(self) -> bool:
        """Whether this is code of the user's."""
        return self.name not in OPERATIONS

    @property
    def is_checked(self) -> bool:
        """Whether the result is checked here. A pipeline checks its own."""
        return self.is_own and self.name not in RESERVED

    def on_image(self, image: np.ndarray, drawn: Numbers) -> np.ndarray:
        """Apply the operation to one image, (height, width, bands) of the run's kind."""
        changed = self.operation.on_image(image, drawn)
        if self.is_checked:
            check_result("on_image", changed, np.ndarray, image.shape, image.dtype, self.where)
        return changed

    def on_batch(self, images: Tensor, drawn: Drawn) -> Tensor:
        """Apply the operation to a batch, (batch, bands, height, width) float32 in 0..1."""
        changed = self.operation.on_batch(images, drawn)
        if self.is_checked:
            shape = tuple(images.shape)
            check_result("on_batch", changed, Tensor, shape, torch.float32, self.where)
        return changed


def check_result(
    method: str, changed: Any, kind: type, shape: Sequence[int], dtype: Any, where: str
) -> None:
    """Raise InputError if an operation of the user's returns no images of the same size."""
    is_expected = isinstance(changed, kind)
    if is_expected:
        is_expected = tuple(changed.shape) == tuple(shape) and changed.dtype == dtype
    if is_expected:
        return
    got = type(changed).__name__
    if hasattr(changed, "dtype") and hasattr(changed, "shape"):
        got = f"{got} of {changed.dtype} {tuple(changed.shape)}"
    if kind is np.ndarray:
        dtype = np.dtype(dtype)  # prints as uint8, and not as <class 'numpy.uint8'>
    expected = f"{kind.__name__} of {dtype} {tuple(shape)}"
    raise InputError(f"{where}: {method} returned {got}; expected {expected}")


def build_operation(
    name: str,
    settings: Mapping[str, Any] | None,
    image_size: int,
    where: str,
    kind: ImageKind = RGB_8_BIT,
) -> Step:
    """Build one step of a view.

    Args:
        name: of a known operation; any other name if the settings have a ``target``.
        settings: numbers of the operation, its ``probability`` (default 1), and, for a class of the
            user's that is not registered, its ``target``.
        image_size: side of the view, px.
        where: key of the view in the config, for error messages.
        kind: the images of the run.

    Raises:
        InputError: the operation, a setting or a value is unknown, or the operation is not for
            these images; the message names the key.
    """
    key = f"{where}.{name}"
    arguments = settings
    if settings is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        operation_class(name, None, where)  # an unknown name is the worse mistake
        raise InputError(f"{key}: expected settings, {{name: number, ...}}, got {settings}")
    arguments = dict(arguments)
    operation_type = operation_class(name, arguments.pop("target", None), where)
    probability = arguments.pop("probability", 1.0)
    if name == "random_resized_crop" and probability != 1:
        raise InputError(f"{key}: probability={probability}: expected 1, since it sets the size")
    if not is_number(probability, 0, 1):
        raise InputError(f"{key}: probability={probability}: expected a number from 0 to 1")
    check_settings(operation_type, arguments, key)
    fixed = {}
    if "image_size" in inspect.signature(operation_type).parameters:
        fixed["image_size"] = image_size
    try:
        operation = operation_type(**fixed, **arguments)
        # Not by assignment: the user's dataclass may be frozen.
        object.__setattr__(operation, "image_kind", kind)
        operation.check_kind(kind)
        return Step(name, operation, probability, key)
    except (TypeError, ValueError) as error:
        raise InputError(f"{key}: {error}") from error


def operation_class(name: str, target: Any, where: str) -> type[Operation]:
    """Return the class of an operation that is known by its name, or that a target names.

    Raises:
        InputError: there is no such operation, or the target is none.
    """
    key = f"{where}.{name}"
    if target is None:
        if name not in known_operations():
            raise InputError(f"{where}: {unknown_name('operation', name, known_operations())}")
        return known_operations()[name]
    if name in known_operations():
        raise InputError(f"{key}.target={target}: there is an operation '{name}'; rename the step")
    imported: Any = import_target(str(target), f"{key}.target")
    check_class(imported, f"{key}.target={target}")
    return imported


def check_settings(kind: type[Operation], arguments: Mapping[str, Any], key: str) -> None:
    """Raise InputError if an operation has no such settings."""
    choices = ["probability"]
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.kind == parameter.VAR_KEYWORD:
            return  # it takes settings of any name
        if name != "image_size":
            choices.append(name)
    for argument in arguments:
        if argument in choices:
            continue
        if argument in inspect.get_annotations(kind):
            raise InputError(f"{key}.{argument}: {kind.__name__} lacks @dataclass above the class")
        raise InputError(f"{key}: {unknown_name('setting', argument, choices)}")
