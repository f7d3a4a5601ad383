"""The encoder: backbone and heads. Letters: N batch, D feature width, C embedding width, H W pixels."""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
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

    def __init__(
        self, backbone: nn.Module, projector: nn.Module, dense_projector: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.dense_projector = dense_projector

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))

    def embed(self, views: Sequence[Tensor]) -> list[Encoded]:
        """What the loss looks at in each view (N, 3, H, W), from one pass through the backbone where `per_view` can.

        Nothing is normalised.
        """
        if self.is_called_whole:
            return [Encoded(embedding) for embedding in per_view(self, views)]
        if self.dense_projector is None:
            return [
                Encoded(embedding)
                for embedding in per_view(self.projector, per_view(self.backbone, views))
            ]
        features, maps = zip(
            *per_view(self.backbone, views, self.feature_and_last_map), strict=True
        )
        cells = per_view(self.dense_projector, maps)
        return [
            Encoded(*both)
            for both in zip(
                per_view(self.projector, features), map(Cells._make, cells), strict=True
            )
        ]

    @cached_property
    def is_called_whole(self) -> bool:
        """Whether backbone and projector take the views alike: no other head, and no BatchNorm in the projector alone."""
        return self.dense_projector is None and has_batch_norm(self.backbone) == has_batch_norm(
            self
        )

    def compile_training(self, options: dict[str, Any]) -> None:
        """Let `embed` run by torch.compile, for one shape of batches: as a whole if it `is_called_whole`, else part by part.

        Names of weights stay.

        Args:
            options: of the compiler.
        """
        if self.is_called_whole:
            self.compile(dynamic=False, options=options)
            return
        for part in (self.backbone, self.projector, self.dense_projector):
            if part is not None:
                part.compile(dynamic=False, options=options)
        maps = torch.compile(self.feature_and_last_map, dynamic=False, options=options)
        self.feature_and_last_map = maps  # type: ignore[method-assign]

    def feature_and_last_map(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) and (N, D, H / stride, W / stride)."""
        feature, maps = self.backbone.feature_and_maps(images)  # type: ignore[operator]
        return feature, maps[-1]

    def encode(self, images: Tensor, feature: str = "backbone") -> Tensor:
        """What evaluation looks at, not normalised.

        Args:
            images: (N, 3, H, W).
            feature: ``backbone`` for the backbone's feature (N, D), ``embedding`` for the projector's output (N, C).
        """
        # By forward: its batches have other sizes, and what is compiled is for those of the training.
        features = self.backbone.forward(images)
        return features if feature == "backbone" else self.projector.forward(features)


def switch_off_stochastic_depth(module: nn.Module) -> None:
    """Let every image go through every block, in training too, in place."""
    for layer in module.modules():
        if isinstance(layer, StochasticDepth):
            layer.p = 0.0


def per_view(
    module: nn.Module, views: Sequence[Tensor], forward: Callable[[Tensor], Any] | None = None
) -> list[Any]:
    """What a module makes of each view: in one pass of all views, unless it has BatchNorm.

    BatchNorm would normalise one view with the other's statistics: the published methods let it see each view by itself.

    Args:
        views: (N, ...) each.
        forward: the method of `module` that is called, giving a tensor or a tuple of tensors; None: `module` itself.
    """
    forward = forward or module
    if len(views) == 1 or has_batch_norm(module):
        return [forward(view) for view in views]
    output = forward(torch.cat(list(views)))
    if isinstance(output, Tensor):
        return list(output.chunk(len(views)))
    return list(zip(*(part.chunk(len(views)) for part in output), strict=True))


def has_batch_norm(module: nn.Module) -> bool:
    """Whether any layer normalises over the batch."""
    return any(isinstance(layer, _BatchNorm) for layer in module.modules())


def is_channels_last(weights: Iterable[Tensor]) -> bool:
    """Whether those of convolutions lie in memory with the channels innermost."""
    four = [weight for weight in weights if weight.dim() == 4]
    # Those of 1x1 are contiguous either way.
    return any(
        w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in four
    )
