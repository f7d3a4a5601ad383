"""A linear head on frozen features of patches: multinomial logistic regression.

On a feature map it is a 1x1 convolution.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moco.evaluation.dense_bank import Bank

WEIGHT_DECAYS = (1e-1, 1e-2, 1e-3, 1e-4)  # the choices, for standardised features
DEFAULT_WEIGHT_DECAY = 1e-2  # where there are too few images to choose by
NUM_FOLDS = 5
MAX_ITERATIONS = 100


@dataclass(frozen=True)
class LinearHead:
    """Computes logits of patches."""

    weight: Tensor
    """(classes, feature width) float32."""
    bias: Tensor
    """(classes,) float32."""

    def logits(self, features: Tensor) -> Tensor:
        """Return logits (M, classes) of features (M, feature width)."""
        return features @ self.weight.T + self.bias

    def scores(self, queries: np.ndarray) -> np.ndarray:
        """Return the same for arrays."""
        return self.logits(torch.from_numpy(queries).to(self.weight.device)).cpu().numpy()


def fit(features: Tensor, shares: Tensor, weights: Tensor, weight_decay: float) -> LinearHead:
    """Fit a linear head to M patches by L-BFGS.

    It minimises the weighted mean cross-entropy plus half the weight decay times the squared norm
    of the weights for standardised features. The bias has no weight decay.

    Args:
        features: (M, feature width) float32.
        shares: (M, classes) the target of the softmax: each class's share of a patch.
        weights: (M,) of the patches; 0 excludes a patch.
    """
    num_classes, width = shares.shape[1], features.shape[1]
    std, mean = torch.std_mean(features, dim=0, correction=0)
    std = std.where(std > 0, 1.0)  # a constant dimension stays 0
    weight = torch.zeros(num_classes, width, device=features.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe"
    )

    def head() -> LinearHead:
        # For the raw features. A standardised copy of them would double the memory.
        raw_weight = weight / std
        return LinearHead(raw_weight, bias - raw_weight @ mean)

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(head(), features, shares, weights)
        loss = loss + weight_decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    with torch.no_grad():
        return head()


def cross_entropy(head: LinearHead, features: Tensor, shares: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean over patches, in nats.

    Args:
        features, shares, weights: see `fit`.
    """
    losses = F.cross_entropy(head.logits(features), shares, reduction="none")
    return (losses * weights).sum() / weights.sum()


def fit_best(bank: Bank, device: torch.device | str = "cpu") -> tuple[LinearHead, float]:
    """Choose a weight decay and fit a head to the whole bank with it.

    A head is fitted to four fifths of the bank's images with each weight decay. The one with the
    smallest loss on the other images is chosen. With fewer than five images it is
    `DEFAULT_WEIGHT_DECAY`.

    Returns:
        The head and the weight decay.
    """
    features = torch.from_numpy(bank.features).to(device)
    shares = torch.from_numpy(bank.shares).to(device)
    weights = torch.from_numpy(bank.weights).to(device)
    image_names, images = np.unique(bank.images, return_inverse=True)
    if len(image_names) < NUM_FOLDS:
        return fit(features, shares, weights, DEFAULT_WEIGHT_DECAY), DEFAULT_WEIGHT_DECAY
    # Whole images are held out, because patches of one image are alike.
    held_out = torch.from_numpy(images % NUM_FOLDS == NUM_FOLDS - 1).to(device)
    losses = {}
    for weight_decay in WEIGHT_DECAYS:
        head = fit(features, shares, weights * ~held_out, weight_decay)
        losses[weight_decay] = float(cross_entropy(head, features, shares, weights * held_out))
    best = min(WEIGHT_DECAYS, key=losses.__getitem__)
    return fit(features, shares, weights, best), best
