"""ViT (arXiv 2010.11929) as in MoCo v3 (arXiv 2104.02057), under the backbone contract, for images of any size.

torchvision's blocks under its parameter names. What it lacks is here: fixed positions, stochastic depth, feature maps and
images of any size.

Letters: N batch, D feature width, H W pixels, h w cells (one for each patch), P = 1 + h w tokens, of which the class token
is the first.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import vision_transformer
from torchvision.ops import StochasticDepth

from moco.errors import InputError
from moco.models.size_constants import Size, constant_of_sizes

WAVE_BASE = 10_000  # the longest wave of the fixed positions is 2 pi times as many cells


class Block(vision_transformer.EncoderBlock):
    """Attention and an MLP four times as wide, each normalised before; torchvision's has no stochastic depth."""

    def __init__(self, num_heads: int, embed_dim: int, stochastic_depth: float) -> None:
        super().__init__(num_heads, embed_dim, 4 * embed_dim, dropout=0.0, attention_dropout=0.0)
        self.stochastic_depth = StochasticDepth(stochastic_depth, "row")

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.ln_1(tokens)
        x, _ = self.self_attention(x, x, x, need_weights=False)
        tokens = tokens + self.stochastic_depth(x)
        return tokens + self.stochastic_depth(self.mlp(self.ln_2(tokens)))


