"""Swin and Swin V2 under the backbone contract, for images of any size.

The network is torchvision's, with its parameter names and with attention of our own, see
`moco.models.swin.attention`. What Swin V2 changes are three switches.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchvision.models import swin_transformer

from moco.errors import InputError, unknown_name
from moco.models.contract import PatchBackbone
from moco.models.swin.attention import WindowAttention

SWITCHES = {
    "norm": ("pre", "res_post"),
    "attention": ("dot", "cosine"),
    "position_bias": ("table", "linear_cpb", "log_cpb"),
}
"""What Swin V2 changes, and the choices of each change. The first ones are Swin V1."""
MAX_WINDOW_SIZE = 64
"""Cells of a side. The scores of one window of 4,096 cells and one head take 64 MiB."""


class Swin(PatchBackbone, swin_transformer.SwinTransformer):
    """Swin, Swin V2 or a network between them, without its classifier.

    Names and initial values of the parameters are torchvision's. Swin V1 is norm ``pre``, attention
    ``dot`` and position bias ``table``; Swin V2 is ``res_post``, ``cosine`` and ``log_cpb``. The
    paper of V2 compares combinations of these (arXiv 2111.09883); here every one can be built.

    Args:
        embed_dim: channels of the first stage. The stages double them.
        depths: blocks in each of the four stages.
        num_heads: attention heads in each stage.
        norm: ``pre`` normalises what enters the attention and the MLP of a block. ``res_post``
            normalises what they add to the block's input, with scales that start at zero, so that
            new blocks are the identity. Patch merging normalises before or after its projection.
            Source: section 3.2 and the official code.
        attention: scores of ``dot`` products or scaled ``cosine``, see `WindowAttention`.
        position_bias: a ``table``, or an MLP of linear (``linear_cpb``) or log-spaced
            (``log_cpb``) coordinates, see `WindowAttention`.
        patch_size: side of a patch, px; a patch is a cell of the first stage.
        window_size: side of the attention windows, cells: one number, or one for each stage.
        pretrained_window_size: the windows with which the weights were, or will be, pretrained.
            They normalise the coordinates of ``linear_cpb`` and ``log_cpb``, and stay when the
            window is changed later. None: `window_size`.
        pretrained_image_size: side of the pretraining images, px. The windows that normalise the
            coordinates are then clipped to the maps of such images, as in Microsoft's code and
            timm, see `clipped_windows`. None: they are not clipped.
        stochastic_depth: chance that an image skips a branch of the last block in training (the
            papers' drop path). It rises linearly from 0 at the first block.
        gradient_checkpointing, partial_patches: see `PatchBackbone`. torchvision drops partial
            patches.
        freeze_patch_embed: do not train the random patch projection, for stability
            (arXiv 2104.02057, section 4.2).
        in_channels: bands of the images.

    Raises:
        InputError: a switch has no such choice, a window is no whole number from 1 to
            `MAX_WINDOW_SIZE`, or there is a pretraining window or image size for a table.
    """

    switches: dict[str, str]
    """``norm``, ``attention`` and ``position_bias``."""

    no_weight_decay_keywords = ("cpb_mlp", "logit_scale", "relative_position_bias_table")

    def __init__(
        self,
        embed_dim: int,
        depths: tuple[int, int, int, int],
        num_heads: tuple[int, int, int, int],
        *,
        norm: str = "res_post",
        attention: str = "cosine",
        position_bias: str = "log_cpb",
        patch_size: int = 4,
        window_size: int | Sequence[int] = 7,
        pretrained_window_size: int | Sequence[int] | None = None,
        pretrained_image_size: int | None = None,
        stochastic_depth: float = 0.0,
        gradient_checkpointing: bool = False,
        freeze_patch_embed: bool = False,
        partial_patches: str = "complete",
        in_channels: int = 3,
    ) -> None:
        switches = {"norm": norm, "attention": attention, "position_bias": position_bias}
        for key, value in switches.items():
            if value not in SWITCHES[key]:
                kind = key.replace("_", " ")
                raise InputError(f"backbone.{key}: {unknown_name(kind, value, SWITCHES[key])}")
        windows = windows_of("window_size", window_size)
        pretraining = {
            "pretrained_window_size": pretrained_window_size,
            "pretrained_image_size": pretrained_image_size,
        }
        for key, given in pretraining.items():
            if position_bias == "table" and given is not None:
                raise InputError(
                    f"backbone.{key}={given}: position_bias=table has no coordinates to "
                    "normalise; remove it, or set backbone.position_bias=log_cpb"
                )
        if norm == "pre":
            block = swin_transformer.SwinTransformerBlock
            merging = swin_transformer.PatchMerging
        else:
            block = swin_transformer.SwinTransformerBlockV2
            merging = swin_transformer.PatchMergingV2
        attention_layer = partial(WindowAttention, attention=attention, position_bias=position_bias)
        super().__init__(
            patch_size=[patch_size, patch_size],
            embed_dim=embed_dim,
            depths=list(depths),
            num_heads=list(num_heads),
            window_size=[windows[0], windows[0]],
            stochastic_depth_prob=stochastic_depth,
            block=partial(block, attn_layer=attention_layer),
            downsample_layer=merging,
        )
        del self.head
        if in_channels != 3:
            self.features[0][0] = nn.Conv2d(
                in_channels, embed_dim, kernel_size=patch_size, stride=patch_size
            )
        self.switches = switches
        self.patch_size = patch_size
        self.gradient_checkpointing = gradient_checkpointing
        self.partial_patches = partial_patches
        self.feature_map_dims = (embed_dim, 2 * embed_dim, 4 * embed_dim, 8 * embed_dim)
        self.feature_map_strides = (patch_size, 2 * patch_size, 4 * patch_size, 8 * patch_size)
        self.feature_dim = self.feature_map_dims[-1]
        pretrained = windows
        if pretrained_window_size is not None:
            pretrained = windows_of("pretrained_window_size", pretrained_window_size)
        if pretrained_image_size is not None:
            pretrained = clipped_windows(pretrained_image_size, pretrained, patch_size)
        self.pretrained_window_size = tuple(pretrained)
        for window, blocks in zip(pretrained, self.stages(), strict=True):
            for number, block in enumerate(blocks):
                block.attn.shifted = number % 2 == 1
                block.attn.pretrained_window_size = (window, window)
                if norm == "res_post":
                    # Blocks start as the identity, as in the official code.
                    nn.init.zeros_(block.norm1.weight)
                    nn.init.zeros_(block.norm2.weight)
        self.set_windows(windows)
        self.features[0][0].requires_grad_(not freeze_patch_embed)

    def stages(self) -> Iterator[Any]:
        """Yield the four stages' blocks."""
        for place in (1, 3, 5, 7):
            yield self.features[place]

    def set_windows(self, windows: Sequence[int]) -> None:
        """Attend in windows of other sizes, one for each stage, cells."""
        self.window_size = tuple(windows)
        for window, blocks in zip(windows, self.stages(), strict=True):
            for block in blocks:
                block.attn.set_window((window, window))

    def feature_and_maps(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the last map averaged over its cells, and the four stages' outputs.

        The last map is normalised. If patch merging finds an odd side, zeros complete it.
        """
        x = self.features[0](self.with_whole_patches(images))  # (N, H, W, C)
        maps = []
        for stage, blocks in enumerate(self.stages()):
            if stage > 0:
                x = self.features[2 * stage](x)  # patch merging
            for block in blocks:
                x = self.run_block(block, x)
            output = x
            if stage == 3:
                output = self.norm(x)
            maps.append(output.permute(0, 3, 1, 2))
        return maps[-1].mean(dim=(2, 3)), maps


def windows_of(name: str, value: Any) -> tuple[int, ...]:
    """Return the windows of the four stages, for one window or a list of four.

    Args:
        name: of the setting, for the message.
        value: the setting, cells.

    Raises:
        InputError: a window is no whole number from 1 to `MAX_WINDOW_SIZE`.
    """
    windows = [value] * 4
    if isinstance(value, list | tuple):
        windows = list(value)
    is_valid = len(windows) == 4
    for window in windows:
        # True is an int, too, for `isinstance`.
        is_valid = is_valid and type(window) is int and 1 <= window <= MAX_WINDOW_SIZE
    if not is_valid:
        raise InputError(
            f"backbone.{name}={value}: expected a whole number of cells from 1 to "
            f"{MAX_WINDOW_SIZE}, or a list of four, one for each stage"
        )
    return tuple(windows)


def map_sides(image_size: int, patch_size: int = 4) -> list[int]:
    """Return the sides of the four stages' maps, cells, for square images.

    An incomplete patch counts, and so does an odd row in patch merging.

    Args:
        image_size: side of the images, px.
        patch_size: px.
    """
    return [-(-image_size // (patch_size * factor)) for factor in (1, 2, 4, 8)]


def one_or_each(windows: Sequence[int]) -> int | list[int]:
    """Return windows as one number if they are all the same, else as a list."""
    if len(set(windows)) == 1:
        return windows[0]
    return list(windows)


def clipped_windows(
    image_size: int, window_size: int | Sequence[int], patch_size: int = 4
) -> tuple[int, ...]:
    """Return the windows of the four stages, each no larger than the stage's map.

    Microsoft's code and timm clip a window to its map before they normalise Swin V2's
    coordinates by it. For weights that were pretrained there, the result is
    `pretrained_window_size`: (16, 16, 16, 8) of swinv2_tiny_window16_256, and (12, 12, 12, 6) of
    swinv2_base_window12to16_192to256, whose windows were 12 at 192 px.

    Args:
        image_size: side of the pretraining images, px.
        window_size: of the pretraining, cells: one number, or one for each stage.
        patch_size: px.

    Raises:
        InputError: a window is no whole number from 1 to `MAX_WINDOW_SIZE`.
    """
    windows = windows_of("window_size", window_size)
    return tuple(map(min, windows, map_sides(image_size, patch_size)))
