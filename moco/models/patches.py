"""How images of any size are cut into patches."""

import torch.nn.functional as F
from torch import Tensor

from moco.errors import InputError


def num_patches(side: int, patch_size: int, partial_patches: str) -> int:
    """Return how many patches a side of an image has.

    Args:
        side: px.
        patch_size: px.
        partial_patches: whether an incomplete last patch counts (``complete``) or not (``drop``).
    """
    if partial_patches == "drop":
        return side // patch_size
    return -(-side // patch_size)


def with_whole_patches(images: Tensor, patch_size: int, partial_patches: str) -> Tensor:
    """Return images (N, 3, H, W) that are completed with zeros, or cut off, to whole patches.

    Raises:
        InputError: partial patches are dropped, and there is no whole one.
    """
    height, width = images.shape[-2:]
    whole_height = num_patches(height, patch_size, partial_patches) * patch_size
    whole_width = num_patches(width, patch_size, partial_patches) * patch_size
    if whole_height == 0 or whole_width == 0:
        raise InputError(
            f"backbone.partial_patches=drop: an image of {height} x {width} px has no whole "
            f"patch of {patch_size} px"
        )
    # Negative padding cuts off.
    return F.pad(images, (0, whole_width - width, 0, whole_height - height))
