"""The heads between features and embeddings.

Letters: N batch, D feature width, C embedding width, H W cells of a map, S cells of the dense grid.
"""

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
    """A projector or predictor: rows (N, input_dim) to rows (N, output_dim), not normalised.

    Linear layers with ReLU between them. The published ones:

    - MoCo v1 (arXiv 1911.05722): 1 layer; v2 (arXiv 2003.04297): 2 layers.
    - MoBY (arXiv 2105.04553): 2 layers, `hidden_dim` 4096, `hidden_batch_norm`.
    - MoCo v3 (arXiv 2104.02057): `hidden_dim` 4096, `hidden_batch_norm`, `last_batch_norm`, no `bias`; 3 layers for the
      projector of ViT, otherwise 2. The predictor of ResNet goes without `last_batch_norm`.

    Args:
        num_layers: linear layers; 0 is the identity.
        hidden_dim: width between the layers; None is `input_dim`, which gives v2's 2048 on ResNet-50.
        hidden_batch_norm: BatchNorm before every ReLU.
        last_batch_norm: BatchNorm without scale and shift at the end.
        bias: of the linear layers.
    """
    if num_layers == 0:
        return nn.Identity()
    hidden_dim = hidden_dim or input_dim
    widths = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
    layers: list[nn.Module] = []
    for number in range(num_layers):
        layers.append(nn.Linear(widths[number], widths[number + 1], bias=bias))
        if number < num_layers - 1:
            layers += [nn.BatchNorm1d(hidden_dim)] if hidden_batch_norm else []
            layers.append(nn.ReLU(inplace=True))
    layers += [nn.BatchNorm1d(output_dim, affine=False)] if last_batch_norm else []
    return nn.Sequential(*layers) if len(layers) > 1 else layers[0]


class Cells(NamedTuple):
    """A batch of views, cell by cell."""

    embeddings: Tensor
    """(N, S, C) dense embeddings."""
    pooled: Tensor
    """(N, C) the mean of a view's dense embeddings: what its key puts into the queue."""
    features: Tensor
    """(N, S, D) the backbone's features of the same cells, by which cells are matched; no gradient."""


class DenseProjector(nn.Module):
    """DenseCL's dense projection head (arXiv 2011.09157, section 3): two 1x1 convolutions with ReLU between them.

    It has no BatchNorm whatever the projector beside it has, as published.

    Args:
        feature_dim, embedding_dim: D and C.
        hidden_dim: width between the convolutions; None is `feature_dim`.
        grid: side of the grid that the map is pooled to, cells. A side of the map that is shorter stays as it is.
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
        """The cells of a map (N, D, H, W), not normalised."""
        feature_map = pooled_to_grid(feature_map, self.grid)  # (N, D, sqrt S, sqrt S)
        embeddings = self.layers(feature_map).flatten(2).transpose(1, 2)  # (N, S, C)
        return Cells(
            embeddings, embeddings.mean(dim=1), feature_map.detach().flatten(2).transpose(1, 2)
        )


def pooled_to_grid(feature_map: Tensor, grid: int) -> Tensor:
    """A map (N, D, H, W) averaged to (N, D, min(H, grid), min(W, grid))."""
    height, width = feature_map.shape[2:]
    if height <= grid and width <= grid:
        return feature_map
    return F.adaptive_avg_pool2d(feature_map, (min(height, grid), min(width, grid)))
