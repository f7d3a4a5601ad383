"""The work of the operations on a batch, (batch, bands, height, width) float32 in 0..1.

Saturation and hue work on RGB, the others on any number of bands.
Each image has its own numbers. There is no loop over images, and nothing here waits for a value
from the device. Resizing and blurring multiply each image with its own matrix, which is fast for
small images and on a GPU.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow and torchvision
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # in the order of ColorJitter.STEPS


def luma(images: Tensor) -> Tensor:
    """Return the grey images, (batch, 1, height, width)."""
    red, green, blue = images.unbind(1)
    gray = (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])
    return gray[:, None]


def grey(images: Tensor) -> Tensor:
    """Return the luma of RGB images and the mean of other bands, (batch, 1, height, width)."""
    if images.shape[1] == 3:
        return luma(images)
    return images.mean(1, keepdim=True)


def resized_crop(images: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Resize the box of each image to (side, side), bilinear, antialiased where it shrinks.

    Args:
        boxes: (batch, 4), top, left, height, width, px.
    """
    num, channels, height, width = images.shape
    top, left, box_height, box_width = boxes.to(images.dtype).unbind(1)
    column_weights = resize_weights(left, box_width, width, side)  # (batch, side, width)
    row_weights = resize_weights(top, box_height, height, side)  # (batch, side, height)
    narrow = images.reshape(num, channels * height, width) @ column_weights.mT
    return row_weights[:, None] @ narrow.view(num, channels, height, side)


def resize_weights(start: Tensor, length: Tensor, size: int, side: int) -> Tensor:
    """Return how much each pixel of a line counts for each pixel of the resized box.

    The weights are a triangle that is two pixels wide: pixels of the source where the box grows,
    pixels of the result where it shrinks (Pillow's bilinear filter). Pixels outside of the box do
    not count.

    Args:
        start: (batch,), where each box starts on its line, px.
        length: (batch,), of each box, px.
        size: pixels of the line.
        side: pixels of the result.

    Returns:
        (batch, side, size).
    """
    start = start[:, None, None]
    length = length[:, None, None]
    scale = length / side
    pixels = torch.arange(size, device=start.device, dtype=start.dtype) + 0.5
    places = torch.arange(side, device=start.device, dtype=start.dtype)[:, None] + 0.5
    centres = start + places * scale
    if size <= side:
        # Nothing shrinks: two pixels count for each of the result, and one at the edges.
        centres = centres.clamp(start + 0.5, start + length - 0.5)
        return 1 - (pixels - centres).abs_().clamp_(max=1)
    width = scale.clamp(min=1)
    weights = 1 - (pixels / width - centres / width).abs_().clamp_(max=1)
    is_in_box = (pixels >= start) & (pixels < start + length)
    weights.mul_(is_in_box.to(start.dtype))
    return weights.div_(weights.sum(2, keepdim=True))


