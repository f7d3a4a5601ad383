"""Self-attention inside (shifted) windows, right at any size: Swin (arXiv 2103.14030) and Swin V2 (arXiv 2111.09883).

What torchvision's layers get wrong is done here, under torchvision's parameter names:

- A map that is no multiple of the window is padded before the cyclic shift, and padding is no key of any real cell.
- A window larger than the map is clipped to it, and there is then no shift.
- The log-spaced coordinates of V2's position bias are normalised by the window of the pretraining, whatever the window.

Letters: N batch, H W cells of a map, B windows of a whole batch, L cells of a window, h heads, d width of a head.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchvision.models import swin_transformer

from moco.errors import InputError
from moco.models.swin.windows import (
    Size,
    WindowGrid,
    into_windows,
    log_coordinates,
    out_of_windows,
    relative_positions,
    window_grid,
)

MAX_LOGIT_SCALE = 100.0  # arXiv 2111.09883, section 3.2: tau is not below 0.01
MAX_BIAS = 16.0  # of the official code's 16 * sigmoid(MLP(coordinates))
SCORES_AT_ONCE = (
    1 << 19
)  # computed at a time on a CPU: 2 MiB of float32, so that they stay in its cache
MASK_AT_ONCE = 1 << 22  # numbers in a mask for all windows of a map: 16 MiB of float32


Masks = list[tuple[Tensor | None, Tensor]]
"""Which windows of a map (None: all), and their additive mask (h, L, L), or (windows, h, L, L) with one for each."""


def additive_masks(bias: Tensor, grid: WindowGrid, dtype: torch.dtype) -> Masks:
    """Return the position bias (h, L, L) as masks, with -inf where a cell does not see another.

    The windows of a large map that are cut get masks of their own: one mask for each window would take gigabytes.
    """
    bias = bias.to(dtype)
    if not len(grid.cut):
        return [(None, bias)]
    of_cut = bias + grid.mask[:, None].to(dtype)
    if len(grid.whole) and grid.num_windows * bias.numel() > MASK_AT_ONCE:
        return [(grid.whole, bias), (grid.cut, of_cut)]
    return [(None, bias.repeat(grid.num_windows, 1, 1, 1).index_copy(0, grid.cut, of_cut))]


def attend(query: Tensor, key: Tensor, value: Tensor, masks: Masks) -> Tensor:
    """softmax(query key^T + mask) value, (B, h, L, d), for queries that are already scaled.

    Args:
        query, key, value: (B, h, L, d); query and key may be of a finer type than value.
        masks: for all windows together, or for parts that make up all.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)
    if len(masks) == 1:
        return _attend(query, key, value, masks[0][1])
    windows = sum(len(which) for which, _ in masks if which is not None)
    query, key, value = (
        x.unflatten(0, (-1, windows)) for x in (query, key, value)
    )  # (N, windows, h, L, d)
    out = torch.empty_like(value)
    for which, mask in masks:
        part = [x[:, which].flatten(0, 1) for x in (query, key, value)]
        out[:, which] = _attend(part[0], part[1], part[2], mask).unflatten(0, (len(out), -1))
    return out.flatten(0, 1)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """The same with one mask, in four dimensions: one of three keeps a CPU from its fused form."""
    if mask.ndim == 3:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask[None], scale=1.0)
    windows, h, length, _ = mask.shape
    shape = value.shape
    query, key, value = (
        x.reshape(-1, windows * h, length, x.shape[-1]) for x in (query, key, value)
    )
    mask = mask.view(1, windows * h, length, length)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0).reshape(
        shape
    )


