"""Self-attention inside (shifted) windows, correct at any size of the map.

Swin is arXiv 2103.14030, Swin V2 is arXiv 2111.09883. Two of V2's three changes are switches here.
Names and initial values of the parameters are torchvision's, but unlike there:

- A map that is no multiple of the window is padded before the cyclic shift, and no real cell
  attends to padding.
- A window larger than the map is clipped to it, and then there is no shift.
- The coordinates of a position bias that an MLP computes are normalised by the window of the
  pretraining, whatever the present window is.

Shapes use N for the batch, H and W for the cells of a map, B for the windows of a whole batch, L
for the cells of a window, h for the heads and d for the width of a head.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moco.models.size_constants import Size
from moco.models.swin.windows import (
    WindowGrid,
    into_windows,
    offset_coordinates,
    out_of_windows,
    relative_positions,
    window_grid,
)

MAX_LOGIT_SCALE = 100.0
"""arXiv 2111.09883, section 3.2: tau is at least 0.01."""
MAX_BIAS = 16.0
"""From the official code: the bias is 16 * sigmoid(MLP(coordinates))."""
MLP_WIDTH = 512
"""Of the position bias's hidden layer, as in the official code."""
SCORES_PER_BLOCK = 2**19
"""Scores that a CPU computes at a time: 2 MiB of float32, which stay in its cache."""
MOST_MASK_NUMBERS = 2**22
"""Of one mask for all windows of a map: 16 MiB of float32."""


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, grid: WindowGrid) -> Tensor:
    """Return softmax(query key^T + bias) value: (B, h, L, d), in the value's type.

    Args:
        query: (B, h, L, d), already scaled; may be of a finer type than the value.
        key: (B, h, L, d), of the query's type.
        value: (B, h, L, d).
        bias: (h, L, L) float32.
        grid: the windows of one map.
    """
    query = query.to(value.dtype)
    key = key.to(value.dtype)
    bias = bias.to(value.dtype)
    if not len(grid.cut):
        return _attend(query, key, value, bias)
    cut_masks = bias + grid.mask[:, None].to(bias.dtype)
    if not len(grid.whole) or grid.num_windows * bias.numel() <= MOST_MASK_NUMBERS:
        masks = bias.repeat(grid.num_windows, 1, 1, 1).index_copy(0, grid.cut, cut_masks)
        return _attend(query, key, value, masks)
    # In a large map only the windows that are cut get masks of their own. One mask for each window
    # would take gigabytes.
    query = query.unflatten(0, (-1, grid.num_windows))  # (N, windows, h, L, d)
    key = key.unflatten(0, (-1, grid.num_windows))
    value = value.unflatten(0, (-1, grid.num_windows))
    out = torch.empty_like(value)
    for part, mask in ((grid.whole, bias), (grid.cut, cut_masks)):
        attended = _attend(
            query[:, part].flatten(0, 1),
            key[:, part].flatten(0, 1),
            value[:, part].flatten(0, 1),
            mask,
        )
        out[:, part] = attended.unflatten(0, (len(out), -1))
    return out.flatten(0, 1)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Return `attend` with an additive mask: (h, L, L), or (windows, h, L, L) of one map.

    The inputs have four dimensions, because with three a CPU does not use its fused form.
    """
    if mask.ndim == 3:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask[None], scale=1.0)
    num_windows, h, length, _ = mask.shape
    joined = (-1, num_windows * h, length, value.shape[-1])
    out = F.scaled_dot_product_attention(
        query.reshape(joined),
        key.reshape(joined),
        value.reshape(joined),
        attn_mask=mask.view(1, num_windows * h, length, length),
        scale=1.0,
    )
    return out.reshape(value.shape)


def attend_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, grid: WindowGrid
) -> Tensor:
    """Return `attend` on a CPU, a few windows at a time, so that their scores stay in its cache.

    On a CPU scaled_dot_product_attention has no fused form that gives the bias a gradient, and the
    form without gradients took longer than this one, see docs/performance.md.

    Args:
        query: (B, h, L, d), already scaled; may be of a finer type than the value.
        key: (B, h, L, d), of the query's type.
        value: (B, h, L, d).
        bias: (h, L, L) float32.
        grid: the windows of one map.
    """
    b, h, length, d = query.shape
    bias = bias.to(torch.promote_types(value.dtype, bias.dtype))
    query = query.to(bias.dtype).reshape(b * h, length, d)
    key = key.to(bias.dtype).reshape(b * h, length, d)
    value = value.reshape(b * h, length, d)
    inputs = (query, key, value, bias)
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if needs_gradient:
        out = _CPUAttention.apply(query, key, value, bias, grid)
    else:
        out = _attend_in_blocks(query, key, value, bias, grid)
    return out.view(b, h, length, d)


def _attend_in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    grid: WindowGrid,
    weights: Tensor | None = None,
) -> Tensor:
    """Return `attend_on_cpu` for rows (B * h, L, d).

    Args:
        weights: (B * h, L, L) of the value's type, filled with the attention weights. None: they
            are not kept.
    """
    h, length, _ = bias.shape
    num_windows = len(query) // h
    biases = bias.repeat(_windows_per_block(bias, num_windows), 1, 1)
    scores = torch.empty_like(biases)
    out = torch.empty_like(value)
    for start in range(0, len(query), len(scores)):
        rows = slice(start, min(start + len(scores), len(query)))
        block = scores[: rows.stop - rows.start]
        torch.baddbmm(biases[: len(block)], query[rows], key[rows].transpose(1, 2), out=block)
        _add_masks(block.view(-1, h, length, length), grid, start // h)
        torch.softmax(block, dim=-1, out=block)
        block = block.to(value.dtype)
        if weights is not None:
            weights[rows] = block
        torch.bmm(block, value[rows], out=out[rows])
    return out


def _windows_per_block(bias: Tensor, num_windows: int) -> int:
    return max(1, min(num_windows, SCORES_PER_BLOCK // bias.numel()))


def _add_masks(scores: Tensor, grid: WindowGrid, first: int) -> None:
    """Mask a block of scores in place.

    Args:
        scores: (windows, h, L, L).
        first: number of the block's first window in the whole batch.
    """
    for number, cut in enumerate(grid.cut.tolist()):
        start = (cut - first) % grid.num_windows
        if start < len(scores):
            scores[start :: grid.num_windows] += grid.mask[number]


class _CPUAttention(torch.autograd.Function):
    """`_attend_in_blocks` with a backward pass in blocks.

    Query, key, scores and softmax are of the bias's type, float32. The attention weights are kept
    for the backward pass in the value's type, in which that pass computes.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, grid: WindowGrid
    ) -> Tensor:
        weights = value.new_empty(len(query), *bias.shape[1:])
        out = _attend_in_blocks(query, key, value, bias, grid, weights)
        ctx.save_for_backward(query.to(value.dtype), key.to(value.dtype), value, weights)
        ctx.bias_dtype = bias.dtype
        ctx.num_heads = len(bias)
        num_windows = len(query) // len(bias)
        ctx.windows_per_block = _windows_per_block(bias, num_windows)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights = ctx.saved_tensors
        h = ctx.num_heads
        length = weights.shape[1]
        d_out = d_out.contiguous()
        d_query = torch.empty_like(query)
        d_key = torch.empty_like(key)
        d_value = torch.empty_like(value)
        d_bias = weights.new_zeros(h, length, length, dtype=ctx.bias_dtype)
        buffer = weights.new_empty(ctx.windows_per_block * h, length, length)
        for start in range(0, len(query), len(buffer)):
            rows = slice(start, min(start + len(buffer), len(query)))
            torch.bmm(weights[rows].transpose(1, 2), d_out[rows], out=d_value[rows])
            # The gradient of softmax: weights * (d_weights - sum of weights * d_weights).
            d_scores = buffer[: rows.stop - rows.start]
            torch.bmm(d_out[rows], value[rows].transpose(1, 2), out=d_scores)
            d_scores.mul_(weights[rows])
            d_scores.addcmul_(weights[rows], d_scores.sum(dim=-1, keepdim=True), value=-1)
            d_bias += d_scores.view(-1, h, length, length).sum(dim=0, dtype=d_bias.dtype)
            torch.bmm(d_scores, key[rows], out=d_query[rows])
            torch.bmm(d_scores.transpose(1, 2), query[rows], out=d_key[rows])
        return d_query.to(d_bias.dtype), d_key.to(d_bias.dtype), d_value, d_bias, None


