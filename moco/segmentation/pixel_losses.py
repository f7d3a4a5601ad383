"""What a segmentation is trained to make small: losses by name, and weights of the classes.

N images, C classes. Logits are (N, C, height, width), classes are (N, height, width) numbers of
classes or `ignore_index`. Every loss leaves out the pixels without a class, and is 0 if there are
no others.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FOCAL_GAMMA = 2.0
"""The best of the focal loss's paper, arXiv 1708.02002, table 1b."""
ENET_OFFSET = 1.02
"""See `balanced_class_weights`."""


class SegmentationLoss(nn.Module):
    """A loss by its name, computed in float32 with any precision setting.

    - ``ce``: `pixel_cross_entropy`. ``focal``: `focal_loss`.
    - ``dice``: `dice_loss`. ``ce_dice``: the sum of the two, as in nnU-Net (arXiv 1809.10486).
    - ``lovasz``: `lovasz_loss`.

    Args:
        name: of the loss.
        ignore_index: the number of pixels that have no class.
        class_weights: a number above 0 for each class; None: all classes weigh alike.
    """

    class_weights: Tensor | None

    def __init__(
        self, name: str, ignore_index: int, class_weights: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        self.name = name
        self.ignore_index = ignore_index
        weights = None
        if class_weights is not None:
            weights = torch.tensor(class_weights, dtype=torch.float32)
        # The weights are settings. A checkpoint's tensors are those of the model alone.
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, logits: Tensor, classes: Tensor) -> Tensor:
        """Return the loss, a number."""
        with torch.autocast(logits.device.type, enabled=False):
            return self.of_float32(logits.float(), classes)

    def of_float32(self, logits: Tensor, classes: Tensor) -> Tensor:
        """Return the loss of logits in float32."""
        if self.name == "lovasz":
            return lovasz_loss(logits, classes, self.ignore_index)
        settings = (self.ignore_index, self.class_weights)
        if self.name == "ce":
            return pixel_cross_entropy(logits, classes, *settings)
        if self.name == "focal":
            return focal_loss(logits, classes, *settings)
        dice = dice_loss(logits, classes, *settings)
        if self.name == "dice":
            return dice
        assert self.name == "ce_dice", self.name  # the schema has no other
        return pixel_cross_entropy(logits, classes, *settings) + dice


def pixel_cross_entropy(
    logits: Tensor, classes: Tensor, ignore_index: int, class_weights: Tensor | None = None
) -> Tensor:
    """Return the mean cross-entropy of the pixels that have a class, in nats.

    With weights it is the weighted mean, where a pixel has the weight of its class.

    Args:
        logits, classes: see the module.
        class_weights: (C,), each above 0.
    """
    losses = cross_entropies(logits, classes, ignore_index)
    return mean_of_labelled(losses, classes, ignore_index, class_weights)


def focal_loss(
    logits: Tensor, classes: Tensor, ignore_index: int, class_weights: Tensor | None = None
) -> Tensor:
    """Return the mean of (1 - p)^2 x cross-entropy, p being the probability of the true class.

    Pixels that are right already count less (arXiv 1708.02002, equation 4, with softmax). Differs
    from segmentation_models_pytorch: its multiclass form is a sigmoid for each class, but what
    this model predicts is a softmax; and it is NaN if no pixel has a class.

    Args:
        logits, classes, class_weights: see `pixel_cross_entropy`.
    """
    losses = cross_entropies(logits, classes, ignore_index)
    wrong = -torch.expm1(-losses)  # 1 - p, exact for p near 1
    return mean_of_labelled(wrong**FOCAL_GAMMA * losses, classes, ignore_index, class_weights)


def dice_loss(
    logits: Tensor, classes: Tensor, ignore_index: int, class_weights: Tensor | None = None
) -> Tensor:
    """Return 1 - soft Dice, the mean over the classes that the batch holds.

    The soft Dice of a class is 2 sum(p t) / (sum(p) + sum(t)) over all pixels of the batch, p being
    its probability and t being 1 at its pixels (arXiv 1707.03237, equation 1 for each class).
    Differs from segmentation_models_pytorch, which computes it: its mean is over all classes, where
    those that the batch does not hold count as 0, so the loss would shrink with every rare class.

    Args:
        logits, classes: see the module.
        class_weights: (C,), each above 0, for a weighted mean.
    """
    from segmentation_models_pytorch.losses import DiceLoss  # an optional package

    num_classes = logits.shape[1]
    # Pixels without a class go to a place of their own.
    places = classes.masked_fill(classes == ignore_index, num_classes).flatten()
    is_there = torch.zeros(num_classes + 1, device=logits.device).scatter_(0, places, 1.0)
    weights = is_there[:num_classes]
    if class_weights is not None:
        weights = weights * class_weights
    # If no class is there, each has the loss 0, and any weights will do.
    weights = torch.where(weights.sum() > 0, weights, 1.0)
    loss: Tensor = DiceLoss("multiclass", ignore_index=ignore_index, class_weights=weights)(
        logits, classes
    )
    return loss


def lovasz_loss(logits: Tensor, classes: Tensor, ignore_index: int) -> Tensor:
    """Return the Lovasz-softmax loss, the mean over the classes that the batch holds.

    It is a convex surrogate of 1 - IoU over all pixels of the batch (arXiv 1705.08790), computed by
    segmentation_models_pytorch. Differs from it: without a pixel that has a class the loss is 0;
    there it is an empty tensor.

    Args:
        logits, classes: see the module.
    """
    from segmentation_models_pytorch.losses import LovaszLoss  # an optional package

    if not (classes != ignore_index).any():
        return logits.sum() * 0
    loss: Tensor = LovaszLoss("multiclass", ignore_index=ignore_index)(logits, classes)
    return loss


def cross_entropies(logits: Tensor, classes: Tensor, ignore_index: int) -> Tensor:
    """Return the cross-entropy of each pixel (N, height, width), 0 for a pixel without a class."""
    # The mean is taken elsewhere, because CUDA has no deterministic form of the loss that sums.
    return F.cross_entropy(logits, classes, ignore_index=ignore_index, reduction="none")


def mean_of_labelled(
    losses: Tensor, classes: Tensor, ignore_index: int, class_weights: Tensor | None
) -> Tensor:
    """Return the mean over the pixels that have a class; 0 if there are none.

    Args:
        losses: (N, height, width), 0 for a pixel without a class.
        classes: see the module.
        class_weights: (C,), of a pixel by its class; None: all pixels weigh alike.
    """
    is_labelled = classes != ignore_index
    if class_weights is None:
        return losses.sum() / is_labelled.sum().clamp(min=1)
    weights = class_weights[classes.masked_fill(~is_labelled, 0)] * is_labelled
    smallest = torch.finfo(weights.dtype).tiny
    return (losses * weights).sum() / weights.sum().clamp(min=smallest)


def balanced_class_weights(class_pixels: Sequence[int]) -> list[float]:
    """Return the weights of ``class_weights=auto``: 1 / ln(1.02 + p) for each class.

    p is the class's share of the labelled pixels in the training masks. The formula is ENet's
    (arXiv 1606.02147, section 5.2). A rare class weighs more, and never more than 50.5: inverse
    frequencies would have no such limit.

    Args:
        class_pixels: (C,) pixels of each class, without those that have no class.
    """
    total = sum(class_pixels)
    weights = []
    for number in class_pixels:
        share = number / total
        weights.append(1 / math.log(ENET_OFFSET + share))
    return weights
