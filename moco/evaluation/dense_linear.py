"""A linear head on frozen features of patches: multinomial logistic regression. Arrays in, numbers out.

On a feature map it is a 1x1 convolution. Letters: M patches of the bank, Q patches, D feature width, C classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moco.evaluation.dense_bank import Bank

WEIGHT_DECAYS = (1e-1, 1e-2, 1e-3, 1e-4)  # of standardised features
USUAL = 1e-2  # where there are too few images to choose by
FOLDS = 5
ITERATIONS = 100


@dataclass(frozen=True)
class LinearHead:
    """Logits of patches."""

    weight: np.ndarray
    """(C, D) float32."""
    bias: np.ndarray
    """(C,) float32."""

    def scores(self, queries: np.ndarray) -> np.ndarray:
        """Features (Q, D) to logits (Q, C)."""
        return queries @ self.weight.T + self.bias


def fit(features: Tensor, shares: Tensor, weights: Tensor, weight_decay: float) -> LinearHead:
    """Minimise the weighted mean cross entropy plus half the weight decay times the squared norm, by L-BFGS.

    The norm is that of the weights of standardised features; the bias goes free.

    Args:
        features: (M, D) float32.
        shares: (M, C), what the softmax is to be: the classes of a patch.
        weights: (M,) of the patches; 0 leaves one out.
    """
    std, mean = torch.std_mean(features, dim=0, correction=0)
    std = std.where(std > 0, 1.0)
    weight = torch.zeros(
        shares.shape[1], features.shape[1], device=features.device, requires_grad=True
    )
    bias = torch.zeros(shares.shape[1], device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe"
    )

    def unstandardised() -> tuple[Tensor, Tensor]:
        """Weight and bias for features as they are: a standardised copy of them would double the memory."""
        scaled = weight / std
        return scaled, bias - scaled @ mean

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = (
            cross_entropy(features, shares, weights, *unstandardised())
            + weight_decay / 2 * weight.square().sum()
        )
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    final = [part.detach().cpu().numpy() for part in unstandardised()]
    return LinearHead(*final)


def cross_entropy(
    features: Tensor, shares: Tensor, weights: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """Weighted mean over patches, in nats."""
    losses = F.cross_entropy(features @ weight.T + bias, shares, reduction="none")
    return (losses * weights).sum() / weights.sum()


def fit_best(bank: Bank, device: torch.device | str = "cpu") -> tuple[LinearHead, float]:
    """The head of the weight decay that suits every fifth image best when the others are learned from, then fit to all.

    With fewer than five images the weight decay is `USUAL`.

    Returns:
        Head and weight decay.
    """
    arrays = (bank.features, bank.shares, bank.weights)
    features, shares, weights = (torch.from_numpy(array).to(device) for array in arrays)
    images = np.unique(bank.images, return_inverse=True)[1]
    if images.max() + 1 < FOLDS:
        return fit(features, shares, weights, USUAL), USUAL
    held_out = torch.from_numpy(images % FOLDS == FOLDS - 1).to(device)

    def loss(weight_decay: float) -> float:
        head = fit(features, shares, weights * ~held_out, weight_decay)
        parts = (torch.from_numpy(part).to(device) for part in (head.weight, head.bias))
        return float(cross_entropy(features, shares, weights * held_out, *parts))

    weight_decay = min(WEIGHT_DECAYS, key=loss)
    return fit(features, shares, weights, weight_decay), weight_decay