class _Normalize(torch.autograd.Function):
    """Rows (B, h, L, d) as unit vectors times a scale (h, 1, 1), in the type of the scale.

    It is torch.nn.functional.normalize and a product, but keeps only the rows and their norms for
    the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=scale.dtype)
        norm = norm.clamp_min(1e-12)
        ctx.save_for_backward(x, norm, scale)
        return x * (scale / norm)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, scale = ctx.saved_tensors
        unit = x / norm
        along = (d_out * unit).sum(dim=-1, keepdim=True)
        d_scale = None
        if ctx.needs_input_grad[1]:
            d_scale = along.sum(dim=(0, 2))[:, None]
        d_x = unit.mul_(along).neg_().add_(d_out).mul_(scale / norm)  # in place, to save memory
        return d_x.to(x.dtype), d_scale


class WindowAttention(nn.Module):
    """The attention of Swin or Swin V2, or of a network between the two.

    Args:
        dim: channels, C.
        window_size: (height, width) of the windows, cells.
        shift_size: torchvision's blocks give it. The attribute `shifted` is used in its place,
            because the shift follows a window that is changed later.
        num_heads: h.
        attention: ``dot`` scales the dot products of queries and keys by 1 / sqrt(d). ``cosine``
            scales the cosines by a learned number for each head, at most 100 (`logit_scale`). Keys
            then have no bias, as in the official code, because a bias would change their
            directions. Source: arXiv 2111.09883, section 3.2, equation 2.
        position_bias: ``table`` is one learned number for each head and offset. It belongs to its
            window, and is resized for another one, which is only an approximation. ``linear_cpb``
            and ``log_cpb`` are 16 * sigmoid of an MLP of the offset (`cpb_mlp`), which sees linear
            or log-spaced coordinates as fractions of the pretraining window, see
            `offset_coordinates`. Another window asks it for more offsets, and changes none.
            Source: section 3.3, equations 3 and 4.
        attention_dropout, dropout: torchvision's blocks give them; always 0.
    """

    window_size: Size
    pretrained_window_size: Size
    """The window that normalises the MLP's coordinates, cells."""
    shifted: bool
    """Whether the windows are shifted by half their side."""
    relative_position_bias_table: nn.Parameter
    logit_scale: nn.Parameter
    cpb_mlp: Any
    """Linear, ReLU and Linear without bias: from 2 coordinates to a number for each head."""

    def __init__(
        self,
        dim: int,
        window_size: Sequence[int],
        shift_size: Sequence[int],
        num_heads: int,
        *,
        attention: str,
        position_bias: str,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        height, width = window_size
        self.window_size = (height, width)
        self.pretrained_window_size = (height, width)
        self.shifted = False
        self.num_heads = num_heads
        self.attention = attention
        self.position_bias = position_bias
        # In the order of torchvision's layers, which draw the same initial values.
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        if position_bias == "table":
            table = torch.empty((2 * height - 1) * (2 * width - 1), num_heads)  # (offsets, h)
            nn.init.trunc_normal_(table, std=0.02)
            self.relative_position_bias_table = nn.Parameter(table)
        if attention == "cosine":
            self.logit_scale = nn.Parameter(torch.log(10 * torch.ones(num_heads, 1, 1)))
        if position_bias != "table":
            self.cpb_mlp = nn.Sequential(
                nn.Linear(2, MLP_WIDTH),
                nn.ReLU(inplace=True),
                nn.Linear(MLP_WIDTH, num_heads, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return maps (N, H, W, C) for maps (N, H, W, C)."""
        n, height, width, channels = x.shape
        grid = window_grid((height, width), self.window_size, self.shifted, x.device)
        length = math.prod(grid.window)
        x = into_windows(x.reshape(n, -1, channels), grid)
        x = F.linear(x, self.qkv.weight, self.qkv_bias())
        x = x.view(n * grid.num_windows, length, 3, self.num_heads, -1)  # (B, L, 3, h, d)
        query, key, value = x.permute(2, 0, 3, 1, 4).contiguous()  # (B, h, L, d) each
        query, key = self.scaled(query, key)
        bias = self.pair_biases(grid.window)
        # torch.compile would unroll the loop over blocks of windows.
        if query.device.type == "cpu" and not torch.compiler.is_compiling():
            x = attend_on_cpu(query, key, value, bias, grid)
        else:
            x = attend(query, key, value, bias, grid)
        x = x.transpose(1, 2).reshape(n, -1, channels)
        return self.proj(out_of_windows(x, grid)).view(n, height, width, channels)

    def qkv_bias(self) -> Tensor:
        """Return the bias of the projection to queries, keys and values: (3 C,)."""
        if self.attention == "dot":
            return self.qkv.bias
        query, _, value = self.qkv.bias.chunk(3)
        return torch.cat([query, torch.zeros_like(query), value])

    def scaled(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return query and key (B, h, L, d) whose dot products are the attention scores.

        For cosines they are unit vectors, the query's times the scale of its head, in float32.
        """
        if self.attention == "dot":
            return query * query.shape[-1] ** -0.5, key
        finer = torch.promote_types(query.dtype, torch.float32)
        logit_scale = self.logit_scale.to(finer).clamp(max=math.log(MAX_LOGIT_SCALE))
        scale = logit_scale.exp()  # (h, 1, 1)
        return _Normalize.apply(query, scale), _Normalize.apply(key, torch.ones_like(scale))

    def pair_biases(self, window: Size) -> Tensor:
        """Return the bias of every pair of cells of a window: (h, L, L), float32 or finer.

        It is computed in every pass. A stored bias cannot know when its weights change: fused
        optimizers and some foreach kernels do not count tensor versions.
        """
        with torch.autocast(self.qkv.weight.device.type, enabled=False):
            table = self.bias_table(window).T  # (h, offsets)
        # On a CPU the backward pass of index_select takes an eighth of the time of indexing.
        bias = table.index_select(1, relative_positions(window, table.device))
        return bias.view(self.num_heads, math.prod(window), -1)

    def bias_table(self, window: Size) -> Tensor:
        """Return the biases of all offsets in a window: (offsets, h), as in `relative_positions`.

        They are float32, or of the weights' type if that is finer.

        Args:
            window: no larger than `window_size`.
        """
        finer = torch.promote_types(self.qkv.weight.dtype, torch.float32)
        if self.position_bias == "table":
            return middle_of_table(self.relative_position_bias_table, self.window_size, window).to(
                finer
            )
        first, _, second = self.cpb_mlp
        coordinates = offset_coordinates(
            self.position_bias, window, self.pretrained_window_size, first.weight.device
        )
        # In float64, because in float32 the last bits of a bias would depend on how many offsets
        # there are.
        coordinates = coordinates.flatten(0, 1)  # (offsets, 2)
        hidden = F.linear(coordinates, first.weight.double(), first.bias.double())
        logits = F.linear(F.relu(hidden), second.weight.double())  # (offsets, h)
        return (MAX_BIAS * torch.sigmoid(logits)).to(finer)

    def set_window(self, window: Size) -> None:
        """Change the window, in place.

        With an MLP the offsets that both windows have keep their biases. A table is resized
        bicubically, edge offsets onto edge offsets.
        """
        if self.position_bias == "table" and window != self.window_size:
            old = self.relative_position_bias_table
            table = resized_table(old.detach(), self.window_size, window)
            self.relative_position_bias_table = nn.Parameter(table, old.requires_grad)
        self.window_size = window


def middle_of_table(table: Tensor, window: Size, smaller: Size) -> Tensor:
    """Return the rows of a table of position biases that a smaller window needs.

    Args:
        table: (offsets, h) of `window`.
        window: (height, width), cells.
        smaller: no larger than `window`.
    """
    height, width = window
    image = table.view(2 * height - 1, 2 * width - 1, -1)
    # The offsets of a smaller window are those in the middle of the table.
    top = height - smaller[0]
    left = width - smaller[1]
    return image[top : len(image) - top, left : image.shape[1] - left].flatten(0, 1)


def resized_table(table: Tensor, window: Size, new_window: Size) -> Tensor:
    """Return a table of position biases (offsets, h) resized bicubically to another window."""
    height, width = window
    image = table.T.reshape(1, -1, 2 * height - 1, 2 * width - 1)
    new_size = (2 * new_window[0] - 1, 2 * new_window[1] - 1)
    resized = F.interpolate(image.float(), size=new_size, mode="bicubic", align_corners=True)
    return resized.flatten(2)[0].T.to(table.dtype).contiguous()
