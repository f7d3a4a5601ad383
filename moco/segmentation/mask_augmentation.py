"""Random augmentation of an image and its mask together."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from moco.data.augment.draws import draws_from
from moco.data.augment.operations import ColorJitter, build_operation
from moco.data.augment.views import Normalized
from moco.errors import InputError


class Cut(NamedTuple):
    """Which pixels of one side of an image a crop shows."""

    start: int
    """The first pixel."""
    length: int
    """The number of pixels."""
    new_length: int
    """Their number after resizing."""


def draw_cut(side: int, factor: float, image_size: int) -> Cut:
    """Draw which pixels of one side the crop shows, when the image is resized by a factor.

    Args:
        side: of the image, px.
        image_size: side of the crop, px.
    """
    # The crop shows this many pixels of the source, because they are resized by the factor.
    length = min(side, max(1, round(image_size / factor)))
    start = int(torch.randint(side - length + 1, ()))
    if length < side:
        return Cut(start, length, image_size)
    # The whole side is shown. It may be shorter than the crop, which is then filled up.
    new_length = max(1, round(side * factor))
    return Cut(start, length, min(image_size, new_length))


class SegmentationView:
    """Augment an image and its mask: one crop and flip for both, colours for the image alone.

    Both are resized by a random factor and cropped at a random place. Only the part that the crop
    needs is resized. Where the resized image is smaller than the crop, the crop is filled up below
    and to the right. Images are resized bilinearly. A pixel of the mask gets the number of the
    nearest pixel.

    The random numbers depend on (seed, epoch, index) alone. They do not depend on the worker
    process, nor on what was drawn before.

    Args:
        image_size: side of the result, px.
        scale: lowest and highest factor of the size; the factor is uniform between them.
        horizontal_flip: probability.
        color_jitter: settings of `ColorJitter` and their ``probability``; None: no jitter.
        mean, std: per channel, of pixels in 0..1.
        ignore_index: the number of pixels of the crop that lie outside the image.
        seed: of the random numbers.
        bands: of the images.
        is_float: the images are float32 from 0 to 1, and not 8-bit RGB.

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
        bands: int = 3,
        is_float: bool = False,
    ) -> None:
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise InputError(
                f"augmentation.scale={list(scale)}: expected two factors, 0 < low <= high"
            )
        self.normalize = Normalized(mean, std, bands=bands, is_float=is_float)
        means = list(mean)
        if len(means) == 1:
            means *= bands
        # Pixels outside the image are 0 after the normalisation.
        self.fill = means
        if not is_float:
            self.fill = [round(255 * channel) for channel in means]
        self.jitter = None
        if color_jitter is not None:
            self.jitter = build_color_jitter(color_jitter, image_size, bands)
        self.image_size = image_size
        self.scale = scale
        self.horizontal_flip = horizontal_flip
        self.ignore_index = ignore_index
        self.seed = seed

    def __call__(
        self, pixels: Image.Image | np.ndarray, mask: np.ndarray, epoch: int, index: int
    ) -> tuple[Tensor, Tensor]:
        """Augment image number `index` in epoch `epoch`.

        Args:
            pixels: a Pillow image; (height, width, 3) uint8; or (height, width, bands) float32 from
                0 to 1.
            mask: (height, width) class numbers.

        Returns:
            The normalised image (bands, image_size, image_size) and the classes of its pixels
            (image_size, image_size) int64.
        """
        image = as_image(pixels)
        if self.ignore_index > np.iinfo(mask.dtype).max:
            mask = mask.astype(np.int32)  # because the crop is filled up with ignore_index
        with draws_from(self.seed, epoch, index, 0):
            image, classes = self._crop(image, torch.from_numpy(mask)[None])
            if torch.rand(1) < self.horizontal_flip:
                image, classes = F.horizontal_flip(image), F.horizontal_flip(classes)
            if self.jitter is not None:
                image = self.jitter(image)
        return normalized_image(self.normalize, image), classes[0].long()

    def _crop(self, image: Any, mask: Tensor) -> tuple[Any, Tensor]:
        """Resize and crop an image and its mask (1, height, width)."""
        factor = float(torch.empty(1).uniform_(*self.scale))
        height, width = mask.shape[1:]
        rows = draw_cut(height, factor, self.image_size)
        columns = draw_cut(width, factor, self.image_size)
        box = (rows.start, columns.start, rows.length, columns.length)
        size = [rows.new_length, columns.new_length]
        padding = [0, 0, self.image_size - columns.new_length, self.image_size - rows.new_length]
        image = F.pad(F.resized_crop(image, *box, size), padding, fill=self.fill)
        # Torchvision's "nearest" is off by up to half a pixel; this one is exact.
        nearest = v2.InterpolationMode.NEAREST_EXACT
        mask = F.resized_crop(mask, *box, size, interpolation=nearest, antialias=False)
        return image, F.pad(mask, padding, fill=self.ignore_index)


def as_image(pixels: Image.Image | np.ndarray) -> Image.Image | Tensor:
    """Return pixels in the form that torchvision transforms.

    Args:
        pixels: a Pillow image; (height, width, 3) uint8; or (height, width, bands) float32.

    Returns:
        A Pillow image, or a tensor (bands, height, width).
    """
    if isinstance(pixels, Image.Image):
        return pixels
    if pixels.dtype == np.uint8:
        return Image.fromarray(pixels)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def normalized_image(normalize: Normalized, image: Image.Image | Tensor) -> Tensor:
    """Return the result of `as_image` as a normalised tensor (bands, height, width)."""
    if isinstance(image, Image.Image):
        return normalize(image)
    return image * normalize.scale - normalize.shift


class BandJitter(v2.Transform):
    """Change brightness, then contrast, of images of any bands from 0 to 1.

    Args:
        brightness, contrast: the factor is drawn from 1 - x to 1 + x, one for all bands.
    """

    def __init__(self, brightness: float, contrast: float) -> None:
        super().__init__()
        self.brightness = brightness
        self.contrast = contrast

    def forward(self, image: Tensor) -> Tensor:
        """Return an image (bands, height, width) with another brightness and contrast."""
        brightness = factor_about_one(self.brightness)
        contrast = factor_about_one(self.contrast)
        image = (image * brightness).clamp(0, 1)
        mean = image.mean(dim=(1, 2), keepdim=True)
        return ((image - mean) * contrast + mean).clamp(0, 1)


def factor_about_one(largest: float) -> Tensor:
    """Draw a factor from 1 - largest, and at least 0, to 1 + largest: ()."""
    return torch.empty(()).uniform_(max(0, 1 - largest), 1 + largest)


def build_color_jitter(
    settings: Mapping[str, Any], image_size: int, bands: int = 3
) -> v2.Transform:
    """Return torchvision's colour jitter for the settings of a pretraining view's jitter.

    Images of other bands than RGB have no hue and saturation, so that only brightness and contrast
    change.

    Raises:
        InputError: a setting is unknown or out of range.
    """
    # Pretraining's operation checks the settings. Torchvision's draws, because it takes a mask too.
    step = build_operation("color_jitter", settings, image_size, "augmentation")
    jitter = step.operation
    assert isinstance(jitter, ColorJitter)
    if bands == 3:
        transform: v2.Transform = v2.ColorJitter(
            jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
        )
    else:
        transform = BandJitter(jitter.brightness, jitter.contrast)
    return v2.RandomApply([transform], p=step.probability)
