"""Random augmentation of an image and its mask together."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from moco.data.augment.draws import draws_from
from moco.data.augment.operations import ColorJitter, build_operation
from moco.data.augment.views import Normalized
from moco.errors import InputError


class RandomScaledCrop(v2.Transform):
    """Resize by a random factor, then crop at a random place; the same for image and mask.

    Only the part that the crop needs is resized. Where the resized image is smaller than the crop,
    the crop is filled up below and to the right. Images are resized bilinearly. A pixel of the mask
    gets the number of the nearest pixel.

    Args:
        image_size: side of the crop, px.
        scale: lowest and highest factor; the factor is uniform between them.
        fill: colour that fills up the image: red, green, blue, 0 to 255.
        ignore_index: number that fills up the mask.
    """

    def __init__(
        self, image_size: int, scale: Sequence[float], fill: Sequence[int], ignore_index: int
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.scale = scale
        self.fill = list(fill)
        self.ignore_index = ignore_index

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the part to cut out, and compute its size after resizing, px."""
        factor = float(torch.empty(1).uniform_(*self.scale))
        height, width = v2.functional.get_size(flat_inputs[0])
        top, cut_height, new_height = self._draw_range(height, factor)
        left, cut_width, new_width = self._draw_range(width, factor)
        return {
            "top": top,
            "left": left,
            "height": cut_height,
            "width": cut_width,
            "size": [new_height, new_width],
        }

    def _draw_range(self, side: int, factor: float) -> tuple[int, int, int]:
        """Draw which pixels of one side the crop shows.

        Returns:
            The first pixel, the number of pixels, and their number after resizing.
        """
        # The crop shows this many pixels of the source, because they are resized by the factor.
        length = min(side, max(1, round(self.image_size / factor)))
        start = int(torch.randint(side - length + 1, ()))
        if length < side:
            return start, length, self.image_size
        # The whole side is shown. It may be shorter than the crop, which is then filled up.
        return start, length, min(self.image_size, max(1, round(side * factor)))

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        height, width = params["size"]
        padding = [0, 0, self.image_size - width, self.image_size - height]
        if not isinstance(inpt, tv_tensors.Mask):
            resized = v2.functional.resized_crop(inpt, **params)
            return v2.functional.pad(resized, padding, fill=self.fill)
        # Torchvision resizes masks with an older "nearest", which is off by up to half a pixel.
        # As an image the mask can be resized with the exact one.
        numbers = inpt.as_subclass(Tensor)[None]
        resized = v2.functional.resized_crop(
            numbers, **params, interpolation=v2.InterpolationMode.NEAREST_EXACT, antialias=False
        )
        padded = v2.functional.pad(resized, padding, fill=self.ignore_index)
        return tv_tensors.Mask(padded[0])


class SegmentationView:
    """Augment an image and its mask: one crop and flip for both, colours for the image alone.

    The random numbers depend on (seed, epoch, index) alone. They do not depend on the worker
    process, nor on what was drawn before.

    Args:
        image_size: side of the result, px.
        scale: lowest and highest factor of the size, see `RandomScaledCrop`.
        horizontal_flip: probability.
        color_jitter: settings of `ColorJitter` and their ``probability``; None: no jitter.
        mean, std: per channel, of pixels in 0..1.
        ignore_index: the number of pixels of the crop that lie outside the image.
        seed: of the random numbers.

    Raises:
        InputError: a setting is out of range. The message names its key.
    """

    def __init__(
        self,
        image_size: int,
        *,
        scale: Sequence[float],
        horizontal_flip: float,
        color_jitter: Mapping[str, Any] | None,
        mean: Sequence[float],
        std: Sequence[float],
        ignore_index: int,
        seed: int,
    ) -> None:
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise InputError(
                f"augmentation.scale={list(scale)}: expected two factors, 0 < low <= high"
            )
        self.normalize = Normalized(mean, std)
        # Pixels outside the image are 0 after the normalisation.
        fill = [round(255 * channel) for channel in mean]
        operations = [
            RandomScaledCrop(image_size, scale, fill, ignore_index),
            v2.RandomHorizontalFlip(horizontal_flip),
        ]
        if color_jitter is not None:
            operations.append(build_color_jitter(color_jitter, image_size))
        self.operations = v2.Compose(operations)
        self.image_size = image_size
        self.ignore_index = ignore_index
        self.seed = seed

    def __call__(
        self, image: Image.Image, mask: np.ndarray, epoch: int, index: int
    ) -> tuple[Tensor, Tensor]:
        """Augment image number `index` in epoch `epoch`.

        Args:
            mask: (height, width) class numbers.

        Returns:
            The normalised image (3, image_size, image_size) and the classes of its pixels
            (image_size, image_size) int64.
        """
        if self.ignore_index > np.iinfo(mask.dtype).max:
            mask = mask.astype(np.int32)  # because the crop is filled up with ignore_index
        with draws_from(self.seed, epoch, index, 0):
            image, classes = self.operations(image, tv_tensors.Mask(mask))
        return self.normalize(image), classes.as_subclass(Tensor).long()


def build_color_jitter(settings: Mapping[str, Any], image_size: int) -> v2.Transform:
    """Return torchvision's colour jitter for the settings of a pretraining view's jitter.

    Raises:
        InputError: a setting is unknown or out of range.
    """
    # Pretraining's operation checks the settings. Torchvision's draws, because it takes a mask too.
    step = build_operation("color_jitter", settings, image_size, "augmentation")
    jitter = step.operation
    assert isinstance(jitter, ColorJitter)
    transform = v2.ColorJitter(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    return v2.RandomApply([transform], p=step.probability)
