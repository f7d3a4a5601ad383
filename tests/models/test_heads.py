"""The heads: published layers, the dense projector, and what an encoder makes of them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth

from moco.methods.batch_norm import split_batch_norm
from moco.models.encoder import Encoder, disable_stochastic_depth
from moco.models.heads import DenseProjector, build_head, pooled_to_grid

WIDE = {"hidden_dim": 4096, "hidden_batch_norm": True}
PUBLISHED = {
    "MoCo v1": ((2048, 128, {"num_layers": 1}), "Linear"),
    "MoCo v2": ((2048, 128, {"num_layers": 2}), "Linear ReLU Linear"),
    "MoBY projector": ((768, 256, {"num_layers": 2, **WIDE}), "Linear BatchNorm1d ReLU Linear"),
    "MoBY predictor": ((256, 256, {"num_layers": 2, **WIDE}), "Linear BatchNorm1d ReLU Linear"),
    "MoCo v3 ViT projector": (
        (384, 256, {"num_layers": 3, **WIDE, "last_batch_norm": True, "bias": False}),
        "Linear BatchNorm1d ReLU Linear BatchNorm1d ReLU Linear BatchNorm1d",
    ),
    "no predictor": ((256, 256, {"num_layers": 0}), "Identity"),
}
SHAPES = {
    "MoCo v1": [(128, 2048), (128,)],
    "MoCo v2": [(2048, 2048), (2048,), (128, 2048), (128,)],
    "MoBY projector": [(4096, 768), (4096,), (4096,), (4096,), (256, 4096), (256,)],
    "MoBY predictor": [(4096, 256), (4096,), (4096,), (4096,), (256, 4096), (256,)],
    "MoCo v3 ViT projector": [
        (4096, 384),
        (4096,),
        (4096,),
        (4096, 4096),
        (4096,),
        (4096,),
        (256, 4096),
    ],
    "no predictor": [],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_heads_have_the_published_layers(name):
    (input_dim, output_dim, settings), layers = PUBLISHED[name]
    with torch.device("meta"):
        head = build_head(input_dim, output_dim, **settings)
    assert (
        " ".join(
            type(layer).__name__ for layer in head.modules() if not isinstance(layer, nn.Sequential)
        )
        == layers
    )
    assert [tuple(parameter.shape) for parameter in head.parameters()] == SHAPES[name]


def test_a_head_with_batch_norm_computes_what_is_published():
    head = build_head(8, 4, num_layers=2, hidden_dim=16, hidden_batch_norm=True)
    rows = torch.randn(32, 8)
    hidden = rows @ head[0].weight.T + head[0].bias
    hidden = (hidden - hidden.mean(dim=0)) / (hidden.var(dim=0, correction=0) + 1e-5).sqrt()
    expected = hidden.clamp(min=0) @ head[3].weight.T + head[3].bias
    torch.testing.assert_close(head(rows), expected, rtol=1e-4, atol=1e-5)


def test_split_heads_equal_separate_heads_on_every_nth_row():
    head = build_head(
        8, 4, num_layers=3, hidden_dim=16, hidden_batch_norm=True, last_batch_norm=True, bias=False
    )
    separate = [copy.deepcopy(head) for _ in range(4)]
    split_batch_norm(head, 4)
    rows = torch.randn(32, 8)
    expected = torch.empty(32, 4)
    for number, other in enumerate(separate):
        expected[number::4] = other(rows[number::4])
    output = head(rows)
    torch.testing.assert_close(output, expected)
    weights = torch.randn_like(output)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    for number, parameter in enumerate(head.parameters()):
        gradients = [list(other.parameters())[number].grad for other in separate]
        torch.testing.assert_close(parameter.grad, sum(gradients), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(7, 7), (14, 14), (12, 9), (2, 2), (10, 3)])
def test_maps_are_averaged_to_the_grid_and_smaller_ones_stay(height, width):
    feature_map = torch.randn(2, 3, height, width)
    rows, columns = min(height, 7), min(width, 7)
    expected = torch.empty(2, 3, rows, columns)
    for i in range(rows):
        for j in range(columns):
            top, bottom = i * height // rows, -(-(i + 1) * height // rows)
            left, right = j * width // columns, -(-(j + 1) * width // columns)
            expected[:, :, i, j] = feature_map[:, :, top:bottom, left:right].mean(dim=(2, 3))
    torch.testing.assert_close(pooled_to_grid(feature_map, 7), expected)


def test_dense_projector_is_the_same_mlp_at_every_cell():
    projector = DenseProjector(6, 4, hidden_dim=5, grid=2)
    feature_map = torch.randn(3, 6, 4, 4, requires_grad=True)
    cells = projector(feature_map)
    assert (cells.embeddings.shape, cells.pooled.shape, cells.features.shape) == (
        (3, 4, 4),
        (3, 4),
        (3, 4, 6),
    )
    first, second = (
        nn.utils.skip_init(nn.Linear, *sizes).requires_grad_(False) for sizes in ((6, 5), (5, 4))
    )
    for linear, convolution in ((first, projector.layers[0]), (second, projector.layers[2])):
        linear.load_state_dict({"weight": convolution.weight[:, :, 0, 0], "bias": convolution.bias})
    for number in range(4):
        row, column = divmod(number, 2)
        patch = feature_map[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean(
            dim=(2, 3)
        )
        torch.testing.assert_close(cells.features[:, number], patch)
        torch.testing.assert_close(cells.embeddings[:, number], second(F.relu(first(patch))))
    torch.testing.assert_close(cells.pooled, cells.embeddings.mean(dim=1))
    assert cells.embeddings.requires_grad
    assert not cells.features.requires_grad


def test_dense_projector_is_as_wide_as_its_input_by_default():
    assert DenseProjector(6, 4).layers[0].out_channels == 6


def test_stochastic_depth_is_switched_off_in_training_too():
    block = nn.Sequential(
        nn.Sequential(StochasticDepth(0.5, "row")), StochasticDepth(0.3, "batch")
    ).train()
    rows = torch.ones(64, 2)
    assert not torch.equal(block(rows), rows)
    disable_stochastic_depth(block)
    assert torch.equal(block(rows), rows)


def test_encoder_hands_out_feature_or_embedding():
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
    encoder = Encoder(backbone, build_head(8, 4, num_layers=1))
    images = torch.randn(5, 3, 2, 2)
    assert torch.equal(encoder.encode(images, "backbone"), backbone(images))
    assert torch.equal(encoder.encode(images, "embedding"), encoder(images))
    (encoded,) = encoder.embed([images])
    assert torch.equal(encoded.embedding, encoder(images))
    assert encoded.cells is None
