"""Attention in windows against the papers' formulas, cell by cell, in float64."""

import math
import unittest.mock

import pytest
import torch
import torch.nn.functional as F
from torch.nn import Parameter

from moco.models.swin.attention import (
    WindowAttention,
    _attend,
    _attend_in_blocks,
    _CPUAttention,
    _Normalize,
    attend,
    attend_on_cpu,
    resized_table,
)
from moco.models.swin.windows import offset_coordinates, relative_positions, window_grid
from tests.conftest import thinned

CPU = torch.device("cpu")


V1 = ("dot", "table")
V2 = ("cosine", "log_cpb")
BETWEEN = [("dot", "linear_cpb"), ("dot", "log_cpb"), ("cosine", "table"), ("cosine", "linear_cpb")]


def attention(kind, window, shifted=False, dim=24, num_heads=3):
    """A layer of random weights. `kind`: its attention and its position bias."""
    made = WindowAttention(
        dim, [window, window], [0, 0], num_heads, attention=kind[0], position_bias=kind[1]
    )
    made.shifted = shifted
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if kind[0] == "cosine":
        torch.nn.init.uniform_(made.logit_scale, 2, 5.5)  # some above the clamp, ln 100 = 4.6
    return made


def by_the_paper(layer, x, size):
    """What every real cell gets, from the real cells of its own window alone: no padding, no cyclic shift, float64.

    A cell's window is floor((row - shift) / window), floor((column - shift) / window).
    """
    n, _, _, channels = x.shape
    height, width = size
    window = [min(layer.window_size[0], side) for side in size]
    shift = [
        cells // 2 if layer.shifted and cells < side else 0
        for cells, side in zip(window, size, strict=True)
    ]
    x = x[:, :height, :width].double()
    weight, bias = layer.qkv.weight.double(), layer.qkv.bias.double().clone()
    if layer.attention == "cosine":
        bias = torch.cat([bias[:channels], torch.zeros(channels), bias[2 * channels :]])
    h = layer.num_heads
    query, key, value = (
        F.linear(x, weight, bias).view(n, height * width, 3, h, -1).permute(2, 0, 3, 1, 4)
    )
    if layer.attention == "cosine":
        tau = 1 / layer.logit_scale.double().clamp(max=math.log(100)).exp()
        scores = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1) / tau
    else:
        scores = query @ key.transpose(-2, -1) / math.sqrt(channels // h)
    cells = [(row, column) for row in range(height) for column in range(width)]
    places = [
        tuple((at - by) // of for at, by, of in zip(cell, shift, window, strict=True))
        for cell in cells
    ]
    together = torch.tensor([[one == other for other in places] for one in places])
    offsets = torch.tensor(
        [[(a - c, b - d) for c, d in cells] for a, b in cells]
    )  # (cells, cells, 2)
    if layer.position_bias != "table":
        scaled = offsets.double() / (layer.pretrained_window_size[0] - 1)
        if layer.position_bias == "log_cpb":
            scaled = scaled.sign() * torch.log2(1 + (8 * scaled).abs()) / math.log2(8)
        hidden = F.relu(
            scaled @ layer.cpb_mlp[0].weight.double().T + layer.cpb_mlp[0].bias.double()
        )
        biases = 16 / (1 + torch.exp(-(hidden @ layer.cpb_mlp[2].weight.double().T)))
    else:
        side = 2 * layer.window_size[0] - 1
        table = layer.relative_position_bias_table.double().view(side, side, h)
        place = (offsets + layer.window_size[0] - 1).clamp(0, side - 1)
        biases = table[place[..., 0], place[..., 1]]
    scores = (scores + biases.permute(2, 0, 1)).masked_fill(~together, -math.inf)
    out = (scores.softmax(-1) @ value).transpose(1, 2).reshape(n, height, width, channels)
    return F.linear(out, layer.proj.weight.double(), layer.proj.bias.double())


# map, window, shifted
CASES = [
    ((8, 12), 4, False),
    ((8, 12), 4, True),
    ((9, 11), 4, True),  # filled up to 12 x 12
    ((9, 11), 5, True),
    ((3, 9), 4, True),  # clipped to 3 rows, shifted along the columns alone
    ((3, 2), 7, True),  # one window, clipped both ways
    ((5, 5), 1, True),
]


def cases():
    """Every map for both versions of Swin, and two of the maps for what lies between them."""
    found = [(kind, *case) for kind in (V1, V2) for case in CASES]
    return found + [(kind, *case) for kind in BETWEEN for case in (CASES[2], CASES[4])]


@pytest.mark.parametrize(("kind", "size", "window", "shifted"), thinned(cases(), every=2))
def test_outputs_and_gradients_are_the_papers(kind, size, window, shifted):
    layer = attention(kind, window, shifted)
    if window == 1:
        layer.pretrained_window_size = (2, 2)
    x = torch.randn(2, *size, 24, requires_grad=True)
    with torch.no_grad():
        without_gradients = layer(x)
    ours = layer(x)
    expected = by_the_paper(layer, x, size)
    for got in (ours, without_gradients):
        assert (got.double() - expected).abs().max() <= 1e-5 * expected.abs().max()
    weights = torch.randn_like(ours)
    gradients = []
    for out in (ours, expected):
        out.backward(weights.to(out.dtype))
        gradients.append(
            {"x": x.grad} | {name: parameter.grad for name, parameter in layer.named_parameters()}
        )
        x.grad = None
        layer.zero_grad(set_to_none=True)
    for name, gradient in gradients[1].items():
        got = gradients[0][name]
        assert (got - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


@pytest.mark.slow
def test_gradients_of_the_cpu_function_are_those_of_finite_differences():
    grid = window_grid((5, 7), (3, 3), True, CPU)
    h, length, d = 2, 9, 4
    query, key, value = (
        torch.randn(grid.num_windows * h, length, d, dtype=torch.float64) for _ in range(3)
    )
    bias = torch.randn(h, length, length, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (query, key, value, bias)]
    assert torch.autograd.gradcheck(lambda *x: _CPUAttention.apply(*x, grid), inputs)


@pytest.mark.parametrize("at_once", [0, 1 << 22])
@pytest.mark.parametrize("size", [(9, 11), (8, 8), (4, 5), (3, 2)])
def test_masks_in_two_parts_give_what_one_mask_gives(size, at_once, monkeypatch):
    """On a GPU this way has the gradients too."""
    monkeypatch.setattr("moco.models.swin.attention.MOST_MASK_NUMBERS", at_once)
    layer = attention(V2, 4, shifted=True)
    grid = window_grid(size, (4, 4), True, CPU)
    shape = (2 * grid.num_windows, 3, math.prod(grid.window), 8)
    inputs = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    weights = torch.randn(shape)
    results = []
    for way in (attend, attend_on_cpu):
        out = way(*inputs, layer.pair_biases(grid.window), grid)
        layer.zero_grad()
        gradients = torch.autograd.grad((out * weights).sum(), [*inputs, layer.cpb_mlp[0].weight])
        results.append([out, *gradients])
    if at_once == 0 and 0 < len(grid.cut) < grid.num_windows:
        with unittest.mock.patch("moco.models.swin.attention._attend", wraps=_attend) as calls:
            attend(*inputs, layer.pair_biases(grid.window), grid)
        assert calls.call_count == 2
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_normalising_and_its_gradient_are_those_of_pytorch():
    x = torch.randn(3, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(2, 1, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_Normalize.apply, (x, scale))
    torch.testing.assert_close(_Normalize.apply(x, scale), F.normalize(x, dim=-1) * scale)
    zeros = torch.zeros(1, 2, 1, 4)
    assert torch.equal(_Normalize.apply(zeros, torch.ones(2, 1, 1)), zeros)
    assert _Normalize.apply(x.bfloat16(), scale.float()).dtype == torch.float32


def test_a_few_windows_at_a_time_give_what_all_at_once_give(monkeypatch):
    layer, x = attention(V2, 4, shifted=True), torch.randn(3, 11, 11, 24)
    whole = layer(x)
    whole.sum().backward()
    gradient = layer.cpb_mlp[0].weight.grad.clone()
    layer.zero_grad()
    monkeypatch.setattr(
        "moco.models.swin.attention.SCORES_PER_BLOCK", 4 * 3 * 16**2
    )  # 27 windows: the last part is short
    parts = layer(x)
    parts.sum().backward()
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(layer.cpb_mlp[0].weight.grad, gradient)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_the_same_whether_its_weights_are_kept(dtype, monkeypatch):
    monkeypatch.setattr("moco.models.swin.attention.SCORES_PER_BLOCK", 2 * 3 * 16**2)
    grid = window_grid((11, 11), (4, 4), True, CPU)
    query, key, value = (torch.randn(grid.num_windows * 3, 16, 8) for _ in range(3))
    bias, value = torch.randn(3, 16, 16), value.to(dtype)
    weights = torch.full((len(query), 16, 16), float("nan"), dtype=dtype)
    out = _attend_in_blocks(query, key, value, bias, grid, weights)
    assert torch.equal(out, _attend_in_blocks(query, key, value, bias, grid))
    torch.testing.assert_close(
        weights.sum(dim=-1, dtype=torch.float32), torch.ones(len(query), 16), rtol=0, atol=0.02
    )


@pytest.mark.parametrize("kind", [V1, V2, *BETWEEN])
def test_float64_layers_attend_in_float64(kind):
    layer = attention(kind, 4, shifted=True).double()
    x = torch.randn(2, 9, 9, 24, dtype=torch.float64)
    with torch.no_grad():
        without = layer(x)
    assert (without - by_the_paper(layer, x, (9, 9))).abs().max() < 1e-12
    assert torch.equal(without, layer(x).detach())


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("kind", [V2, ("dot", "log_cpb")])
def test_bfloat16_stays_near_float64_and_finite(kind, gradients):
    layer = attention(kind, 7, shifted=True)
    x = torch.randn(2, 10, 10, 24)
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        large = layer(x * 1e4)
    expected = by_the_paper(layer, x, (10, 10))
    assert (out.double() - expected).norm() / expected.norm() < 0.03
    assert large.isfinite().all()
    if gradients:
        large.float().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_coordinates_are_the_papers():
    """Section 3.3: from a window of 8 to one of 16 the linear coordinates grow 1.14 times as far beyond, the log ones 0.33."""
    here = offset_coordinates("log_cpb", (8, 8), (8, 8), CPU)
    there = offset_coordinates("log_cpb", (18, 18), (7, 7), CPU)
    assert here.shape == (15, 15, 2)
    assert float(here.max()) == pytest.approx(math.log2(9) / 3)
    assert float(there.max()) == pytest.approx(math.log2(1 + 8 * 17 / 6) / 3)
    assert there.tolist()[0][-1] == pytest.approx([-float(there.max()), float(there.max())])
    assert there[17, 17].tolist() == [0, 0]
    linear = offset_coordinates("linear_cpb", (16, 16), (8, 8), CPU)
    assert linear[0, 15].tolist() == pytest.approx([-15 / 7, 0])
    assert float(linear.max()) - 1 == pytest.approx(1.14, abs=0.01)


def test_relative_positions_point_at_the_offset():
    positions = relative_positions((2, 3), CPU).view(6, 6)
    table = [(down, right) for down in (-1, 0, 1) for right in (-2, -1, 0, 1, 2)]
    assert table[positions[5, 0]] == (1, 2)  # cell (1, 2) from cell (0, 0)
    assert table[positions[1, 3]] == (-1, 1)
    assert all(table[positions[cell, cell]] == (0, 0) for cell in range(6))


def test_a_table_is_resized_with_its_edges_in_place():
    table = torch.randn(49, 2)  # window 4
    larger = resized_table(table, (4, 4), (7, 7)).view(13, 13, 2)
    small = table.view(7, 7, 2)
    torch.testing.assert_close(larger[::2, ::2], small)
    kept = Parameter(table)
    layer = attention(V1, 4, num_heads=2)
    layer.relative_position_bias_table = kept
    layer.set_window((7, 7))
    assert torch.equal(layer.relative_position_bias_table.view(13, 13, 2), larger)
