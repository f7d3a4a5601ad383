"""The work of the operations on one image in memory.

It is (height, width, 3) uint8 RGB, or (height, width, bands) float32 in 0..1. Saturation and hue
work on RGB, the others on any number of bands.

In 8 bits, brightness, contrast and solarisation give Pillow's pixels. The others round differently,
by about one grey level. Hue goes through 8-bit HSV, as in Pillow, with another rounding.
`scripts/compare_augmentations.py` prints the differences.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from moco.data.augment import batch_kernels

# One image is too small for several threads, and the loader has several processes already.
cv2.setNumThreads(1)

# All values of a pixel. Pillow blends in single precision.
VALUES = np.arange(256, dtype=np.float32)
MOST_BANDS_OF_OPENCV = 128
MOST_BANDS_OF_TORCH = 4  # with more, torch's interpolation is slower than products
BLOCK_SIDE = 16  # px
TO_GRAY = np.array([[0.299, 0.587, 0.114]] * 3)  # ITU-R BT.601, as in Pillow


def resized_crop(image: np.ndarray, box: Sequence[int], side: int) -> np.ndarray:
    """Cut out the box and resize it to (side, side, bands), bilinear, antialiased where it shrinks.

    Args:
        box: top, left, height, width, px.
    """
    top, left, height, width = map(int, box)
    crop = image[top : top + height, left : left + width]
    if height <= side and width <= side:
        grow = partial(cv2.resize, dsize=(side, side), interpolation=cv2.INTER_LINEAR)
        return by_opencv(grow, crop)
    if image.dtype == np.float32 and image.shape[2] > MOST_BANDS_OF_TORCH:
        return resized_by_products(crop, side)
    # torch resizes all channels at once only if the memory is contiguous, and if the strides of
    # the batch dimension say so too.
    images = torch.from_numpy(crop.copy()).view(1, height, width, -1).permute(0, 3, 1, 2)
    shrunk = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    return np.ascontiguousarray(shrunk[0].permute(1, 2, 0).numpy())


def by_opencv(work: Callable[[np.ndarray], np.ndarray], image: np.ndarray) -> np.ndarray:
    """Return what a function of OpenCV makes of an image with any number of bands."""
    bands = image.shape[2]
    if bands <= MOST_BANDS_OF_OPENCV:
        result = work(image)
        return result.reshape(*result.shape[:2], bands)  # it leaves out the axis of one band
    parts = []
    for first in range(0, bands, MOST_BANDS_OF_OPENCV):
        some = np.ascontiguousarray(image[..., first : first + MOST_BANDS_OF_OPENCV])
        parts.append(by_opencv(work, some))
    return np.concatenate(parts, axis=2)


def split_bands(image: np.ndarray, planes: np.ndarray) -> None:
    """Copy an image (height, width, bands) into planes (bands, height, width)."""
    if image.shape[2] <= MOST_BANDS_OF_OPENCV:
        cv2.split(image, [*planes])  # faster than NumPy
    else:
        np.copyto(planes, image.transpose(2, 0, 1))


def resized_by_products(image: np.ndarray, side: int) -> np.ndarray:
    """Resize a float32 image to (side, side, bands), bilinear, antialiased where it shrinks.

    A line of the result depends on few neighbouring lines. Sixteen lines of the result at a time
    are a product of matrices with the lines that they depend on, first along the height, then
    along the width. The bands stay beside one another, so a product has thousands of columns. With
    13 bands this takes 60 % of the time of torch's interpolation.
    """
    _, width, bands = image.shape
    # A crop is a part of its image, and its lines need no copy.
    lines = torch.from_numpy(image).flatten(1)
    low = resized_lines(lines, side).view(side, width, bands)
    columns = low.transpose(0, 1).reshape(width, side * bands)
    result = resized_lines(columns, side).view(side, side, bands)
    return result.transpose(0, 1).contiguous().numpy()


def resized_lines(lines: torch.Tensor, side: int) -> torch.Tensor:
    """Resize lines (size, values) to (side, values) along their first axis."""
    size, num_values = lines.shape
    result = torch.empty(side, num_values)
    for target, source, weights in line_blocks(size, side):
        torch.mm(weights, lines[source], out=result[target])
    return result


# Crops have a few hundred sizes, whose weights take longer than the copies of an image. One entry
# is about 40 KB.
@lru_cache(maxsize=512)
def line_blocks(size: int, side: int) -> list[tuple[slice, slice, torch.Tensor]]:
    """Return neighbouring lines of the result, the lines that they depend on, and the weights."""
    start, length = torch.tensor([[0.0], [float(size)]])
    weights = batch_kernels.resize_weights(start, length, size, side)[0]  # (side, size)
    scale = size / side
    reach = max(scale, 1)
    blocks = []
    for first in range(0, side, BLOCK_SIDE):
        end = min(first + BLOCK_SIDE, side)
        lowest = math.floor((first + 0.5) * scale - reach)
        highest = math.ceil((end - 0.5) * scale + reach)
        target = slice(first, end)
        source = slice(max(0, lowest), min(size, highest + 1))
        blocks.append((target, source, weights[target, source].clone()))
    return blocks


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with black."""
    if image.dtype == np.float32:
        return scaled(image, factor, 0)
    return cv2.LUT(image, to_pixels(VALUES * factor))


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the mean grey of the image: its luma if it is RGB, or the mean of its bands."""
    if image.dtype == np.float32:
        gray = image
        if image.shape[2] == 3:
            gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        return scaled(image, factor, (1 - factor) * float(gray.mean()))
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    mean = int(cv2.mean(gray)[0] + 0.5)
    return cv2.LUT(image, to_pixels(mean + (VALUES - mean) * factor))


def saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the grey image."""
    blended = cv2.transform(image, factor * np.eye(3) + (1 - factor) * TO_GRAY)
    if image.dtype == np.float32:
        return blended.clip(0, 1)
    return blended


