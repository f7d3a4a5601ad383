"""Augmentation of one image in memory, (H, W, 3) uint8 RGB: torchvision's operations with faster kernels.

Brightness, contrast and solarisation give Pillow's pixels. The others round differently, by a grey level or so; hue goes
through 8-bit HSV as Pillow's does, with another rounding. `scripts/compare_augmentations.py` prints the differences.
"""

import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from moco.data.augment.linear_colors import TO_GRAY, jitter_matrix

cv2.setNumThreads(
    1
)  # an image is too small for several, and the loader's processes are parallel already

VALUES = np.arange(256, dtype=np.float32)  # Pillow blends in single precision


def resized_crop(
    image: np.ndarray, box: Sequence[int], side: int, antialias: bool = True
) -> np.ndarray:
    """The box (top, left, height, width), resized to side x side: bilinear, antialiased where it shrinks."""
    top, left, height, width = (int(number) for number in box)
    crop = image[top : top + height, left : left + width]
    if not antialias or (height <= side and width <= side):
        return cv2.resize(crop, (side, side), interpolation=cv2.INTER_LINEAR)
    # Of pixels that lie together, and whose batch dimension says so too, torch resizes all channels at once.
    images = torch.from_numpy(crop.copy()).view(1, height, width, 3).permute(0, 3, 1, 2)
    resized = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def resized_crop_between_pixels(image: np.ndarray, box: Sequence[float], side: int) -> np.ndarray:
    """The same of a box whose edges are no whole pixels, by Pillow.

    Of an image that was decoded to half its size, a box in whole pixels is off by up to a pixel at each edge, which changes
    the view more than decoding it smaller does.
    """
    top, left, height, width = box
    first_row, first_column = int(top), int(left)
    last_row, last_column = math.ceil(top + height), math.ceil(left + width)
    crop = Image.fromarray(image[first_row:last_row, first_column:last_column])
    inside = (
        left - first_column,
        top - first_row,
        min(left + width - first_column, crop.width),
        min(top + height - first_row, crop.height),
    )
    return np.asarray(crop.resize((side, side), Image.Resampling.BILINEAR, inside))


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    return cv2.LUT(image, as_pixels(VALUES * factor))


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    mean = int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return cv2.LUT(image, as_pixels(mean + (VALUES - mean) * factor))


def saturation(image: np.ndarray, factor: float) -> np.ndarray:
    return cv2.transform(image, factor * np.eye(3) + (1 - factor) * TO_GRAY)


def hue(image: np.ndarray, shift: float) -> np.ndarray:
    """A turn of the colour circle by `shift`, a fraction of it."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    row = np.zeros(hsv.shape[1:], np.uint8)
    row[:, 0] = int(shift * 255) % 256
    hsv += row  # several times as fast as on the first of three channels alone
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def linear_color_jitter(image: np.ndarray, factors: np.ndarray, order: np.ndarray) -> np.ndarray:
    """All color steps at once, see `moco.data.augment.linear_colors`."""
    return cv2.transform(image, jitter_matrix(factors, order, np.array(cv2.mean(image)[:3])))


def as_pixels(values: np.ndarray) -> np.ndarray:
    """Cut off to 0..255 and to whole numbers, as Pillow blends."""
    return values.clip(0, 255).astype(np.uint8)


COLOR_STEPS: tuple[Callable[[np.ndarray, float], np.ndarray], ...] = (
    brightness,
    contrast,
    saturation,
    hue,
)


def grayscale(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Edges are continued; the kernel ends at three sigma."""
    if sigma == 0:
        return image
    kernel = cv2.getGaussianKernel(2 * int(np.ceil(3 * sigma)) + 1, sigma)
    # Twice as fast as cv2.GaussianBlur, and nearer to the sum in double precision.
    return cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)


def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
    return cv2.LUT(image, np.where(threshold <= VALUES, 255 - VALUES, VALUES).astype(np.uint8))


def horizontal_flip(image: np.ndarray) -> np.ndarray:
    return cv2.flip(image, 1)


def write_planes(image: np.ndarray, planes: np.ndarray) -> None:
    """The (H, W, 3) image into `planes`, (3, H, W)."""
    cv2.split(image, [*planes])
