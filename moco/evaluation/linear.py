"""Linear classification of frozen features: many heads trained side by side.

Each has its own learning rate and weight decay, and one matrix product serves them all, as in DINOv2's
evaluation (arXiv 2304.07193, appendix B.3).

Letters: M rows, N batch, D feature width, G heads, C classes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SGD_MOMENTUM = 0.9
BLOCK = 1024  # rows that all heads look at at once


class Heads(NamedTuple):
    """Linear classifiers. Classes come first: a CPU takes the softmax of G neighbours at once, 8 times as fast as of C."""

    weights: Tensor
    """(C, G, D)."""
    biases: Tensor
    """(C, G)."""

    def logits(self, features: Tensor) -> Tensor:
        """Of features (N, D): (N, C, G)."""
        flat = torch.addmm(self.biases.flatten(), features, self.weights.flatten(0, 1).T)
        return flat.view(len(features), *self.biases.shape)


class Scale(NamedTuple):
    """What makes every dimension of some features zero on average, with standard deviation 1."""

    mean: np.ndarray
    """(D,)."""
    std: np.ndarray
    """(D,); 1 where the dimension is constant."""

    def applied(self, features: np.ndarray) -> np.ndarray:
        """(M, D) float32."""
        return ((features - self.mean) / self.std).astype(np.float32)


def scale_of(features: np.ndarray) -> Scale:
    """Of features (M, D), in float64."""
    mean, std = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
    is_constant = std <= 1e-6 * np.abs(mean)  # what rounding leaves of equal float32 numbers
    return Scale(mean, np.where(is_constant, 1.0, std))


def held_out_rows(labels: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """(M,) bool: a random share of each class's rows, at least one, but none of a class with only one."""
    order = generator.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    wanted = np.clip(np.round(share * counts), 1, counts - 1)
    place = np.arange(len(labels)) - np.repeat(starts, counts)
    is_held_out = np.empty(len(labels), bool)
    is_held_out[order] = place < np.repeat(wanted, counts)
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
    """Multinomial logistic regression by SGD with momentum 0.9 from zero, the learning rate falling to 0 along a cosine.

    All heads see the same batches. Weight decay is a term of the gradient, as in torch.optim.SGD, and spares the biases.

    Args:
        features: (M, D) float32, standardised, on the device that computes.
        classes: (M,) int64 from 0 to num_classes - 1, on that device.
        lrs, weight_decays: (G,) each, of the heads.
        batch_size: N; the last batch of an epoch may be smaller.
        seed: of the batches.
    """
    shape = num_classes, len(lrs)
    lr = features.new_tensor(lrs).repeat(num_classes)  # (C * G,)
    decay = features.new_tensor(weight_decays).repeat(num_classes)[:, None]
    weights, biases = (
        features.new_zeros(math.prod(shape), features.shape[1]),
        features.new_zeros(math.prod(shape)),
    )
    weight_steps, bias_steps = torch.zeros_like(weights), torch.zeros_like(biases)
    generator = torch.Generator().manual_seed(seed)
    num_steps, step = num_epochs * math.ceil(len(features) / batch_size), 0
    for _ in range(num_epochs):
        for rows in (
            torch.randperm(len(features), generator=generator).to(features.device).split(batch_size)
        ):
            batch = features[rows]
            errors = errors_of(
                torch.addmm(biases, batch, weights.T).view(-1, *shape), classes[rows]
            )  # (N, C * G)
            weight_steps.mul_(SGD_MOMENTUM).addmm_(errors.T, batch).addcmul_(decay, weights)
            bias_steps.mul_(SGD_MOMENTUM).add_(errors.sum(0))
            now = lr * (0.5 + 0.5 * math.cos(math.pi * step / num_steps))
            weights.addcmul_(now[:, None], weight_steps, value=-1)
            biases.addcmul_(now, bias_steps, value=-1)
            step += 1
    return Heads(weights.view(*shape, -1), biases.view(shape))


def errors_of(logits: Tensor, classes: Tensor) -> Tensor:
    """The gradient of each head's mean cross-entropy by its logits (N, C, G): (softmax - one-hot) / N, (N, C * G)."""
    shares = logits.softmax(dim=1)
    shares[torch.arange(len(shares), device=shares.device), classes] -= 1
    return shares.flatten(1).div_(len(logits))


def accuracies(heads: Heads, features: Tensor, classes: Tensor) -> np.ndarray:
    """Top-1 of each head (G,) on features (M, D); that of a head whose weights are not finite is 0."""
    right = torch.zeros(heads.biases.shape[1], dtype=torch.int64, device=features.device)
    for part, own in zip(features.split(BLOCK), classes.split(BLOCK), strict=True):
        right += (heads.logits(part).argmax(dim=1) == own[:, None]).sum(0)
    is_finite = heads.weights.isfinite().all(2).all(0) & heads.biases.isfinite().all(0)
    return right.where(is_finite, 0).cpu().numpy() / len(features)
