"""A whole pipeline of the user's as one view, such as torchvision.transforms.v2's.

It works on one image at a time: a Pillow image, or a float32 tensor if the images are not 8-bit
RGB. Each image is augmented with the global random generators seeded
from (seed, epoch, index, view), so that the result does not depend on who computes it.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from moco.data.augment.draws import draws_from, seeds_from
from moco.data.augment.operation import RGB_8_BIT, Drawn, ImageKind, Numbers, Operation
from moco.data.augment.operations import RESERVED, Step
from moco.errors import InputError
from moco.targets import check_options, import_target

# Interpolation overshoots: a bicubic resize of a float image leaves 0..1 by less than this.
OVERSHOOT = 0.1


class Pipeline(Operation):
    """All augmentation of a view, by a callable.

    Args:
        transform: takes an image, and returns a view of `image_size`. An 8-bit RGB image is a
            Pillow image. Its view is one too, or a tensor (3, image_size, image_size), uint8 or
            floating-point in 0..1. Any other image is a tensor (bands, height, width) float32 in
            0..1, and so is its view, which may have another floating-point type.
        image_size: side of the view, px.
        where: its key in the config, for error messages.
        any_size: it was built for `image_size`, and can be built for other sizes.
        recipe: how loader processes build it, the arguments of `build_pipeline`. Without it they
            get a copy of `transform`.
        kind: the images of the run.
    """

    num_draws: ClassVar[int] = 1

    def __init__(
        self,
        transform: Callable[[Any], Any],
        image_size: int,
        where: str,
        any_size: bool = False,
        recipe: tuple[Any, ...] | None = None,
        kind: ImageKind = RGB_8_BIT,
    ) -> None:
        self.transform = transform
        self.image_size = image_size
        self.where = where
        self.any_size = any_size
        self.recipe = recipe
        self.image_kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        # A function inside of a function, such as the one that a target returns, has no copy.
        if self.recipe is not None:
            return build_pipeline, self.recipe
        settings = (self.transform, self.image_size, self.where, self.any_size, None)
        return Pipeline, (*settings, self.image_kind)

    def draw(self, draws: Tensor, sizes: Tensor) -> Drawn:
        return {"seed": seeds_from(draws[:, 0])}

    def on_image(self, image: np.ndarray, drawn: Numbers) -> np.ndarray:
        given: Any
        if image.dtype == np.uint8:
            given = Image.fromarray(image)
        else:
            given = planes_of(image)
        with draws_from(int(drawn["seed"])):
            result = self.transform(given)
        return self.checked_pixels(result)

    def checked_pixels(self, result: Any) -> np.ndarray:
        """Return what the pipeline returned as (image_size, image_size, bands) of the run's kind.

        Raises:
            InputError: it is no image of the view's size and bands.
        """
        side = self.image_size
        bands, is_float = self.image_kind
        if isinstance(result, Image.Image) and not is_float:
            expected = ("RGB", (side, side))
            if (result.mode, result.size) != expected:
                width, height = result.size
                raise InputError(
                    f"{self.where}: returned a PIL image of mode {result.mode} and {height} x "
                    f"{width} px; expected RGB of {side} x {side} px"
                )
            return np.asarray(result)
        if not isinstance(result, Tensor):
            expected_kind = "a PIL image or a tensor"
            if is_float:
                expected_kind = "a tensor"
            raise InputError(
                f"{self.where}: returned {type(result).__name__}; expected {expected_kind}"
            )
        pixels = result.detach().as_subclass(Tensor)
        if tuple(pixels.shape) != (bands, side, side):
            raise InputError(
                f"{self.where}: returned a tensor of shape {tuple(pixels.shape)}; "
                f"expected {(bands, side, side)}"
            )
        if pixels.is_floating_point():
            pixels = self.from_float(pixels)
        if pixels.dtype != self.image_kind.dtype:
            expected_type = "torch.uint8, or floating-point values in 0..1"
            if is_float:
                expected_type = "floating-point values in 0..1"
            raise InputError(
                f"{self.where}: returned a tensor of {pixels.dtype}; expected {expected_type}"
            )
        return np.ascontiguousarray(pixels.cpu().permute(1, 2, 0).numpy())

    def from_float(self, values: Tensor) -> Tensor:
        """Return values in 0..1 in the type of the run's kind.

        Raises:
            InputError: values lie outside of 0..1.
        """
        low, high = float(values.min()), float(values.max())
        if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):  # NaN is outside, too
            raise InputError(
                f"{self.where}: returned values from {low:.3g} to {high:.3g}; expected 0..1: "
                "leave out Normalize, since augmentation.mean and augmentation.std do it"
            )
        if self.image_kind.is_float:
            return values.float().clamp(0, 1)
        return torch.round(values * 255).clamp(0, 255).to(torch.uint8)

    def describe(self, drawn: Numbers) -> str:
        if inspect.isroutine(self.transform):
            return self.transform.__qualname__
        return " ".join(repr(self.transform).split())


def planes_of(image: np.ndarray) -> Tensor:
    """Return an array (height, width, bands) as a tensor (bands, height, width), copied."""
    return torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))


def pipeline_step(view: Any, image_size: int, where: str, kind: ImageKind = RGB_8_BIT) -> Step:
    """Return the only step of a view that is a pipeline.

    Args:
        view: a callable, see `Pipeline`; or ``{transforms: target, options: {...}}``, see
            `build_pipeline`.
        image_size: side of the view, px.
        where: key of the view in the config, for error messages.
        kind: the images of the run.

    Raises:
        InputError: there are operations beside the pipeline, or it cannot be built.
    """
    if callable(view):
        pipeline = Pipeline(view, image_size, where, kind=kind)
    else:
        beside = [name for name in view if name not in RESERVED]
        if beside:
            raise InputError(
                f"{where}.transforms: a whole pipeline has no operations beside it, and there is "
                f"{', '.join(beside)}; augmentation=custom starts without operations"
            )
        options = view.get("options")
        pipeline = build_pipeline(view["transforms"], options, image_size, where, kind)
    return Step("transforms", pipeline, 1.0, pipeline.where)


def build_pipeline(
    target: Any,
    options: Mapping[str, Any] | None,
    image_size: int,
    where: str,
    images: ImageKind = RGB_8_BIT,
) -> Pipeline:
    """Return the pipeline that a function of the user's returns.

    Args:
        target: ``package.module:function``. The function is given `image_size` if it takes it.
        options: its keyword arguments.
        image_size: side of the view, px.
        where: key of the view in the config, for error messages.
        images: their kind in the run.

    Raises:
        InputError: there is no such function, it does not take these options, it fails, or it
            returns no callable.
    """
    target = str(target)
    key = f"{where}.transforms"
    source = f"{key}={target}"
    function = import_target(target, key)
    if options is not None and not isinstance(options, Mapping):
        raise InputError(f"{where}.options={options}: expected {{name: value, ...}}")
    arguments = dict(options or {})
    if "image_size" in arguments:
        raise InputError(f"{where}.options.image_size: leave it out; it is data.image_size")
    any_size = takes_image_size(function)
    if any_size:
        arguments["image_size"] = image_size
    check_options(function, arguments, where, target)
    try:
        # Every loader process builds its own, and all have to be alike.
        with draws_from(0):
            transform = function(**arguments)
    except Exception as error:
        # Whatever the user's function does.
        raise InputError(f"{source}: {type(error).__name__}: {error}") from error
    if not callable(transform):
        kind = type(transform).__name__
        raise InputError(f"{source}: returned {kind}; expected a callable that takes an image")
    recipe = (target, options, image_size, where, images)
    return Pipeline(transform, image_size, source, any_size, recipe, images)


def takes_image_size(function: Callable[..., Any]) -> bool:
    """Return whether a function has an argument `image_size`."""
    try:
        return "image_size" in inspect.signature(function).parameters
    except ValueError:  # some functions written in C have no signature
        return False
