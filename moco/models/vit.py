"""ViT as a backbone, for images of any size, with the fixed positions of MoCo v3.

The blocks are torchvision's, under its parameter names. Fixed positions, stochastic depth, feature
maps and images of any size are added here.

Shapes use N for the batch, D for the width, h and w for the cells of the grid of patches, and P for
the 1 + h * w tokens, of which the class token is the first.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import vision_transformer
from torchvision.ops import StochasticDepth

from moco.errors import InputError
from moco.models.contract import PatchBackbone
from moco.models.size_constants import Size, constant_of_sizes

WAVE_BASE = 10_000
"""The longest wave of the fixed positions is 2 pi times as many cells."""


class Block(vision_transformer.EncoderBlock):
    """torchvision's block (attention, and an MLP four times as wide) with stochastic depth."""

    def __init__(self, num_heads: int, embed_dim: int, stochastic_depth: float) -> None:
        super().__init__(num_heads, embed_dim, 4 * embed_dim, dropout=0.0, attention_dropout=0.0)
        self.stochastic_depth = StochasticDepth(stochastic_depth, "row")

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.ln_1(tokens)
        x, _ = self.self_attention(x, x, x, need_weights=False)
        tokens = tokens + self.stochastic_depth(x)
        return tokens + self.stochastic_depth(self.mlp(self.ln_2(tokens)))


