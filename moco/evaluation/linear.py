"""Linear classification of frozen features: many heads trained side by side.

Each head has its own learning rate and weight decay. One matrix product serves all heads, as in
DINOv2's evaluation (arXiv 2304.07193, appendix B.3).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moco.evaluation.knn import turns_of_classes
from moco.phases import counted

# As in the official protocol.
SGD_MOMENTUM = 0.9
# Rows for which all heads compute logits at once.
ROWS_AT_ONCE = 1024


class Heads(NamedTuple):
    """Linear classifiers.

    The classes come first: a CPU computes the softmax of neighbouring heads at once, 8 times as
    fast as that of neighbouring classes.
    """

    weights: Tensor
    """(classes, heads, width)."""
    biases: Tensor
    """(classes, heads)."""

    def logits(self, features: Tensor) -> Tensor:
        """Return logits (batch, classes, heads) of features (batch, width)."""
        weights = self.weights.flatten(0, 1)
        flat = torch.addmm(self.biases.flatten(), features, weights.T)
        return flat.view(len(features), *self.biases.shape)


def held_out_rows(labels: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """Choose a random share of each class's rows, at least one row.

    Nothing is chosen of a class with a single row.

    Returns:
        (rows,) bool.
    """
    order = generator.permutation(len(labels))
    _, own, counts = np.unique(labels, return_inverse=True, return_counts=True)
    # At least one row of each class is left to train on.
    wanted = np.clip(np.round(share * counts), 1, counts - 1)
    is_held_out = np.empty(len(labels), bool)
    is_held_out[order] = turns_of_classes(labels[order]) < wanted[own[order]]
    return is_held_out


def train_heads(
    features: Tensor,
    classes: Tensor,
    num_classes: int,
    lrs: Sequence[float],
    weight_decays: Sequence[float],
    *,
    num_epochs: int,
    batch_size: int,
    seed: int = 0,
) -> Heads:
    """Train multinomial logistic regression by SGD with momentum 0.9 from zero.

    The learning rate falls to 0 along a cosine. All heads see the same batches. Weight decay is a
    term of the gradient, as in torch.optim.SGD, and does not apply to the biases.

    Args:
        features: (rows, width) float32, standardised, on the device that computes.
        classes: (rows,) int64 from 0 to num_classes - 1, on that device.
        num_classes: number of classes.
        lrs: (heads,) learning rates of the first step.
        weight_decays: (heads,).
        num_epochs: passes through the features.
        batch_size: rows per step; the last batch of an epoch may be smaller.
        seed: of the order of the rows.
    """
    num_heads = len(lrs)
    lr = features.new_tensor(lrs).repeat(num_classes)  # (classes * heads,)
    decay = features.new_tensor(weight_decays).repeat(num_classes)[:, None]
    weights = features.new_zeros(num_classes * num_heads, features.shape[1])
    biases = features.new_zeros(num_classes * num_heads)
    # Views of the same memory.
    heads = Heads(weights.view(num_classes, num_heads, -1), biases.view(num_classes, num_heads))
    weight_steps, bias_steps = torch.zeros_like(weights), torch.zeros_like(biases)
    generator = torch.Generator().manual_seed(seed)
    num_steps = num_epochs * math.ceil(len(features) / batch_size)
    step = 0
    for _ in counted(range(num_epochs), "linear classifiers", num_epochs, "epochs"):
        order = torch.randperm(len(features), generator=generator).to(features.device)
        for rows in order.split(batch_size):
            batch = features[rows]
            # The gradient has a closed form, so autograd is not needed.
            gradient = logit_gradient(heads.logits(batch), classes[rows])
            # As torch.optim.SGD does: momentum gathers the gradient together with the decay.
            weight_steps.mul_(SGD_MOMENTUM).addmm_(gradient.T, batch).addcmul_(decay, weights)
            bias_steps.mul_(SGD_MOMENTUM).add_(gradient.sum(0))
            current_lr = lr * (0.5 + 0.5 * math.cos(math.pi * step / num_steps))
            weights.addcmul_(current_lr[:, None], weight_steps, value=-1)
            biases.addcmul_(current_lr, bias_steps, value=-1)
            step += 1
    return heads


def logit_gradient(logits: Tensor, classes: Tensor) -> Tensor:
    """Return the gradient of each head's mean cross-entropy by its logits.

    It is (softmax - one-hot) / batch.

    Args:
        logits: (batch, classes, heads).
        classes: (batch,).

    Returns:
        (batch, classes * heads).
    """
    gradient = logits.softmax(dim=1)
    gradient[torch.arange(len(gradient), device=gradient.device), classes] -= 1
    return gradient.flatten(1).div_(len(logits))


def accuracies(heads: Heads, features: Tensor, classes: Tensor) -> np.ndarray:
    """Return the top-1 accuracy (heads,) on features (rows, width).

    The accuracy of a head whose weights are not finite is 0.
    """
    num_right = torch.zeros(heads.biases.shape[1], dtype=torch.int64, device=features.device)
    blocks = zip(features.split(ROWS_AT_ONCE), classes.split(ROWS_AT_ONCE), strict=True)
    for block, own in blocks:
        is_right = heads.logits(block).argmax(dim=1) == own[:, None]
        num_right += is_right.sum(0)
    is_finite = heads.weights.isfinite().all(2).all(0) & heads.biases.isfinite().all(0)
    return num_right.where(is_finite, 0).cpu().numpy() / len(features)