def affine(images: Tensor, angle: Tensor, shift: Tensor, shear: Tensor) -> Tensor:
    """Rotate and shear each image about its middle, then shift it: bilinear, black outside.

    Args:
        angle, shear: (batch,), degrees, clockwise as in torchvision; the shear is horizontal.
        shift: (batch, 2), px to the right and down.
    """
    height, width = images.shape[2:]
    cos = angle.deg2rad().cos()
    sin = angle.deg2rad().sin()
    tan = shear.deg2rad().tan()
    right, down = shift.unbind(1)
    # The inverse of rotation times shear, whose determinant is 1. F.affine_grid measures in
    # halves of the sides.
    a = cos - sin * tan
    b = cos * tan + sin
    first_row = [a, b * (height / width), -(a * right + b * down) / (width / 2)]
    second_row = [-sin * (width / height), cos, (sin * right - cos * down) / (height / 2)]
    theta = torch.stack([torch.stack(first_row, 1), torch.stack(second_row, 1)], 1)
    grid = F.affine_grid(theta.to(images.dtype), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def quarter_turns(images: Tensor, turns: Tensor) -> Tensor:
    """Turn each square image to the left by its own number of quarter turns, (batch,) in 0..3."""
    turns = turns[:, None, None, None]
    # Exchanging rows and columns, and mirroring: a quarter turn needs both.
    images = torch.where(turns % 2 == 1, images.mT, images)
    images = torch.where((turns == 1) | (turns == 2), images.flip(-2), images)
    return torch.where(turns >= 2, images.flip(-1), images)


def color_jitter(images: Tensor, factors: Tensor, order: Tensor, *, has_hue: bool) -> Tensor:
    """Apply brightness, contrast, saturation and hue, in each image's own order.

    The first three are blends: with black, with the image's mean grey, and with its grey image.
    All images take the blends that come before hue, then hue, then the other blends.

    Args:
        factors: (batch, 4), three factors and the shift of hue, a fraction of a turn.
        order: (batch, 4), the step that comes first, second, ...: 0 brightness, 1 contrast,
            2 saturation, 3 hue.
    """
    place_of_hue = (order == HUE).int().argmax(1)  # (batch,)
    places = torch.arange(3, device=order.device)
    comes_later = places >= place_of_hue[:, None]
    blends = order.gather(1, places + comes_later)  # (batch, 3), the order without hue
    is_before_hue = places < place_of_hue[:, None]  # (batch, 3)
    if not has_hue:
        is_before_hue = torch.ones_like(is_before_hue)
    blend_factors = factors.gather(1, blends).to(images.dtype)
    shift = None
    if has_hue:
        shift = factors[:, HUE].to(images.dtype)
    if images.device.type == "cpu":
        return jitter_on_cpu(images, blends, blend_factors, is_before_hue, shift)
    return jitter_on_gpu(images, blends, blend_factors, is_before_hue, shift)


def jitter_on_cpu(
    images: Tensor, blends: Tensor, factors: Tensor, is_before_hue: Tensor, shift: Tensor | None
) -> Tensor:
    """Apply each blend only to the images that have it on this side of hue."""
    # The images are sorted by how many of their blends come before hue. Those that take a blend
    # then stand together, and are read and written as one piece of memory.
    rows = is_before_hue.sum(1).argsort(descending=True)
    images = images.index_select(0, rows)
    shares = blend_shares(factors, blends).index_select(0, rows)
    counts = is_before_hue.sum(0).tolist()
    for place, count in enumerate(counts):
        blend_(images[:count], shares[:count, place])
    if shift is not None:
        hue_(images, shift.index_select(0, rows))
        for place, count in enumerate(counts):
            blend_(images[count:], shares[count:, place])
    return images.index_select(0, rows.argsort())


def jitter_on_gpu(
    images: Tensor, blends: Tensor, factors: Tensor, is_before_hue: Tensor, shift: Tensor | None
) -> Tensor:
    """Apply every blend to all images on both sides of hue, with the factor 1 on the wrong side.

    To choose images, as on a CPU, would wait for the device.
    """
    images = images.clone()
    before = blend_shares(factors.where(is_before_hue, 1.0), blends)
    after = blend_shares(factors.where(~is_before_hue, 1.0), blends)
    for place in range(3):
        blend_(images, before[:, place])
    if shift is not None:
        hue_(images, shift)
        for place in range(3):
            blend_(images, after[:, place])
    return images


def blend_shares(factors: Tensor, blends: Tensor) -> Tensor:
    """Return the shares of the image, of its mean grey and of its grey image in each blend.

    Args:
        factors: (batch, 3); 1 changes nothing, 0 leaves only what the image is blended with.
        blends: (batch, 3), 0 brightness, 1 contrast, 2 saturation.

    Returns:
        (batch, 3 blends, 3 shares).
    """
    rest = 1 - factors
    return torch.stack([factors, rest * (blends == CONTRAST), rest * (blends == SATURATION)], 2)


def blend_(images: Tensor, shares: Tensor) -> None:
    """Blend each image in place and clip it to 0..1; `shares` is (batch, 3)."""
    of_image, of_mean, of_gray = shares[..., None, None, None].unbind(1)
    gray = grey(images)
    mean = gray.mean((2, 3), keepdim=True)
    added = gray.mul_(of_gray).add_(mean * of_mean)
    images.mul_(of_image).add_(added).clamp_(0, 1)


def hue_(images: Tensor, shift: Tensor) -> None:
    """Turn the colour circle (HSV) in place by `shift` (batch,), a fraction of a turn."""
    # Sorting the three channels needs two exchanges, and each exchange mirrors the hue about an
    # edge between two sectors of the circle. On a CPU, comparing or choosing per pixel takes
    # several times as long as arithmetic, so that everything here is arithmetic.
    red, green, blue = images.unbind(1)
    larger = torch.maximum(green, blue)
    smaller = torch.minimum(green, blue)
    is_blue_larger = one_where_positive_(blue - green)
    is_red_smaller = one_where_positive_(larger - red)
    edge = is_blue_larger.mul(2).sub_(1 / 3).mul_(is_red_smaller).sub_(is_blue_larger)
    highest = torch.maximum(red, larger)
    middle = torch.minimum(red, larger)
    lowest = torch.minimum(middle, smaller)
    chroma = highest - lowest
    turn = middle.sub_(smaller).div_(chroma.mul(6).clamp_(min=1e-12)).add_(edge).abs_()
    turn.add_(shift[:, None, None] + 1).frac_().mul_(6)
    # Back to RGB: each channel is a trapezoid of the hue, with its middle at one of three places.
    share = torch.empty_like(images)
    for channel, centre in enumerate((3, 2, 4)):
        torch.sub(turn, centre, out=share[:, channel])
    share.abs_().sub_(1).clamp_(0, 1)
    torch.addcmul(lowest, share[:, 0], chroma, out=images[:, 0])
    torch.addcmul(highest[:, None], share[:, 1:], chroma[:, None], value=-1, out=images[:, 1:])


def one_where_positive_(differences: Tensor) -> Tensor:
    """Replace positive numbers by 1 and others by 0; pixels differ by 0 or by more than 1e-30."""
    return differences.mul_(1e30).clamp_(0, 1)


def gaussian_blur(images: Tensor, sigma: Tensor, *, max_sigma: float) -> Tensor:
    """Blur each image with its own `sigma` (batch,), px.

    The kernel ends at three sigma, and the edge pixels are repeated.
    """
    radius = max(1, math.ceil(3 * max_sigma))
    num, channels, height, width = images.shape
    padded = F.pad(images, (radius, radius, radius, radius), mode="replicate")
    column_weights = blur_weights(sigma.to(images.dtype), width, radius)
    row_weights = blur_weights(sigma.to(images.dtype), height, radius)
    lines = padded.view(num, channels * padded.shape[2], padded.shape[3])
    narrow = (lines @ column_weights.mT).view(num, channels, padded.shape[2], width)
    return row_weights[:, None] @ narrow


def blur_weights(sigma: Tensor, side: int, radius: int) -> Tensor:
    """Return the weights of each padded pixel of a line, (batch, side, side + 2 * radius)."""
    pixels = torch.arange(side + 2 * radius, device=sigma.device) - radius
    centres = torch.arange(side, device=sigma.device)[:, None]
    distance = (pixels - centres).abs().to(sigma.dtype)
    sigma = sigma[:, None, None]
    exponent = -(distance**2) / (2 * sigma.clamp(min=1e-3) ** 2)
    weights = exponent.exp() * (distance <= torch.ceil(3 * sigma))
    return weights / weights.sum(2, keepdim=True)
