"""Augmentation of an image and its mask together. Letters: H W pixels."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from moco.data.augment.draws import draws_from
from moco.data.augment.operations import ColorJitter
from moco.data.augment.view_steps import build_operation
from moco.data.augment.views import Normalized
from moco.errors import InputError


class RandomScaledCrop(v2.Transform):
    """A random part of an image that was resized by a random factor, and the same part of its mask.

    Only what the crop needs is resized. Where the resized image is smaller than the crop, what is missing is filled up
    below and to the right. Images are resized bilinearly; a mask's pixel takes the number of the nearest one, at the
    same place as the image's.

    Args:
        image_size: side of the crop, px.
        scale: lowest and highest factor; drawn uniformly.
        fill: of the image, red, green, blue.
        ignore_index: of the mask.
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
        """The part to cut out, and its size after resizing, px."""
        factor = float(torch.empty(1).uniform_(*self.scale))
        starts, lengths, size = [], [], []
        for side in v2.functional.get_size(flat_inputs[0]):
            length = min(side, max(1, round(self.image_size / factor)))
            starts.append(int(torch.randint(side - length + 1, ())))
            lengths.append(length)
            size.append(
                self.image_size
                if length < side
                else min(self.image_size, max(1, round(side * factor)))
            )
        return {
            "top": starts[0],
            "left": starts[1],
            "height": lengths[0],
            "width": lengths[1],
            "size": size,
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        padding = [0, 0, self.image_size - params["size"][1], self.image_size - params["size"][0]]
        if isinstance(inpt, tv_tensors.Mask):
            # As an image: for masks torchvision has only the older nearest, which is off by up to half a pixel.
            numbers = inpt.as_subclass(Tensor)[None]
            resized = v2.functional.resized_crop(
                numbers, **params, interpolation=v2.InterpolationMode.NEAREST_EXACT, antialias=False
            )
            return tv_tensors.Mask(v2.functional.pad(resized, padding, fill=self.ignore_index)[0])
        resized = v2.functional.resized_crop(inpt, **params)
        return v2.functional.pad(resized, padding, fill=self.fill)


class SegmentationView:
    """The augmented image and its mask; flip and crop are the same for both, the colours change in the image alone.

    A draw depends on (seed, epoch, index) alone: not on the worker, nor on what was drawn before.

    Args:
        image_size: side of the result, px.
        scale: lowest and highest factor of the size, see `RandomScaledCrop`.
        horizontal_flip: probability.
        color_jitter: settings of `moco.data.augment.operations.ColorJitter` and its `probability`; None: no jitter.
        mean, std: per channel, of pixels in 0..1.
        ignore_index: of pixels that the crop has and the image has not.

    Raises:
        InputError: a setting is out of range; it names the key.
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
        fill = [round(255 * channel) for channel in mean]  # 0 once it is normalised
        operations = [
            RandomScaledCrop(image_size, scale, fill, ignore_index),
            v2.RandomHorizontalFlip(horizontal_flip),
        ]
        if color_jitter is not None:
            operations.append(random_color_jitter(color_jitter, image_size))
        self.operations = v2.Compose(operations)
        self.ignore_index = ignore_index
        self.seed = seed

    def __call__(
        self, image: Image.Image, mask: np.ndarray, epoch: int, index: int
    ) -> tuple[Tensor, Tensor]:
        """Image `index` in epoch `epoch`, normalised (3, H, W), and its classes (H, W) int64."""
        if self.ignore_index > np.iinfo(mask.dtype).max:
            mask = mask.astype(np.int32)  # the crop is filled up with it
        with draws_from(self.seed, epoch, index, 0):
            image, classes = self.operations(image, tv_tensors.Mask(mask))
        return self.normalize(image), classes.as_subclass(Tensor).long()


def random_color_jitter(settings: Mapping[str, Any], image_size: int) -> v2.Transform:
    """Torchvision's colour jitter with settings as in a pair of views; errors of `build_operation`."""
    step = build_operation("color_jitter", settings, image_size, "augmentation")
    jitter = step.operation
    assert isinstance(jitter, ColorJitter)
    drawing = v2.ColorJitter(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    return v2.RandomApply([drawing], p=step.probability)
