"""Augmentation of a whole batch, (N, 3, H, W) float32 in 0..1, each image with its own numbers.

Written without a loop over images and without asking the device for a value. Resizing and blurring are products with a
matrix per image: these are small, or on a GPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.data.augment.linear_colors import jitter_matrices

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow and torchvision


def luma(images: Tensor) -> Tensor:
    """(N, 1, H, W)."""
    red, green, blue = images.unbind(1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])[:, None]


def resized_crop(images: Tensor, boxes: Tensor, side: int, antialias: bool = True) -> Tensor:
    """Each image's box, resized to side x side: bilinear, antialiased where it shrinks.

    Args:
        boxes: (N, 4), top, left, height, width, px.
    """
    num, channels, height, width = images.shape
    top, left, box_height, box_width = boxes.to(images.dtype).unbind(1)
    columns = resize_weights(left, box_width, width, side, antialias)  # (N, S, W)
    rows = resize_weights(top, box_height, height, side, antialias)  # (N, S, H)
    narrow = images.reshape(num, channels * height, width) @ columns.mT
    return rows[:, None] @ narrow.view(num, channels, height, side)


def resize_weights(
    start: Tensor, length: Tensor, size: int, side: int, antialias: bool = True
) -> Tensor:
    """(N, side, size): how much each of `size` pixels counts for each of `side` that the stretch from `start` is resized to.

    A triangle as wide as two pixels, of the source or, antialiased, of the result if those are larger (Pillow's bilinear
    filter). Pixels beside the stretch do not count.
    """
    start, length = start[:, None, None], length[:, None, None]
    scale = length / side
    pixels = torch.arange(size, device=start.device, dtype=start.dtype) + 0.5
    centres = (
        start + (torch.arange(side, device=start.device, dtype=start.dtype)[:, None] + 0.5) * scale
    )
    if not antialias or size <= side:  # two pixels count for each of the result, at the edges one
        inside = centres.clamp(start + 0.5, start + length - 0.5)
        return 1 - (pixels - inside).abs_().clamp_(max=1)
    width = scale.clamp(min=1)
    weights = 1 - (pixels / width - centres / width).abs_().clamp_(max=1)
    weights.mul_(((pixels >= start) & (pixels < start + length)).to(start.dtype))
    return weights.div_(weights.sum(2, keepdim=True))


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
    along = torch.stack(
        [-sin * (width / height), cos, (sin * right - cos * down) / (height / 2)], 1
    )
    theta = torch.stack([across, along], 1).to(images.dtype)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def color_jitter(images: Tensor, factors: Tensor, order: Tensor, *, has_hue: bool) -> Tensor:
    """Brightness, contrast, saturation and hue, in each image's own order.

    The first three are blends with black, with the mean grey and with the image's grey. All images take the blends that
    come before hue, then hue, then the others.

    Args:
        factors: (N, 4), three factors and the shift of hue, a fraction of a turn.
        order: (N, 4), which step comes first, second, ...: 0 brightness, 1 contrast, 2 saturation, 3 hue.
    """
    place_of_hue = (order == 3).int().argmax(1)  # (N,)
    places = torch.arange(3, device=order.device)
    blends = order.gather(1, places + (places >= place_of_hue[:, None]))  # (N, 3)
    is_before = (places < place_of_hue[:, None]) | (not has_hue)  # (N, 3)
    chosen = factors.gather(1, blends).to(images.dtype)
    shift = factors[:, 3].to(images.dtype)
    if images.device.type == "cpu":
        # Sorted by how many of their blends come before hue, the images that take a blend there are the first ones.
        rows = is_before.sum(1).argsort(descending=True)
        images, blends, chosen, shift = (
            values.index_select(0, rows) for values in (images, blends, chosen, shift)
        )
        counts = is_before.sum(0).tolist()
        before, after = [slice(count) for count in counts], [slice(count, None) for count in counts]
        early = late = blend_shares(chosen, blends)
    else:  # there each takes every blend, and on the other side of hue with the factor 1
        images, before, after = images.clone(), [slice(None)] * 3, [slice(None)] * 3
        early, late = (
            blend_shares(chosen.where(here, 1.0), blends) for here in (is_before, ~is_before)
        )
    for place, some in enumerate(before):
        blend_(images[some], early[some, place])
    if has_hue:
        hue_(images, shift)
        for place, some in enumerate(after):
            blend_(images[some], late[some, place])
    return images.index_select(0, rows.argsort()) if images.device.type == "cpu" else images


def blend_shares(factors: Tensor, blends: Tensor) -> Tensor:
    """(N, 3, 3): of each image's blends, the shares of itself, of its mean grey and of its grey.

    Args:
        factors: (N, 3), 1 changes nothing, 0 leaves what it is blended with.
        blends: (N, 3), 0 brightness (with black), 1 contrast, 2 saturation.
    """
    rest = 1 - factors
    return torch.stack([factors, rest * (blends == 1), rest * (blends == 2)], 2)


def blend_(images: Tensor, shares: Tensor) -> None:
    """One blend of each image, in place, cut off to 0..1; `shares` (N, 3) as of `blend_shares`."""
    own, of_mean, of_gray = shares[..., None, None, None].unbind(1)
    gray = luma(images)
    mean = gray.mean((2, 3), keepdim=True)
    images.mul_(own).add_(gray.mul_(of_gray).add_(mean * of_mean)).clamp_(0, 1)


def hue_(images: Tensor, shift: Tensor) -> None:
    """A turn of the colour circle (HSV) by `shift` (N,), a fraction of it, in place."""
    # Red is put in order with the larger and the smaller of green and blue; each exchange mirrors the hue about an edge of
    # the circle's sectors. On a CPU a comparison or a choice per pixel takes several times as long as arithmetic.
    red, green, blue = images.unbind(1)
    larger, smaller = torch.maximum(green, blue), torch.minimum(green, blue)
    is_blue, is_not_red = above_zero(blue - green), above_zero(larger - red)
    edge = is_blue.mul(2).sub_(1 / 3).mul_(is_not_red).sub_(is_blue)
    highest, middle = torch.maximum(red, larger), torch.minimum(red, larger)
    lowest = torch.minimum(middle, smaller)
    chroma = highest - lowest
    turn = middle.sub_(smaller).div_(chroma.mul(6).clamp_(min=1e-12)).add_(edge).abs_()
    turn.add_(shift[:, None, None] + 1).frac_().mul_(6)
    share = torch.empty_like(images)
    for channel, centre in enumerate((3, 2, 4)):
        torch.sub(turn, centre, out=share[:, channel])
    share.abs_().sub_(1).clamp_(0, 1)
    torch.addcmul(lowest, share[:, 0], chroma, out=images[:, 0])
    torch.addcmul(highest[:, None], share[:, 1:], chroma[:, None], value=-1, out=images[:, 1:])


def above_zero(differences: Tensor) -> Tensor:
    """1 where they are, else 0, in place; differences of pixels are 0 or far above 1e-30."""
    return differences.mul_(1e30).clamp_(0, 1)


def linear_color_jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """All steps of `color_jitter` as one matrix, see `moco.data.augment.linear_colors`."""
    matrices = jitter_matrices(factors, order, images.mean((2, 3)))
    pixels = torch.baddbmm(matrices[..., 3:], matrices[..., :3], images.flatten(2))
    return pixels.clamp_(0, 1).view_as(images)


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
