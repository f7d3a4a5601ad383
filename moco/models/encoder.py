"""The encoder: backbone and projector. Letters: N batch, D feature width, C embedding width, H W pixels."""

from torch import Tensor, nn


def build_projector(head: str, feature_dim: int, embedding_dim: int, hidden_dim: int | None = None) -> nn.Module:
    """The head that maps features (N, D) to embeddings (N, C), not normalised.

    Args:
        head: ``linear`` is MoCo v1's (arXiv 1911.05722); ``mlp`` is v2's linear-ReLU-linear (arXiv 2003.04297).
        hidden_dim: width inside the mlp; None is `feature_dim`, which gives v2's 2048 on ResNet-50.
    """
    if head == "linear":
        return nn.Linear(feature_dim, embedding_dim)
    hidden_dim = hidden_dim or feature_dim
    return nn.Sequential(
        nn.Linear(feature_dim, hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, embedding_dim)
    )


class Encoder(nn.Module):
    """A backbone and the projector on top of it: images (N, 3, H, W) to embeddings (N, C), not normalised."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))

    def encode(self, images: Tensor, feature: str = "backbone") -> Tensor:
        """What evaluation looks at, not normalised.

        Args:
            images: (N, 3, H, W).
            feature: ``backbone`` for the backbone's feature (N, D), ``embedding`` for the projector's output (N, C).
        """
        return self.backbone(images) if feature == "backbone" else self(images)
