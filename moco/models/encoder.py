"""The encoder: backbone and heads. Letters: N batch, D feature width, C embedding width, H W pixels."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from moco.models.heads import Cells


class Encoded(NamedTuple):
    """What the loss needs of a batch of views."""

    embedding: Tensor
    """(N, C)."""
    cells: Cells | None = None
    """The same views cell by cell, where the encoder has a dense projector."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "Encoded":
        """`function` of every tensor."""
        return Encoded(function(self.embedding), self.cells and Cells(*map(function, self.cells)))


class Encoder(nn.Module):
    """A backbone and the projector on top of it: images (N, 3, H, W) to embeddings (N, C), not normalised.

    Args:
        dense_projector: makes `Cells` of the backbone's last map, beside the projector.
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module, dense_projector: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.dense_projector = dense_projector

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))

    def embed(self, images: Tensor) -> Encoded:
        """What the loss looks at, from one pass through the backbone; nothing is normalised."""
        if self.dense_projector is None:
            return Encoded(self(images))
        feature_map = self.backbone.feature_maps(images)[-1]  # type: ignore[operator]  # (N, D, cells, cells)
        return Encoded(self.projector(feature_map.mean(dim=(2, 3))), self.dense_projector(feature_map))

    def encode(self, images: Tensor, feature: str = "backbone") -> Tensor:
        """What evaluation looks at, not normalised.

        Args:
            images: (N, 3, H, W).
            feature: ``backbone`` for the backbone's feature (N, D), ``embedding`` for the projector's output (N, C).
        """
        return self.backbone(images) if feature == "backbone" else self(images)


def switch_off_stochastic_depth(module: nn.Module) -> None:
    """Let every picture go through every block, in training too, in place."""
    for layer in module.modules():
        if isinstance(layer, StochasticDepth):
            layer.p = 0.0
