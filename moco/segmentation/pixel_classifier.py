"""A fine-tuned segmenter and the way in which it is applied to images of any size."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moco.data.augment.views import Normalized
from moco.data.sources.pixel_values import PixelValues
from moco.errors import RunError
from moco.models.pyramid import fill_up
from moco.models.timm_backbone import TimmBackbone
from moco.segmentation.averaged_views import mean_probabilities
from moco.segmentation.blended_windows import ScoredPart, blended_scores
from moco.segmentation.segmenter import Segmenter

LARGEST_FORWARD = 2**22
"""Pixels of one forward pass, if nobody says another number."""


@dataclass(frozen=True)
class Inference:
    """How the pixels of an image get their classes."""

    mode: str = "whole"
    """``whole``: an image as it is. ``slide``: overlapping windows."""
    window: int = 512
    """Side of the windows, px."""
    blend: bool = True
    """Windows fade towards their edges. Otherwise all their pixels count alike."""
    scales: tuple[float, ...] = (1.0,)
    """Factors of height and width, over which probabilities are averaged."""
    flip: bool = False
    """Average over the mirror image, too."""
    batch_size: int = 1
    """Images or windows of one size in a forward pass, at most."""
    max_forward_pixels: int = LARGEST_FORWARD
    """Pixels of a forward pass, if one window has less. A larger image is predicted by windows,
    whatever `mode` says."""

    @property
    def is_averaged(self) -> bool:
        """Whether several copies of an image are averaged."""
        return self.flip or self.scales != (1.0,)

    def is_by_windows(self, size: tuple[int, int]) -> bool:
        """Return whether an image of (height, width) px is divided into windows."""
        height, width = size
        return self.mode == "slide" or height * width > self.max_forward_pixels

    def num_at_once(self, height: int, width: int) -> int:
        """Return how many images or windows of a size are predicted together."""
        return max(1, min(self.batch_size, self.max_forward_pixels // (height * width)))


class PixelClassifier:
    """The scores of every class at every pixel.

    Scores are logits, or probabilities if copies of an image are averaged. Everything is computed
    in eval mode and float32, as `moco.segment` measures.

    Args:
        segmenter: it is moved to the device.
        values: how the images' pixels are made.
        how: see `Inference`.
        device: it computes there.

    Raises:
        InputError: mean and standard deviation of the model do not fit the bands of the images.
    """

    def __init__(
        self, segmenter: Segmenter, values: PixelValues, how: Inference, device: torch.device
    ) -> None:
        look = segmenter.hparams
        normalized = Normalized(look["mean"], look["std"], values.bands, values.is_float)
        self.scale = normalized.scale.to(device)
        self.shift = normalized.shift.to(device)
        self.segmenter = segmenter.to(device).eval()
        self.how = how
        self.device = device
        self.num_classes = segmenter.num_classes
        self.smallest_side = smallest_side(segmenter.model.backbone)

    @torch.no_grad()
    def scores(self, pixels: Tensor) -> Tensor:
        """Return the scores of images or windows, (N, classes, height, width), in one forward pass.

        Args:
            pixels: (N, bands, height, width), 8-bit or from 0 to 1.

        Raises:
            RunError: a score is not a number.
        """
        images = pixels.to(self.device) * self.scale - self.shift
        if self.how.is_averaged:
            scores = mean_probabilities(self._logits, images, self.how.scales, self.how.flip)
        else:
            scores = self._logits(images)
        if bool(scores.isnan().any()):
            raise RunError(
                "the scores are not finite; the checkpoint's weights are damaged, or too large"
            )
        return scores

    def parts(
        self, read: Callable[[int, int, int, int], Tensor], size: tuple[int, int]
    ) -> Iterator[ScoredPart]:
        """Yield the scores of one image of any size, in parts that cover every pixel once.

        Args:
            read: see `blended_scores`.
            size: (height, width), px.
        """
        height, width = size
        if not self.how.is_by_windows(size):
            yield ScoredPart(0, 0, self.scores(read(0, 0, height, width)[None])[0])
            return
        window = self.how.window
        num_at_once = self.how.num_at_once(min(window, height), min(window, width))
        yield from blended_scores(
            self.scores,
            read,
            size,
            self.num_classes,
            window,
            num_at_once=num_at_once,
            smooth=self.how.blend,
        )

    def probabilities(self, scores: Tensor) -> Tensor:
        """Return the probabilities that belong to scores (classes, height, width)."""
        if self.how.is_averaged:
            return scores
        return scores.softmax(dim=0)

    def _logits(self, images: Tensor) -> Tensor:
        """Return the logits of normalised images; very small ones are filled up first."""
        height, width = images.shape[-2:]
        images = fill_up(images, self.smallest_side, self.smallest_side)
        return self.segmenter.logits(images)[..., :height, :width]


def smallest_side(backbone: Any) -> int:
    """Return the least side of images for which a backbone has feature maps, px.

    It is a cell of the finest map. A network of timm may lack padding on coarser maps, so that it
    needs a cell of the coarsest one.
    """
    strides = backbone.feature_map_strides
    if isinstance(backbone, TimmBackbone):
        return int(max(strides))
    return int(strides[0])
