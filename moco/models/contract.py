"""The contract that all backbones keep, and what those that cut images into patches share.

A backbone of the user's own needs `feature_dim` and `forward`. Dense methods, dense evaluation and
segmentation also need `feature_maps`, `feature_map_dims` and `feature_map_strides`.

A backbone turns images (N, B, H, W) of B bands into one feature (N, D), and into four feature maps
for dense tasks. It has no classifier. ResNet and Swin double the stride from map to map, and the
feature is the mean over the last map. ViT has one stride, the side of its patch, and the feature is
its class token.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moco.errors import InputError


class Backbone(ABC):
    """A part of every backbone, beside nn.Module or torchvision's class.

    A subclass sets the attributes and has `feature_and_maps`.
    """

    feature_dim: int
    """D."""
    feature_map_dims: tuple[int, ...]
    """(C_1, ..., C_4), the channels of the feature maps."""
    feature_map_strides: tuple[int, ...]
    """Px of the image per cell of each map."""

    @abstractmethod
    def feature_and_maps(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return `forward` and `feature_maps` from one pass."""

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """Return four maps (N, C_i, ceil(H / stride_i), ceil(W / stride_i)), the finest first."""
        return self.feature_and_maps(images)[1]

    def forward(self, images: Tensor) -> Tensor:
        """Return the feature (N, D)."""
        return self.feature_and_maps(images)[0]


class PatchBackbone(Backbone):
    """A transformer on the patches of images of any height and width."""

    patch_size: int
    """Side of a patch, px."""
    partial_patches: str
    """``complete`` fills the last row and column of patches up with zeros. ``drop`` leaves them
    out."""
    gradient_checkpointing: bool
    """Keep only the blocks' inputs for the backward pass, and compute the rest again."""
    training: bool

    def cells(self, side: int) -> int:
        """Return how many patches an image's side, px, has."""
        if self.partial_patches == "drop":
            return side // self.patch_size
        return -(-side // self.patch_size)

    def with_whole_patches(self, images: Tensor) -> Tensor:
        """Return images (N, B, H, W) that are completed with zeros, or cut off, to whole patches.

        Raises:
            InputError: partial patches are dropped, and there is no whole one.
        """
        height, width = images.shape[-2:]
        whole_height = self.cells(height) * self.patch_size
        whole_width = self.cells(width) * self.patch_size
        if whole_height == 0 or whole_width == 0:
            raise InputError(
                f"backbone.partial_patches=drop: an image of {height} x {width} px has no whole "
                f"patch of {self.patch_size} px"
            )
        # At the right and the bottom, so that every cell stays over its pixels. Negative padding
        # cuts off.
        return F.pad(images, (0, whole_width - width, 0, whole_height - height))

    def run_block(self, block: nn.Module, x: Tensor) -> Tensor:
        """Return a block's output, with gradient checkpointing where there are gradients."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)


def check_contract(backbone: Any, name: str, image_size: int, in_channels: int = 3) -> nn.Module:
    """Return a backbone of the user's own after a pass of two black images through it.

    Args:
        backbone: what the user's function returned.
        name: of the function, for messages.
        image_size: side of the images, px.
        in_channels: bands of the images.

    Raises:
        InputError: it is no module, or it does not keep the contract.
    """
    if not isinstance(backbone, nn.Module):
        raise InputError(f"{name}: expected a torch.nn.Module, got {type(backbone).__name__}")
    width = getattr(backbone, "feature_dim", None)
    if not isinstance(width, int) or width < 1:
        raise InputError(
            f"{name}: the backbone's attribute feature_dim is {width}; "
            "expected the width of its feature"
        )
    first = next(backbone.parameters(), torch.empty(0))
    if first.is_meta:  # only an outline is built, which computes nothing
        return backbone
    net: Any = backbone
    shape = (2, in_channels, image_size, image_size)
    images = torch.zeros(shape, device=first.device, dtype=first.dtype)
    was_training = backbone.training
    try:
        with torch.no_grad():
            feature = net.eval()(images)
            maps = []
            if has_feature_maps(net):
                maps = net.feature_maps(images)
    except Exception as error:
        kind = type(error).__name__
        raise InputError(
            f"{name}: the backbone fails on two images of {image_size} px with {in_channels} bands "
            f"({kind}: {error})"
        ) from error
    finally:
        backbone.train(was_training)
    # A user's module may return anything, such as a tuple.
    result = tuple(getattr(feature, "shape", ()))
    if result != (2, width):
        raise InputError(
            f"{name}: the backbone gives {result or type(feature).__name__} for two images; "
            f"expected (2, feature_dim), which is (2, {width})"
        )
    for tensor in [feature, *maps]:
        if not tensor.isfinite().all():
            raise InputError(
                f"{name}: the backbone gives numbers that are not finite for black images"
            )
    dims = [tuple(feature_map.shape[:2]) for feature_map in maps]
    if maps and dims != [(2, dim) for dim in net.feature_map_dims]:
        raise InputError(
            f"{name}: the backbone's feature maps have (images, channels) {dims}; "
            f"expected 2 and feature_map_dims={list(net.feature_map_dims)}"
        )
    check_strides(maps, net, name, image_size)
    return backbone


def check_strides(maps: list[Tensor], backbone: Any, name: str, image_size: int) -> None:
    """Raise InputError if feature maps have far other sizes than their strides tell."""
    if not maps:
        return
    strides = list(backbone.feature_map_strides)
    sides = [tuple(feature_map.shape[2:]) for feature_map in maps]
    fitting = len(strides) == len(maps)
    for side, stride in zip(sides, strides, strict=False):
        expected = image_size / stride
        # Convolutions without padding lose some cells at each border.
        allowed = max(3, expected / 2)
        for length in side:
            fitting = fitting and abs(length - expected) <= allowed
    if not fitting:
        raise InputError(
            f"{name}: the backbone's feature maps of images of {image_size} px have (rows, "
            f"columns) {sides}, which do not fit feature_map_strides={strides}"
        )


def has_feature_maps(backbone: Any) -> bool:
    """Return whether a backbone has all that dense tasks need."""
    names = ("feature_maps", "feature_map_dims", "feature_map_strides")
    return all(hasattr(backbone, name) for name in names)


def check_feature_maps(backbone: Any, purpose: str) -> None:
    """Raise InputError if a backbone has no feature maps.

    Args:
        purpose: what needs them, such as a setting.
    """
    if not has_feature_maps(backbone):
        raise InputError(
            f"{purpose} needs feature maps, and {type(backbone).__name__} has none: it lacks "
            "feature_maps, feature_map_dims or feature_map_strides"
        )


def feature_and_maps(backbone: Any, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return feature and maps, from one pass if the backbone can."""
    if hasattr(backbone, "feature_and_maps"):
        return backbone.feature_and_maps(images)
    return backbone(images), backbone.feature_maps(images)
