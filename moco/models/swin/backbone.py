"""Swin (arXiv 2103.14030) and Swin V2 (arXiv 2111.09883) under the backbone contract, for images of any size.

torchvision's model with its parameter names, and attention of our own: see `moco.models.swin.attention`.

Letters: N batch, C channels, H W pixels or cells.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import swin_transformer

from moco.errors import InputError
from moco.models.swin.attention import WindowAttention, WindowAttentionV2
from moco.models.swin.windows import Size

MAX_WINDOW_SIZE = 64  # 4,096 cells: the scores of one window and head are 64 MiB


class Block(swin_transformer.SwinTransformerBlock):
    """Attention and MLP, each normalised before (res-pre-norm)."""

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:
        x = x + self.stochastic_depth(self.attn(self.norm1(x), size))
        return x + self.stochastic_depth(self.mlp(self.norm2(x)))


class BlockV2(swin_transformer.SwinTransformerBlockV2):
    """Attention and MLP, each normalised afterwards (res-post-norm), with scales that start at zero.

    arXiv 2111.09883, section 3.2; the start is that of the official code: a new block is the identity.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        nn.init.zeros_(self.norm1.weight)
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:
        x = x + self.stochastic_depth(self.norm1(self.attn(x, size)))
        return x + self.stochastic_depth(self.norm2(self.mlp(x)))


