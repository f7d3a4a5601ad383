"""The encoder: a backbone with its heads."""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from moco.models.contract import feature_and_maps
from moco.models.heads import Cells
from moco.models.pyramid import PyramidDecoder

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Encoded(NamedTuple):
    """What the loss needs of a batch of views."""

    embedding: Tensor
    """(N, C)."""
    cells: Cells | None = None
    """The same views cell by cell, if the encoder has a dense projector."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "Encoded":
        """Return the same with `function` applied to every tensor."""
        embedding = function(self.embedding)
        if self.cells is None:
            return Encoded(embedding)
        return Encoded(embedding, self.cells.map(function))


class Encoder(nn.Module):
    """A backbone and a projector: images (N, B, H, W) to embeddings (N, C), not normalised.

    Args:
        backbone: images to features (N, D), see `moco.models.backbones`.
        projector: features (N, D) to embeddings (N, C).
        dense_projector: makes `Cells` from the backbone's last feature map (N, D, H, W).
        decoder: makes the map for the dense projector from all feature maps, in place of the last
            one.
    """

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        dense_projector: nn.Module | None = None,
        decoder: PyramidDecoder | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.dense_projector = dense_projector
        self.decoder = decoder

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))

    def embed(self, views: Sequence[Tensor], *, has_cells: bool = True) -> list[Encoded]:
        """Return what the loss needs of each view (N, B, H, W), not normalised.

        The views go through each part as `per_view` says.

        Args:
            has_cells: return the cells too, if there is a dense projector.
        """
        if self.is_called_whole:
            return [Encoded(embedding) for embedding in per_view(self, views)]
        if self.dense_projector is None or not has_cells:
            embeddings = per_view(self.projector, per_view(self.backbone, views))
            return [Encoded(embedding) for embedding in embeddings]
        outputs = per_view(self.backbone, views, self.feature_and_map)
        features, maps = zip(*outputs, strict=True)
        embeddings = per_view(self.projector, features)
        cells = [Cells(*parts) for parts in per_view(self.dense_projector, maps)]
        return list(map(Encoded, embeddings, cells))

    @cached_property
    def is_called_whole(self) -> bool:
        """Whether backbone and projector take the views alike, and there is no other head.

        They do not if only the projector has BatchNorm.
        """
        if self.dense_projector is not None:
            return False
        return has_batch_norm(self.backbone) == has_batch_norm(self)

    def compile_training(self, options: dict[str, Any]) -> None:
        """Let `embed` run by torch.compile: as a whole if it `is_called_whole`, else part by part.

        Each size of batches is compiled by itself. The names of the weights stay.

        Args:
            options: of torch.compile.
        """
        if self.is_called_whole:
            self.compile(dynamic=False, options=options)
            return
        for part in (self.backbone, self.projector, self.dense_projector):
            if part is not None:
                part.compile(dynamic=False, options=options)
        compiled = torch.compile(self.feature_and_map, dynamic=False, options=options)
        self.feature_and_map = compiled  # type: ignore[method-assign]

    def feature_and_map(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the feature (N, D), and the map of which the dense projector makes cells.

        It is the last feature map, or what the decoder makes of all of them. The decoder has no
        BatchNorm, so all views may go through it together.
        """
        feature, maps = feature_and_maps(self.backbone, images)
        if self.decoder is not None:
            return feature, self.decoder(maps)
        return feature, maps[-1]

    def encode(self, images: Tensor, feature: str = "backbone") -> Tensor:
        """Return what an evaluation looks at, not normalised.

        Args:
            images: (N, B, H, W).
            feature: ``backbone`` for the backbone's feature (N, D), ``embedding`` for the
                projector's output (N, C).
        """
        # `forward`, not a call: compiled code is for the batch sizes of the training alone.
        features = self.backbone.forward(images)
        if feature == "backbone":
            return features
        return self.projector.forward(features)


def disable_stochastic_depth(module: nn.Module) -> None:
    """Let every image go through every block, in training too."""
    for layer in module.modules():
        if isinstance(layer, StochasticDepth):
            layer.p = 0.0
        elif type(layer).__name__ == "DropPath":  # timm's stochastic depth
            layer.drop_prob = 0.0  # type: ignore[assignment]


def per_view(
    module: nn.Module, views: Sequence[Tensor], forward: Callable[[Tensor], Any] | None = None
) -> list[Any]:
    """Return a module's output for each view.

    All views go through the module in one pass, unless it has BatchNorm. BatchNorm would normalise
    one view with the other's statistics, so it sees each view by itself, as in the published
    methods.

    Args:
        module: tells whether there is BatchNorm.
        views: (N, ...) each.
        forward: what is called, a method of `module` that returns a tensor or a tuple of tensors.
            None calls the module itself.
    """
    forward = forward or module
    if len(views) == 1 or has_batch_norm(module):
        return [forward(view) for view in views]
    output = forward(torch.cat(list(views)))
    if isinstance(output, Tensor):
        return list(output.chunk(len(views)))
    chunks = [part.chunk(len(views)) for part in output]
    return list(zip(*chunks, strict=True))


def has_batch_norm(module: nn.Module) -> bool:
    """Return whether any layer normalises over the batch."""
    return any(isinstance(layer, BATCH_NORMS) for layer in module.modules())


def is_channels_last(weights: Iterable[Tensor]) -> bool:
    """Return whether the weights of convolutions have their channels innermost in memory."""
    for weight in weights:
        if weight.dim() != 4 or weight.is_contiguous():  # 1x1 convolutions are both
            continue
        if weight.is_contiguous(memory_format=torch.channels_last):
            return True
    return False