class VisionTransformer(nn.Module):
    """ViT without its classifier; the feature is the class token after the last norm.

    Parameter names are torchvision's. Fixed positions are no part of the weights: they follow from the grid.

    Args:
        patch_size: side of a patch, px.
        embed_dim: D.
        depth: blocks, a multiple of 4.
        num_heads: attention heads. MoCo v3's ViT-S has 12, those of DeiT and timm have 6; the weights' shapes do not tell.
        learned_positions: side of the square grid of learned positions, cells, for weights that were trained with such;
            they are resized bicubically to the grid at hand. None: fixed ones, see `sine_cosine_positions`.
        stochastic_depth: chance of a sample to skip a block's branch in training, at the last block; rises linearly from
            0 at the first.
        gradient_checkpointing: keep only the blocks' inputs for the backward pass and compute the rest again.
        freeze_patch_embed: keep the random patch projection untrained, for stability (arXiv 2104.02057, section 4.2).
        partial_patches: ``complete`` fills the last row and column of patches up with zeros, ``drop`` leaves them out.

    Raises:
        InputError: the heads do not divide the width.
    """

    def __init__(
        self,
        patch_size: int,
        embed_dim: int,
        depth: int,
        *,
        num_heads: int,
        learned_positions: int | None = None,
        stochastic_depth: float = 0.0,
        gradient_checkpointing: bool = False,
        freeze_patch_embed: bool = False,
        partial_patches: str = "complete",
    ) -> None:
        super().__init__()
        assert depth % 4 == 0, depth  # four maps
        if embed_dim % num_heads:
            raise InputError(
                f"backbone.num_heads={num_heads}: expected a divisor of the width, {embed_dim}"
            )
        self.patch_size = patch_size
        self.num_heads = num_heads
        self.learned_positions = learned_positions
        self.gradient_checkpointing = gradient_checkpointing
        self.partial_patches = partial_patches
        self.feature_dim = embed_dim
        self.feature_map_dims = (embed_dim,) * 4
        self.feature_map_strides = (patch_size,) * 4
        self.conv_proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        blocks = {
            f"encoder_layer_{number}": Block(
                num_heads, embed_dim, stochastic_depth * number / (depth - 1)
            )
            for number in range(depth)
        }
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleDict(blocks), "ln": nn.LayerNorm(embed_dim, eps=1e-6)}
        )
        if learned_positions:
            self.encoder.pos_embedding = nn.Parameter(
                torch.empty(1, 1 + learned_positions**2, embed_dim)
            )
        self._initialise()
        self.conv_proj.requires_grad_(not freeze_patch_embed)

    def _initialise(self) -> None:
        """As the official MoCo v3 code: xavier-uniform weights, biases of zero.

        The projections to queries, keys and values are one tensor and count as three matrices, a patch as one long vector.
        Learned positions, which MoCo v3 does not have, start as torchvision's.
        """
        for block in self.blocks():
            for matrix in block.self_attention.in_proj_weight.detach().chunk(3):
                nn.init.xavier_uniform_(matrix)
            for linear in (block.self_attention.out_proj, block.mlp[0], block.mlp[3]):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)
        nn.init.xavier_uniform_(self.conv_proj.weight.detach().flatten(1))
        assert self.conv_proj.bias is not None
        nn.init.zeros_(self.conv_proj.bias)
        nn.init.normal_(self.class_token, std=1e-6)
        if self.learned_positions:
            nn.init.normal_(self.encoder.pos_embedding, std=0.02)  # type: ignore[arg-type]

    def blocks(self) -> Iterator[Any]:
        """The blocks, the first one first."""
        return self.encoder["layers"].children()

    def cells(self, side: int) -> int:
        """How many cells an image's side of so many px has."""
        return (
            side // self.patch_size
            if self.partial_patches == "drop"
            else -(-side // self.patch_size)
        )

    def positions(self, grid: Size, device: torch.device | None = None) -> Tensor:
        """The tokens' positions (1, P, D) on a grid of h x w cells."""
        if self.learned_positions:
            return resized_positions(self.encoder.pos_embedding, grid)  # type: ignore[arg-type]
        return sine_cosine_positions(grid, self.feature_dim, device or torch.device("cpu"))

    def feature_and_maps(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`forward` and `feature_maps` in one pass."""
        x = self.conv_proj(self._whole_patches(images))  # (N, D, h, w)
        grid = (x.shape[2], x.shape[3])
        tokens = torch.cat(
            [self.class_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1
        )
        tokens = tokens + self.positions(grid, x.device)  # (N, P, D)
        blocks = list(self.blocks())
        outputs = []
        for number, block in enumerate(blocks, start=1):
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
            if number % (len(blocks) // 4) == 0:
                outputs.append(tokens)
        outputs[-1] = self.encoder["ln"](tokens)
        return outputs[-1][:, 0], [
            output[:, 1:].transpose(1, 2).unflatten(2, grid) for output in outputs
        ]

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """The patches' tokens after each quarter of the blocks, the last ones normalised: four maps (N, D, h, w).

        Args:
            images: (N, 3, H, W), of any height and width.

        Raises:
            InputError: partial patches are dropped, and there is no whole one.
        """
        return self.feature_and_maps(images)[1]

    def forward(self, images: Tensor) -> Tensor:
        """The class token after the last norm: (N, D)."""
        return self.feature_and_maps(images)[0]

    def _whole_patches(self, images: Tensor) -> Tensor:
        height, width = (self.cells(side) * self.patch_size for side in images.shape[-2:])
        if not height or not width:
            raise InputError(
                f"backbone.partial_patches=drop: an image of {images.shape[-2]} x {images.shape[-1]} px has no whole "
                f"patch of {self.patch_size} px"
            )
        # Negative padding cuts off.
        return F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))


@constant_of_sizes
def sine_cosine_positions(grid: Size, dim: int, device: torch.device) -> Tensor:
    """MoCo v3's fixed positions in two dimensions: (1, P, dim) float32, without gradient; zero for the class token.

    The first half of the channels holds the cell's row, the second its column: of each, the sines of row * omega_i, then the
    cosines, with omega_i = 10000^(-4 i / dim) for i from 0 to dim / 4 - 1. A larger image has more cells, each as far from
    the next as before. (The paper names the encoding; the channels' order is that of the official code's square grids, so
    that its weights keep their meaning.)
    """
    omega = WAVE_BASE ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    halves = []
    for axis in torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij"):
        angles = axis.flatten()[:, None] * omega  # (h w, dim / 4)
        halves += [angles.sin(), angles.cos()]
    of_cells = torch.cat(halves, dim=1)
    return torch.cat([torch.zeros(1, dim), of_cells.float()])[None].to(device)


def resized_positions(positions: Tensor, grid: Size) -> Tensor:
    """Learned positions (1, 1 + side^2, D) for a grid of h x w cells: (1, P, D), bicubically; the class token's stays."""
    side = grid_side(positions)
    if grid == (side, side):
        return positions
    of_cells = positions[:, 1:].transpose(1, 2).unflatten(2, (side, side))
    of_cells = F.interpolate(
        of_cells, size=grid, mode="bicubic", align_corners=False, antialias=True
    )
    return torch.cat([positions[:, :1], of_cells.flatten(2).transpose(1, 2)], dim=1)


def grid_side(positions: Tensor) -> int:
    """Side of the square grid, cells, of saved positions (1, 1 + side^2, D), the class token's first.

    Raises:
        InputError: they are not such.
    """
    count = positions.shape[1] if positions.ndim == 3 and len(positions) == 1 else 0
    side = math.isqrt(max(count - 1, 0))
    if not side or side**2 != count - 1:
        raise InputError(
            f"the weights' positions are of shape {tuple(positions.shape)}; expected one for the class token and those of "
            "a square grid of patches"
        )
    return side


def learned_grid_side(positions: Tensor) -> int | None:
    """`grid_side` of saved positions if they are learned ones; None if they are the fixed ones of `sine_cosine_positions`.

    Raises:
        InputError: as `grid_side`.
    """
    side = grid_side(positions)
    fixed = sine_cosine_positions((side, side), positions.shape[2], torch.device("cpu"))
    # Others compute them in float32: 1e-5 off in the far corner of a large grid.
    return None if torch.allclose(positions.float().cpu(), fixed, rtol=0, atol=1e-4) else side