class Swin(swin_transformer.SwinTransformer):
    """Swin or Swin V2 without its classifier; parameter names are torchvision's.

    Args:
        version: 1 or 2.
        embed_dim: channels of the first stage; the stages double them.
        depths: blocks in each of the four stages.
        num_heads: attention heads in each stage.
        patch_size: side of a patch, px; a cell of the first stage.
        window_size: side of the attention windows, cells; one number, or one for each stage.
        pretrained_window_size: the windows with which the weights were, or will be, pretrained; they normalise the
            coordinates of V2's position bias. None: `window_size`. It stays when the window is changed afterwards.
        pretrained_image_size: side of the pretraining images, px. The windows that normalise V2's
            coordinates are then clipped to the maps of such images, as in Microsoft's code and timm,
            see `clipped_windows`. None: they are as given.
        stochastic_depth: chance of a sample to skip a block's branch in training, at the last block; rises linearly from
            0 at the first (the papers' drop path).
        gradient_checkpointing: keep only the blocks' inputs for the backward pass and compute the rest again.
        freeze_patch_embed: keep the random patch projection untrained, for stability (arXiv 2104.02057, section 4.2).
        partial_patches: ``complete`` fills the last row and column of patches up with zeros, ``drop`` leaves them out, as
            torchvision does.

    Raises:
        InputError: a window is no whole number from 1 to `MAX_WINDOW_SIZE`, or V1 is given a
            pretraining window or image size.
    """

    no_weight_decay_keywords = ("cpb_mlp", "logit_scale", "relative_position_bias_table")

    def __init__(
        self,
        version: int,
        embed_dim: int,
        depths: tuple[int, int, int, int],
        num_heads: tuple[int, int, int, int],
        *,
        patch_size: int = 4,
        window_size: int | Sequence[int] = 7,
        pretrained_window_size: int | Sequence[int] | None = None,
        pretrained_image_size: int | None = None,
        stochastic_depth: float = 0.0,
        gradient_checkpointing: bool = False,
        freeze_patch_embed: bool = False,
        partial_patches: str = "complete",
    ) -> None:
        windows = windows_of("window_size", window_size)
        for key, value in (
            ("pretrained_window_size", pretrained_window_size),
            ("pretrained_image_size", pretrained_image_size),
        ):
            if version == 1 and value is not None:
                raise InputError(
                    f"backbone.{key}: Swin V1 has no coordinates to normalise; leave it out or take Swin V2"
                )
        block, attention, merging = (
            (Block, WindowAttention, swin_transformer.PatchMerging)
            if version == 1
            else (BlockV2, WindowAttentionV2, swin_transformer.PatchMergingV2)
        )
        super().__init__(
            patch_size=[patch_size, patch_size],
            embed_dim=embed_dim,
            depths=list(depths),
            num_heads=list(num_heads),
            window_size=[windows[0], windows[0]],
            stochastic_depth_prob=stochastic_depth,
            block=partial(block, attn_layer=attention),
            downsample_layer=merging,
        )
        del self.head
        self.version = version
        self.patch_size = patch_size
        self.gradient_checkpointing = gradient_checkpointing
        self.partial_patches = partial_patches
        self.feature_map_dims = tuple(embed_dim * 2**stage for stage in range(4))
        self.feature_map_strides = tuple(patch_size * 2**stage for stage in range(4))
        self.feature_dim = self.feature_map_dims[-1]
        pretrained = windows
        if pretrained_window_size is not None:
            pretrained = windows_of("pretrained_window_size", pretrained_window_size)
        if pretrained_image_size is not None:
            pretrained = clipped_windows(pretrained_image_size, pretrained, patch_size)
        self._set_windows(windows, pretrained)
        self.features[0][0].requires_grad_(not freeze_patch_embed)

    def stages(self) -> Iterator[Any]:
        """The four stages' blocks."""
        return (self.features[place] for place in (1, 3, 5, 7))

    def _set_windows(self, windows: Sequence[int], pretrained: Sequence[int] | None = None) -> None:
        self.window_size = tuple(windows)
        if pretrained is not None:
            self.pretrained_window_size = tuple(pretrained)
        for stage, blocks in enumerate(self.stages()):
            for place, block in enumerate(blocks):
                block.attn.shifted = place % 2 == 1
                block.attn.set_window((windows[stage], windows[stage]))
                if pretrained is not None:
                    block.attn.pretrained_window_size = (pretrained[stage], pretrained[stage])

    def feature_maps(self, images: Tensor, size: Size | None = None) -> list[Tensor]:
        """The four stages' outputs, the last one normalised: (N, C_i, ceil(H / stride_i), ceil(W / stride_i)).

        Where patch merging finds an odd side, a row of zeros completes it.

        Args:
            images: (N, 3, H, W), of any height and width.
            size: (height, width) of the images, px, at the top left of the canvas (H, W); what lies beyond does not
                matter. None: the images fill it.

        Raises:
            ValueError: `size` is larger than the canvas.
            InputError: partial patches are dropped, and there is no whole one.
        """
        height, width = size or images.shape[-2:]
        if height > images.shape[-2] or width > images.shape[-1]:
            raise ValueError(
                f"size={size}: larger than the canvas of {images.shape[-2]} x {images.shape[-1]} px"
            )
        canvas = [-(-side // self.patch_size) * self.patch_size for side in images.shape[-2:]]
        if self.partial_patches == "drop":
            height, width = (side // self.patch_size * self.patch_size for side in (height, width))
            canvas = [side // self.patch_size * self.patch_size for side in images.shape[-2:]]
            if not height or not width:
                raise InputError(
                    f"backbone.partial_patches=drop: an image of {images.shape[-2]} x {images.shape[-1]} px has no whole "
                    f"patch of {self.patch_size} px"
                )
        images = images[..., :height, :width]
        x = self.features[0](
            F.pad(images, (0, canvas[1] - width, 0, canvas[0] - height))
        )  # (N, H, W, C)
        cells = (-(-height // self.patch_size), -(-width // self.patch_size))
        maps = []
        for stage, blocks in enumerate(self.stages()):
            if stage:
                x = self.features[2 * stage](with_zeros_beyond(x, cells))
                cells = (-(-cells[0] // 2), -(-cells[1] // 2))
            for block in blocks:
                if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                    x = checkpoint(block, x, cells, use_reentrant=False)
                else:
                    x = block(x, cells)
            y = x[:, : cells[0], : cells[1]]
            maps.append((self.norm(y) if stage == 3 else y).permute(0, 3, 1, 2))
        return maps

    def feature_and_maps(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`forward` and `feature_maps` in one pass."""
        maps = self.feature_maps(images)
        return maps[-1].mean(dim=(2, 3)), maps

    def forward(self, images: Tensor) -> Tensor:
        """The last map averaged over its cells: (N, D)."""
        return self.feature_and_maps(images)[0]


def with_zeros_beyond(x: Tensor, size: Size) -> Tensor:
    """A map (N, H, W, C) with zeros outside the top left `size` cells."""
    height, width = x.shape[1:3]
    if (height, width) == size:
        return x
    return F.pad(x[:, : size[0], : size[1]], (0, 0, 0, width - size[1], 0, height - size[0]))


def windows_of(name: str, value: Any) -> tuple[int, ...]:
    """One window or four as four.

    Raises:
        InputError: for anything but whole numbers from 1 to `MAX_WINDOW_SIZE`.
    """
    windows = list(value) if isinstance(value, (list, tuple)) else [value] * 4
    if len(windows) != 4 or not all(
        isinstance(side, int) and not isinstance(side, bool) and 1 <= side <= MAX_WINDOW_SIZE
        for side in windows
    ):
        raise InputError(
            f"backbone.{name}={value}: expected a whole number of cells from 1 to {MAX_WINDOW_SIZE}, or a list of four, "
            "one for each stage"
        )
    return tuple(windows)


def map_sides(image_size: int, patch_size: int = 4) -> list[int]:
    """Return the sides of the four stages' maps, cells, for square images of `image_size` px.

    An incomplete patch counts, and so does an odd row that patch merging finds.
    """
    sides = [-(-image_size // patch_size)]
    for _ in range(3):
        sides.append(-(-sides[-1] // 2))
    return sides


def clipped_windows(
    image_size: int, window_size: int | Sequence[int], patch_size: int = 4
) -> tuple[int, ...]:
    """Return the windows of the four stages, each no larger than the stage's map.

    Microsoft's code and timm clip a window to its map before they normalise Swin V2's log
    coordinates by it. For weights that were pretrained there, the result is
    `pretrained_window_size`: (16, 16, 16, 8) of swinv2_tiny_window16_256, and (12, 12, 12, 6) of
    swinv2_base_window12to16_192to256, whose windows were 12 at 192 px.

    Args:
        image_size: side of the pretraining images, px.
        window_size: of the pretraining, cells; one number, or one for each stage.
        patch_size: px.

    Raises:
        InputError: a window is no whole number from 1 to `MAX_WINDOW_SIZE`.
    """
    windows = windows_of("window_size", window_size)
    clipped = []
    for window, side in zip(windows, map_sides(image_size, patch_size), strict=True):
        clipped.append(min(window, side))
    return tuple(clipped)


def rewindow(backbone: nn.Module, window_size: int | Sequence[int]) -> nn.Module:
    """Let a Swin attend in windows of another size, in place; returns it.

    Swin V2 keeps its position MLP and the pretraining normaliser: the biases of all offsets that both windows have are the
    same. Swin V1's tables are resized bicubically.

    Raises:
        InputError: the backbone has no windows, or the window is not one.
    """
    if not isinstance(backbone, Swin):
        raise InputError(
            f"backbone.window_size={window_size}: this backbone has no attention windows"
        )
    backbone._set_windows(windows_of("window_size", window_size))
    return backbone


@dataclass(frozen=True)
class WindowSuggestion:
    """A window for images of another size, and what it does to the maps."""

    window_size: int
    image_size: int
    maps: tuple[int, ...]
    """Side of the four stages' maps, cells."""
    padded: tuple[int, ...]
    """The same, filled up to whole windows."""
    padding: float
    """Cells of padding per real cell, over all stages."""

    def __str__(self) -> str:
        changes = ", ".join(
            str(side) if side == filled else f"{side} to {filled}"
            for side, filled in zip(self.maps, self.padded, strict=True)
        )
        return (
            f"window {self.window_size} for {self.image_size} px: the four maps are padded {changes} "
            f"({self.padding:.1%} more cells)"
        )


def suggest_window(
    image_size: int,
    pretrained_window_size: int,
    pretrained_image_size: int | None = None,
    patch_size: int = 4,
) -> WindowSuggestion:
    """The window that sees as much of the image as the pretraining window did, with the least padding nearby.

    Args:
        image_size: side of the new images, px.
        pretrained_window_size: side of the pretraining window, cells.
        pretrained_image_size: side of the pretraining images, px. None: the one whose last map is a single window, which is
            224 px for window 7 and 256 px for window 8.
        patch_size: px.
    """
    pretrained_image_size = pretrained_image_size or pretrained_window_size * patch_size * 8
    same_view = pretrained_window_size * image_size / pretrained_image_size
    candidates = range(
        max(1, math.floor(same_view * 0.9)), min(MAX_WINDOW_SIZE, math.ceil(same_view * 1.1)) + 1
    )
    suggestions = [
        _padding(window, image_size, patch_size) for window in candidates or [MAX_WINDOW_SIZE]
    ]
    return min(suggestions, key=lambda it: (round(it.padding, 9), abs(it.window_size - same_view)))


def window_advice(backbone: nn.Module, image_size: int, pretrained_image_size: int) -> str | None:
    """A sentence on the window for images of another size than in pretraining; None where there is nothing to say."""
    if not isinstance(backbone, Swin) or image_size == pretrained_image_size:
        return None
    window = backbone.window_size[0]
    suggestion = suggest_window(image_size, window, pretrained_image_size, backbone.patch_size)
    if suggestion.window_size == window:
        return None
    return (
        f"pretrained on {pretrained_image_size} px with window {window}; {suggestion}: "
        f"backbone.window_size={suggestion.window_size}"
    )


def _padding(window: int, image_size: int, patch_size: int) -> WindowSuggestion:
    maps = map_sides(image_size, patch_size)
    padded = [-(-side // min(window, side)) * min(window, side) for side in maps]
    cells = sum(side**2 for side in maps)
    padding = sum(side**2 for side in padded) / cells - 1
    return WindowSuggestion(window, image_size, tuple(maps), tuple(padded), padding)