class VisionTransformer(PatchBackbone, nn.Module):
    """ViT without its classifier; the feature is the class token after the last norm.

    Parameter names are torchvision's. Fixed positions are not among the weights, because they
    follow from the grid.

    Args:
        patch_size: side of a patch, px.
        embed_dim: D.
        depth: number of blocks, a multiple of 4.
        num_heads: attention heads. MoCo v3's ViT-S has 12, that of DeiT and timm has 6. The shapes
            of the weights do not tell.
        learned_positions: side of the square grid of learned positions, cells, for weights that
            were trained with such. They are resized bicubically to other grids. None: fixed
            positions, see `sine_cosine_positions`.
        stochastic_depth: chance that an image skips a branch of the last block in training. It
            rises linearly from 0 at the first block.
        gradient_checkpointing, partial_patches: see `PatchBackbone`.
        freeze_patch_embed: do not train the random patch projection, for stability
            (arXiv 2104.02057, section 4.2).
        in_channels: bands of the images.

    Raises:
        InputError: the width is no multiple of the heads.

    Source: arXiv 2010.11929, and MoCo v3, arXiv 2104.02057.
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
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        assert depth % 4 == 0, depth  # four feature maps
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
        self.conv_proj = nn.Conv2d(
            in_channels, embed_dim, kernel_size=patch_size, stride=patch_size
        )
        self.class_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        layers = nn.ModuleDict()
        for number in range(depth):
            skip_chance = stochastic_depth * number / (depth - 1)
            layers[f"encoder_layer_{number}"] = Block(num_heads, embed_dim, skip_chance)
        last_norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.encoder = nn.ModuleDict({"layers": layers, "ln": last_norm})
        if learned_positions:
            positions = torch.empty(1, 1 + learned_positions**2, embed_dim)
            self.encoder.pos_embedding = nn.Parameter(positions)
        self._initialise()
        self.conv_proj.requires_grad_(not freeze_patch_embed)

    def _initialise(self) -> None:
        """Initialise as the official MoCo v3 code: xavier-uniform weights, biases of zero.

        The projection to queries, keys and values is one tensor, and counts as three matrices. A
        patch counts as one long vector. Learned positions, which MoCo v3 does not have, start as
        torchvision's.
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
        """Return the blocks, from the first to the last."""
        return self.encoder["layers"].children()

    def positions(self, grid: Size, device: torch.device | None = None) -> Tensor:
        """Return the tokens' positions (1, P, D) on a grid of h x w cells."""
        if self.learned_positions:
            return resized_positions(self.encoder.pos_embedding, grid)  # type: ignore[arg-type]
        return sine_cosine_positions(grid, self.feature_dim, device or torch.device("cpu"))

    def feature_and_maps(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the class token after the last norm, and four maps (N, D, h, w).

        A map holds the patches' tokens after a quarter of the blocks. The last one is normalised.
        """
        patches = self.conv_proj(self.with_whole_patches(images))  # (N, D, h, w)
        grid = (patches.shape[2], patches.shape[3])
        class_tokens = self.class_token.expand(len(patches), -1, -1)
        tokens = torch.cat([class_tokens, patches.flatten(2).transpose(1, 2)], dim=1)
        tokens = tokens + self.positions(grid, patches.device)  # (N, P, D)
        blocks = list(self.blocks())
        outputs = []
        for number, block in enumerate(blocks, start=1):
            tokens = self.run_block(block, tokens)
            if number % (len(blocks) // 4) == 0:
                outputs.append(tokens)
        outputs[-1] = self.encoder["ln"](tokens)
        maps = []
        for output in outputs:
            maps.append(output[:, 1:].transpose(1, 2).unflatten(2, grid))
        return outputs[-1][:, 0], maps


@constant_of_sizes
def sine_cosine_positions(grid: Size, dim: int, device: torch.device) -> Tensor:
    """Return MoCo v3's fixed positions in two dimensions: (1, P, dim) float32, without gradient.

    The class token's is zero. The first half of the channels holds the cell's row, the second half
    its column. Each half has the sines of row * omega_i, then the cosines, with
    omega_i = 10000^(-4 i / dim) for i from 0 to dim / 4 - 1. A larger image has more cells at the
    same distances. The paper names the encoding; the order of the channels is that of the official
    code, so that its weights keep their meaning.
    """
    exponents = torch.arange(dim // 4, dtype=torch.float64) / (dim // 4)
    omega = WAVE_BASE**-exponents  # (dim / 4,)
    height, width = grid
    rows = torch.arange(height).repeat_interleave(width)  # (h * w,)
    columns = torch.arange(width).repeat(height)
    row_angles = rows[:, None] * omega  # (h * w, dim / 4)
    column_angles = columns[:, None] * omega
    parts = [row_angles.sin(), row_angles.cos(), column_angles.sin(), column_angles.cos()]
    of_cells = torch.cat(parts, dim=1).float()
    return torch.cat([torch.zeros(1, dim), of_cells])[None].to(device)


def resized_positions(positions: Tensor, grid: Size) -> Tensor:
    """Return learned positions resized bicubically to another grid; the class token's stays.

    Args:
        positions: (1, 1 + side^2, D).
        grid: (h, w), cells.

    Returns:
        (1, P, D).
    """
    side = grid_side(positions)
    if grid == (side, side):
        return positions
    class_token = positions[:, :1]
    old = positions[:, 1:].transpose(1, 2).unflatten(2, (side, side))  # (1, D, side, side)
    new = F.interpolate(old, size=grid, mode="bicubic", align_corners=False, antialias=True)
    of_cells = new.flatten(2).transpose(1, 2)  # (1, h * w, D)
    return torch.cat([class_token, of_cells], dim=1)


def grid_side(positions: Tensor) -> int:
    """Return the side, cells, of the square grid of saved positions (1, 1 + side^2, D).

    Raises:
        InputError: the shape is another one.
    """
    num_cells = 0
    if positions.ndim == 3 and len(positions) == 1:
        num_cells = positions.shape[1] - 1  # without the class token
    side = math.isqrt(max(num_cells, 0))
    if side == 0 or side**2 != num_cells:
        raise InputError(
            f"the weights' positions are of shape {tuple(positions.shape)}; expected one position "
            "for the class token and those of a square grid of patches"
        )
    return side


def learned_grid_side(positions: Tensor) -> int | None:
    """Return `grid_side` of saved positions that are learned; None for MoCo v3's fixed ones.

    Raises:
        InputError: as `grid_side`.
    """
    side = grid_side(positions)
    fixed = sine_cosine_positions((side, side), positions.shape[2], torch.device("cpu"))
    # Other projects compute them in float32, which is 1e-5 off in the far corner of a large grid.
    if torch.allclose(positions.float().cpu(), fixed, rtol=0, atol=1e-4):
        return None
    return side