def hue(image: np.ndarray, shift: float) -> np.ndarray:
    """Turn the colour circle by `shift`, a fraction of a turn."""
    if image.dtype == np.float32:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0] + 360 * shift) % 360
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    # Adding to all three channels is several times as fast as adding to the first one alone.
    row = np.zeros(hsv.shape[1:], np.uint8)
    row[:, 0] = int(shift * 255) % 256
    hsv += row
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def scaled(image: np.ndarray, factor: float, added: float) -> np.ndarray:
    """Return a float32 image times a factor, plus a number, clipped to 0..1."""
    result = image * np.float32(factor)
    result += np.float32(added)
    return np.clip(result, 0, 1, out=result)


def band_jitter(image: np.ndarray, brightness: np.ndarray, contrast: np.ndarray) -> np.ndarray:
    """Move a float32 image away from the mean of each band, multiply and clip to 0..1.

    Args:
        brightness, contrast: (bands,), factors.
    """
    height, width, bands = image.shape
    # Whole lines at once: a loop over the bands of each pixel takes several times as long.
    lines = image.reshape(height, width * bands)
    mean = lines.mean(0).reshape(width, bands).mean(0)
    factors = np.float32(brightness * contrast)
    added = np.float32(mean * brightness * (1 - contrast))
    result = lines * np.tile(factors, width)
    result += np.tile(added, width)
    return np.clip(result, 0, 1, out=result).reshape(image.shape)


def horizontal_flip(image: np.ndarray) -> np.ndarray:
    """Exchange left and right."""
    if image.dtype == np.float32:
        return np.ascontiguousarray(image[:, ::-1])  # OpenCV is slow with many bands
    return cv2.flip(image, 1)


def to_pixels(values: np.ndarray) -> np.ndarray:
    """Clip to 0..255 and cut off the fraction, as Pillow does when it blends."""
    return values.clip(0, 255).astype(np.uint8)


# In the order of ColorJitter.STEPS.
COLOR_STEPS = (brightness, contrast, saturation, hue)


def gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blur with `sigma` px. The kernel ends at three sigma, and the edge pixels are repeated."""
    if sigma == 0:
        return image
    kernel = cv2.getGaussianKernel(2 * int(np.ceil(3 * sigma)) + 1, sigma)
    # Twice as fast as cv2.GaussianBlur, and nearer to the sum in double precision.
    edges = cv2.BORDER_REPLICATE
    blur = partial(cv2.sepFilter2D, ddepth=-1, kernelX=kernel, kernelY=kernel, borderType=edges)
    return by_opencv(blur, image)
