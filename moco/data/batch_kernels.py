"""Augmentation of a whole batch, (N, 3, H, W) float32 in 0..1, each image with its own numbers.

Written without a loop over images and without asking the device for a value. Resizing and blurring are products with a
matrix per image: these are small, or on a GPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow and torchvision


def luma(images: Tensor) -> Tensor:
    """(N, 1, H, W)."""
    red, green, blue = images.unbind(1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])[:, None]


def resized_crop(images: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Each image's box, resized to side x side: bilinear, antialiased where it shrinks.

    Args:
        boxes: (N, 4), top, left, height, width, px.
    """
    num, channels, height, width = images.shape
    top, left, box_height, box_width = boxes.to(images.dtype).unbind(1)
    columns = resize_weights(left, box_width, width, side)  # (N, S, W)
    rows = resize_weights(top, box_height, height, side)  # (N, S, H)
    narrow = images.reshape(num, channels * height, width) @ columns.mT
    return rows[:, None] @ narrow.view(num, channels, height, side)


def resize_weights(start: Tensor, length: Tensor, size: int, side: int) -> Tensor:
    """(N, side, size): how much each of `size` pixels counts for each of `side` that the stretch from `start` is resized to.

    A triangle as wide as two pixels, of the source or of the result, whichever are larger (Pillow's bilinear filter). Pixels
    beside the stretch do not count.
    """
    start, length = start[:, None, None], length[:, None, None]
    scale = length / side
    pixels = torch.arange(size, device=start.device, dtype=start.dtype)
    centres = start + (torch.arange(side, device=start.device, dtype=start.dtype)[:, None] + 0.5) * scale
    weights = (1 - (pixels + 0.5 - centres).abs() / scale.clamp(min=1)).clamp_(min=0)
    weights *= (pixels >= start) & (pixels < start + length)
    return weights / weights.sum(2, keepdim=True)


def affine(images: Tensor, angle: Tensor, shift: Tensor, shear: Tensor) -> Tensor:
    """Turned and sheared about the middle, then shifted; bilinear, black where nothing comes from.

    Args:
        angle, shear: (N,), degrees, clockwise as in torchvision; shear along the rows.
        shift: (N, 2), px to the right and down.
    """
    height, width = images.shape[2:]
    cos, sin, tan = angle.deg2rad().cos(), angle.deg2rad().sin(), shear.deg2rad().tan()
    # The inverse of rotation times shear, whose determinant is 1; for F.affine_grid in halves of the sides.
    (right, down), (a, b) = shift.unbind(1), (cos - sin * tan, cos * tan + sin)
    across = torch.stack([a, b * (height / width), -(a * right + b * down) / (width / 2)], 1)
    along = torch.stack([-sin * (width / height), cos, (sin * right - cos * down) / (height / 2)], 1)
    theta = torch.stack([across, along], 1).to(images.dtype)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def color_jitter(images: Tensor, factors: Tensor, order: Tensor, *, has_hue: bool) -> Tensor:
    """Brightness, contrast, saturation and hue, in each image's own order.

    The first three are blends with black, with the mean grey and with the picture's grey. All images take the blends that
    come before hue, then hue, then the others; a blend on the other side of hue has the factor 1 and changes nothing.

    Args:
        factors: (N, 4), three factors and the shift of hue, a fraction of a turn.
        order: (N, 4), which step comes first, second, ...: 0 brightness, 1 contrast, 2 saturation, 3 hue.
    """
    place_of_hue = (order == 3).int().argmax(1, keepdim=True)  # (N, 1)
    places = torch.arange(3, device=order.device)
    is_before = places < place_of_hue  # (N, 3)
    blends = order.gather(1, places + ~is_before)
    chosen = factors.gather(1, blends).to(images.dtype)
    if not has_hue:
        return blended(images, chosen, blends)
    images = blended(images, chosen.where(is_before, 1.0), blends)
    images = hue(images, factors[:, 3].to(images.dtype))
    return blended(images, chosen.where(~is_before, 1.0), blends)


def blended(images: Tensor, factors: Tensor, blends: Tensor) -> Tensor:
    """Three blends of each image, cut off to 0..1 after each.

    Args:
        factors: (N, 3), 1 changes nothing, 0 leaves what it is blended with.
        blends: (N, 3), 0 brightness, 1 contrast, 2 saturation.
    """
    for factor, blend in zip(factors.unbind(1), blends.unbind(1), strict=True):
        gray = luma(images)
        is_contrast, is_saturation = ((blend == number).to(images.dtype)[:, None, None, None] for number in (1, 2))
        other = gray * is_saturation + gray.mean((2, 3), keepdim=True) * is_contrast
        images = torch.lerp(other, images, factor[:, None, None, None]).clamp_(0, 1)
    return images


def hue(images: Tensor, shift: Tensor) -> Tensor:
    """A turn of the colour circle (HSV) by `shift` (N,), a fraction of it."""
    # Masks as numbers, work in place: torch.where and a maximum over a dimension take several times as long on a CPU.
    red, green, blue = images.unbind(1)
    highest = torch.maximum(torch.maximum(red, green), blue)
    lowest = torch.minimum(torch.minimum(red, green), blue)
    chroma = highest - lowest
    is_red = (highest == red).to(images.dtype)
    is_green = (highest == green).to(images.dtype).mul_(1 - is_red)
    is_blue = 1 - is_red - is_green
    sixths = (green - blue).mul_(is_red).addcmul_(blue - red, is_green).addcmul_(red - green, is_blue)
    sixths.div_(chroma.clamp(min=1e-12)).add_(is_green, alpha=2).add_(is_blue, alpha=4).add_(6 * shift[:, None, None])
    sixths.sub_(torch.floor(sixths / 6), alpha=6)
    turned = torch.empty_like(images)
    for channel, (middle, sign, width) in enumerate(((3, 1, -1), (2, -1, 2), (4, -1, 2))):
        share = (sixths - middle).abs_().mul_(sign).add_(width).clamp_(0, 1)
        torch.addcmul(lowest, share, chroma, out=turned[:, channel])
    return turned


def gaussian_blur(images: Tensor, sigma: Tensor, *, max_sigma: float) -> Tensor:
    """Blur with each image's own `sigma` (N,), px; the kernel ends at three sigma, edges are continued."""
    radius = max(1, int(-(-3 * max_sigma // 1)))
    num, channels, height, width = images.shape
    padded = F.pad(images, (radius, radius, radius, radius), mode="replicate")
    columns, rows = (blur_weights(sigma.to(images.dtype), side, radius) for side in (width, height))
    narrow = padded.view(num, channels * padded.shape[2], padded.shape[3]) @ columns.mT
    return rows[:, None] @ narrow.view(num, channels, padded.shape[2], width)


def blur_weights(sigma: Tensor, side: int, radius: int) -> Tensor:
    """(N, side, side + 2 * radius): a row for each pixel of the result."""
    pixels = torch.arange(side + 2 * radius, device=sigma.device) - radius
    distance = (pixels - torch.arange(side, device=sigma.device)[:, None]).abs().to(sigma.dtype)
    sigma = sigma[:, None, None]
    exponent = -(distance**2) / (2 * sigma.clamp(min=1e-3) ** 2)
    weights = exponent.exp() * (distance <= torch.ceil(3 * sigma))
    return weights / weights.sum(2, keepdim=True)