def attend_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, grid: WindowGrid
) -> Tensor:
    """The same on a CPU, a few windows at a time, so that their scores stay in its cache.

    There scaled_dot_product_attention has no fused form that gives the bias a gradient, and the one that gives none took
    longer, see docs/performance.md.

    Args:
        query, key, value: (B, h, L, d).
        bias: (h, L, L) float32.
        grid: says which windows are masked.
    """
    b, h, length, d = query.shape
    bias = bias.to(torch.promote_types(value.dtype, bias.dtype))
    query, key, value = (
        x.reshape(b * h, length, d) for x in (query.to(bias.dtype), key.to(bias.dtype), value)
    )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, bias)):
        out = _CPUAttention.apply(query, key, value, bias, grid)
    else:
        out = _attended(query, key, value, bias, grid)
    return out.view(b, h, length, d)


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    grid: WindowGrid,
    weights: Tensor | None = None,
) -> Tensor:
    """`attend_on_cpu` of (B h, L, d); `weights` (B h, L, L) of the value's type are filled, if they are kept."""
    h, length, _ = bias.shape
    biases = bias.repeat(_windows_at_once(bias, len(query) // h), 1, 1)
    scores = torch.empty_like(biases)
    own_type = value.dtype == scores.dtype
    few = scores if own_type else torch.empty_like(scores, dtype=value.dtype)
    out = torch.empty_like(value)
    for start in range(0, len(query), len(scores)):
        rows = slice(start, min(start + len(scores), len(query)))
        n = rows.stop - rows.start
        part = few[:n] if weights is None else weights[rows]
        torch.baddbmm(biases[:n], query[rows], key[rows].transpose(1, 2), out=scores[:n])
        _add_mask(scores[:n].view(-1, h, length, length), grid, start // h)
        torch.softmax(scores[:n], dim=-1, out=part if own_type else scores[:n])
        if not own_type:
            part.copy_(scores[:n])
        torch.bmm(part, value[rows], out=out[rows])
    return out


def _windows_at_once(bias: Tensor, windows: int) -> int:
    return max(1, min(windows, SCORES_AT_ONCE // bias.numel()))


class _CPUAttention(torch.autograd.Function):
    """`attend_on_cpu` with a hand-written backward pass.

    Query and key are (B h, L, d) in the bias's type, float32, as are scores and softmax; value is (B h, L, d), of its type
    are the attention weights, which are kept for the backward pass, and what that pass computes with.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, grid: WindowGrid
    ) -> Tensor:
        weights = value.new_empty(len(query), *bias.shape[1:])
        out = _attended(query, key, value, bias, grid, weights)
        ctx.save_for_backward(query.to(value.dtype), key.to(value.dtype), value, weights)
        ctx.bias_options = {"dtype": bias.dtype, "device": bias.device}
        ctx.num_heads, ctx.at_once = len(bias), _windows_at_once(bias, len(query) // len(bias))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights = ctx.saved_tensors
        h = ctx.num_heads
        grad = grad.contiguous()
        d_query, d_key, d_value = (torch.empty_like(x) for x in (query, key, value))
        d_bias = torch.zeros(h, *weights.shape[1:], **ctx.bias_options)
        d_products = weights.new_empty(ctx.at_once * h, *weights.shape[1:])
        for first in range(0, len(query), len(d_products)):
            rows = slice(first, min(first + len(d_products), len(query)))
            d_scores = d_products[: rows.stop - rows.start]
            torch.bmm(weights[rows].transpose(1, 2), grad[rows], out=d_value[rows])
            torch.bmm(grad[rows], value[rows].transpose(1, 2), out=d_scores)
            torch._softmax_backward_data(
                d_scores, weights[rows], -1, weights.dtype, grad_input=d_scores
            )
            windows = d_scores.view(-1, h, *weights.shape[1:])
            d_bias += windows[0] if len(windows) == 1 else windows.sum(dim=0, dtype=d_bias.dtype)
            torch.bmm(d_scores, key[rows], out=d_query[rows])
            torch.bmm(d_scores.transpose(1, 2), query[rows], out=d_key[rows])
        return d_query.to(d_bias.dtype), d_key.to(d_bias.dtype), d_value, d_bias, None


def _add_mask(scores: Tensor, grid: WindowGrid, first: int) -> None:
    """Mask the scores (b, h, L, L) of the windows `first`, `first` + 1, ... of the batch, in place."""
    for masked, cut in enumerate(grid.cut.tolist()):
        start = (cut - first) % grid.num_windows
        if start < len(scores):
            scores[start :: grid.num_windows] += grid.mask[masked]


class _Normalize(torch.autograd.Function):
    """Rows (B, h, L, d) as unit vectors times a scale (h, 1, 1), of the scale's type.

    What torch.nn.functional.normalize and a product do, but for the backward pass only the rows and their norms are kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=scale.dtype).clamp_min(1e-12)
        ctx.save_for_backward(x, norm, scale)
        return x * (scale / norm)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, scale = ctx.saved_tensors
        unit = x / norm
        along = (grad * unit).sum(dim=-1, keepdim=True)
        d_scale = along.sum(dim=(0, 2))[:, None] if ctx.needs_input_grad[1] else None
        return unit.mul_(along).neg_().add_(grad).mul_(scale / norm).to(x.dtype), d_scale


class WindowAttention(swin_transformer.ShiftedWindowAttention):
    """Swin's attention: dot products, and a learned table of position biases.

    The table belongs to its window: at another one it is resized (`set_window`), which only approximates it.
    """

    shifted = False
    window_size: Size
    relative_position_bias_table: nn.Parameter

    def define_relative_position_index(self) -> None:
        """Keep none: positions are computed where they are needed, so that the window shapes nothing but V1's table."""
        self.window_size = (
            self.window_size[0],
            self.window_size[1],
        )  # torchvision's constructor leaves a list

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:
        """Maps (N, H, W, C) to maps (N, H, W, C).

        Args:
            size: (height, width) of the real cells, at the top left; the rest is padding. None: all are real.
        """
        n, height, width, channels = x.shape
        grid = window_grid(
            (height, width), size or (height, width), self.window_size, self.shifted, x.device
        )
        length = math.prod(grid.window)
        x = into_windows(x.reshape(n, -1, channels), grid)
        x = F.linear(x, self.qkv.weight, self.qkv_bias())
        x = x.view(n * grid.num_windows, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = x.contiguous()  # (B, h, L, d) each
        query, key = self.scaled(query, key)
        bias = self.position_bias(grid.window)
        # torch.compile cannot trace the loop over windows, and would unroll it.
        if query.device.type == "cpu" and not torch.compiler.is_compiling():
            x = attend_on_cpu(query, key, value, bias, grid)
        else:
            x = attend(query, key, value, additive_masks(bias, grid, value.dtype))
        x = x.transpose(1, 2).reshape(n, -1, channels)
        return self.proj(out_of_windows(x, grid)).view(n, height, width, channels)

    def qkv_bias(self) -> Tensor:
        return self.qkv.bias

    def scaled(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Query and key whose dot products are the attention scores."""
        return query * query.shape[-1] ** -0.5, key

    def position_bias(self, window: Size) -> Tensor:
        """Return the bias of every pair of cells of a window: (h, L, L) float32.

        It is computed anew in every pass. A kept bias would have to know when its weights change, and nothing tells: fused
        optimizers and some `_foreach` kernels count no tensor versions.
        """
        with torch.autocast(self.qkv.weight.device.type, enabled=False):
            table = self.bias_table(window).T  # (h, offsets)
        # On a CPU the gradient of this form takes an eighth of the time of table[:, positions].
        bias = table.index_select(1, relative_positions(window, table.device))
        return bias.view(self.num_heads, math.prod(window), -1)

    def bias_table(self, window: Size) -> Tensor:
        """The biases of all offsets in a window no larger than `window_size`, as in `relative_positions`: (offsets, h)."""
        full = self.relative_position_bias_table.view(
            *(2 * cells - 1 for cells in self.window_size), -1
        )
        top, left = (
            cells - clipped for cells, clipped in zip(self.window_size, window, strict=True)
        )
        return full[top : len(full) - top, left : full.shape[1] - left].flatten(0, 1).float()

    def set_window(self, window: Size) -> None:
        """Attend in windows of another size; the table is resized bicubically, edge offsets onto edge offsets."""
        if window == self.window_size:
            return
        table = resized_table(self.relative_position_bias_table.detach(), self.window_size, window)
        requires_grad = self.relative_position_bias_table.requires_grad
        self.relative_position_bias_table = nn.Parameter(table, requires_grad)
        self.window_size = window

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As PyTorch's, for torchvision's state dicts too, and for tables of another window, which are resized."""
        state_dict.pop(prefix + "relative_position_index", None)
        table = state_dict.get(prefix + "relative_position_bias_table")
        if table is not None and table.shape != self.relative_position_bias_table.shape:
            there = round((math.sqrt(len(table)) + 1) / 2)
            state_dict[prefix + "relative_position_bias_table"] = resized_table(
                table, (there, there), self.window_size
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def resized_table(table: Tensor, window: Size, new_window: Size) -> Tensor:
    """A table of position biases (offsets, h) of one window for another, bicubically."""
    if window == new_window:
        return table.clone()
    image = table.T.reshape(1, -1, *(2 * cells - 1 for cells in window))
    resized = F.interpolate(
        image.float(),
        size=tuple(2 * cells - 1 for cells in new_window),
        mode="bicubic",
        align_corners=True,
    )
    return resized.flatten(2)[0].T.to(table.dtype).contiguous()


class WindowAttentionV2(WindowAttention, swin_transformer.ShiftedWindowAttentionV2):
    """Swin V2's attention: scaled cosines, and position biases from a small MLP over log-spaced coordinates.

    arXiv 2111.09883, sections 3.2 and 3.3. The MLP knows offsets as fractions of the pretraining window, so that another
    window asks it for more offsets and changes none.
    """

    pretrained_window_size: Size

    def define_relative_position_bias_table(self) -> None:
        self.pretrained_window_size = tuple(self.window_size)  # type: ignore[assignment]

    def qkv_bias(self) -> Tensor:
        query, _, value = self.qkv.bias.chunk(3)  # keys have none
        return torch.cat([query, torch.zeros_like(query), value])

    def scaled(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors, the query times the head's scale, normalised in float32."""
        finer = torch.promote_types(query.dtype, torch.float32)
        scale = self.logit_scale.to(finer).clamp(max=math.log(MAX_LOGIT_SCALE)).exp()  # (h, 1, 1)
        return _Normalize.apply(query, scale), _Normalize.apply(key, torch.ones_like(scale))

    def bias_table(self, window: Size) -> Tensor:
        # In float64, rounded at the end: in float32 the last bits of an offset's bias depend on how many offsets there are.
        into, _, out = self.cpb_mlp
        coordinates = log_coordinates(
            window, self.pretrained_window_size, into.weight.device
        ).flatten(0, 1)
        hidden = F.relu(F.linear(coordinates, into.weight.double(), into.bias.double()))
        return (MAX_BIAS * torch.sigmoid(F.linear(hidden, out.weight.double()))).float()

    def set_window(self, window: Size) -> None:
        """Attend in windows of another size; the biases of the offsets that both have stay the same."""
        self.window_size = window

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As PyTorch's, for torchvision's state dicts too, if they were trained with our pretraining window.

        Raises:
            InputError: they were trained with another one.
        """
        coordinates = state_dict.pop(prefix + "relative_coords_table", None)
        if coordinates is not None:
            check_pretrained_window(coordinates, self.pretrained_window_size)
        super()._load_from_state_dict(state_dict, prefix, *args)


def pretrained_window_of(coordinates: Tensor) -> Size | None:
    """The window that normalises a table of log coordinates (1, 2 window_h - 1, 2 window_w - 1, 2), as torchvision saves it.

    It shows in the offset of one cell. None for windows of a single cell, which have no other offset.
    """
    middle = [(side - 1) // 2 for side in coordinates.shape[1:3]]
    if 0 in middle:
        return None
    one_cell = coordinates[0, middle[0] + 1, middle[1] + 1].double()
    down, right = (8 / (2 ** (3 * one_cell) - 1) + 1).round().int().tolist()
    return down, right


def check_pretrained_windows(tables: Sequence[Tensor], pretrained: Sequence[int]) -> None:
    """Hold the stages' pretraining windows to saved tables of log coordinates, one of each stage.

    Raises:
        InputError: a table is of weights that were pretrained with another window.
    """
    there = []
    for table, window in zip(tables, pretrained, strict=True):
        found = pretrained_window_of(table)
        there.append(found[0] if found else window)
    if len(set(there)) == 1 or there == list(pretrained):
        for table, window in zip(tables, pretrained, strict=True):
            check_pretrained_window(table, (window, window))
        return
    raise InputError(
        f"the weights were pretrained with windows of {there} cells in the four stages, and "
        f"pretrained_window_size={list(pretrained)} would stretch their position biases; "
        f"set pretrained_window_size={str(there).replace(' ', '')}"
    )


def check_pretrained_window(coordinates: Tensor, pretrained: Size) -> None:
    """Raises InputError if a saved table of log coordinates is of weights that were pretrained with another window."""
    there = pretrained_window_of(coordinates)
    if there is not None and there != pretrained:
        raise InputError(
            f"the weights were pretrained with windows of {there[0]} x {there[1]} cells, and pretrained_window_size="
            f"{pretrained[0]} would stretch their position biases; set pretrained_window_size={there[0]}"
        )
