"""Signs of a collapse in embeddings: the thresholds, and the warning in words."""

import math
from collections.abc import Sequence
from typing import NamedTuple

LEAST_STD = 0.07
"""Smallest standard deviation of a healthy run, as a share of that of spread-out embeddings.

Spread-out embeddings have 1 / sqrt(embedding_dim). Runs that learned were lowest soon after their
start: at 0.08 for a moment (MoBY on CIFAR-10) or at 0.1 for some 60 steps (a small ResNet on
digits), mostly at 0.18 to 0.4. Collapsed runs stay at 0.001 to 0.05.
"""

LEAST_RANK = 0.05
"""Smallest effective rank of a healthy run, as a share of the largest possible one. The quickstart
has 0.25 to 0.5; with a key momentum of 0 it collapses and has 0.03."""

CAUSES = (
    "Usual causes: fewer than some hundred steps of training, learning rate too high, key momentum "
    "too low, augmentation that erases the image."
)

COLLAPSED = "COLLAPSED"
DIMENSIONAL_COLLAPSE = "DIMENSIONAL COLLAPSE"

EARLY_STEPS = 100
"""Before so many optimizer steps, embeddings that look collapsed say little: see `LEAST_STD`. In a
run of 24 steps on 510 photographs, `moco.evaluate` found an effective rank of 9 of 256."""


class Collapse(NamedTuple):
    """A collapse that embeddings show."""

    name: str
    """`COLLAPSED` or `DIMENSIONAL_COLLAPSE`."""
    sign: str
    """What is seen, with its figures."""
    consequence: str
    """What becomes of the features."""

    def in_words(self) -> str:
        """Return the sign, the consequence and the usual causes."""
        return f"{self.sign}. {self.consequence} {CAUSES}"


def collapse_of(std: float, effective_rank: float, shape: Sequence[int]) -> Collapse | None:
    """Return the collapse that embeddings show; None for healthy ones.

    A few rows say nothing about dimensions: below 20 there is no dimensional collapse.

    Args:
        std: `embedding_std` of embeddings.
        effective_rank: their `rank_me`.
        shape: (rows, embedding_dim) of the embeddings that the rank was computed from.
    """
    spread_out = 1 / math.sqrt(shape[1])
    if std < LEAST_STD * spread_out:
        return Collapse(
            COLLAPSED,
            f"all embeddings are nearly the same (standard deviation {std:.5f}, spread out it "
            f"would be {spread_out:.5f})",
            "The features will be useless.",
        )
    highest = min(shape)
    if highest >= 1 / LEAST_RANK and effective_rank < LEAST_RANK * highest:
        return Collapse(
            DIMENSIONAL_COLLAPSE,
            "the embeddings differ in few dimensions only "
            f"(effective rank {effective_rank:.1f} of {highest})",
            "The features will be poor.",
        )
    return None
