"""The heads between features and embeddings: projectors, predictors and the dense projector."""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


def build_head(
    input_dim: int,
    output_dim: int,
    *,
    num_layers: int = 2,
    hidden_dim: int | None = None,
    hidden_batch_norm: bool = False,
    last_batch_norm: bool = False,
    bias: bool = True,
) -> nn.Module:
    """Build a projector or predictor: rows (N, input_dim) to rows (N, output_dim), not normalised.

    It has linear layers with ReLU between them. The published heads are:

    - MoCo v1 (arXiv 1911.05722): 1 layer. MoCo v2 (arXiv 2003.04297): 2 layers.
    - MoBY (arXiv 2105.04553): 2 layers, `hidden_dim` 4096, `hidden_batch_norm`.
    - MoCo v3 (arXiv 2104.02057): `hidden_dim` 4096, `hidden_batch_norm`, `last_batch_norm`, no
      `bias`; 3 layers for the projector of ViT, otherwise 2. The predictor of ResNet has no
      `last_batch_norm`.

    Args:
        input_dim: width of the input.
        output_dim: width of the output.
        num_layers: linear layers; 0 is the identity.
        hidden_dim: width between the layers; None is `input_dim`, which is v2's 2048 on ResNet-50.
        hidden_batch_norm: BatchNorm before every ReLU.
        last_batch_norm: BatchNorm without scale and shift at the end.
        bias: whether the linear layers have one.
    """
    if num_layers == 0:
        return nn.Identity()
    hidden_dim = hidden_dim or input_dim
    layers: list[nn.Module] = []
    width = input_dim
    for _ in range(num_layers - 1):
        layers.append(nn.Linear(width, hidden_dim, bias=bias))
        if hidden_batch_norm:
            layers.append(nn.BatchNorm1d(hidden_dim))
        layers.append(nn.ReLU(inplace=True))
        width = hidden_dim
    layers.append(nn.Linear(width, output_dim, bias=bias))
    if last_batch_norm:
        layers.append(nn.BatchNorm1d(output_dim, affine=False))
    if len(layers) == 1:
        return layers[0]  # checkpoints of MoCo v1 name it without a number
    return nn.Sequential(*layers)


class Cells(NamedTuple):
    """A batch of views, cell by cell."""

    embeddings: Tensor
    """(N, S, C) dense embeddings of the S cells."""
    pooled: Tensor
    """(N, C) the mean of a view's dense embeddings: what its key puts into the queue."""
    features: Tensor
    """(N, S, D) the backbone's features of the same cells, which match them; no gradient."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "Cells":
        """Return the same with `function` applied to every tensor."""
        return Cells(*map(function, self))


class DenseProjector(nn.Module):
    """DenseCL's dense projection head: two 1x1 convolutions with ReLU between them.

    It has no BatchNorm, whatever the projector beside it has, as published.

    Args:
        feature_dim: D, channels of the feature map.
        embedding_dim: C.
        hidden_dim: width between the convolutions; None is `feature_dim`.
        grid: side of the grid that the map is pooled to, cells. A shorter side of a map stays.

    Source: arXiv 2011.09157, section 3.
    """

    def __init__(
        self, feature_dim: int, embedding_dim: int, hidden_dim: int | None = None, grid: int = 7
    ) -> None:
        super().__init__()
        hidden_dim = hidden_dim or feature_dim
        self.grid = grid
        self.layers = nn.Sequential(
            nn.Conv2d(feature_dim, hidden_dim, kernel_size=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden_dim, embedding_dim, kernel_size=1),
        )

    def forward(self, feature_map: Tensor) -> Cells:
        """Return the cells of a feature map (N, D, H, W), not normalised."""
        feature_map = pooled_to_grid(feature_map, self.grid)
        embeddings = self.layers(feature_map).flatten(2).transpose(1, 2)  # (N, S, C)
        features = feature_map.detach().flatten(2).transpose(1, 2)  # (N, S, D)
        return Cells(embeddings, embeddings.mean(dim=1), features)


def pooled_to_grid(feature_map: Tensor, grid: int) -> Tensor:
    """Return a map (N, D, H, W) averaged to (N, D, min(H, grid), min(W, grid))."""
    height, width = feature_map.shape[2:]
    if height <= grid and width <= grid:
        return feature_map
    return F.adaptive_avg_pool2d(feature_map, (min(height, grid), min(width, grid)))
