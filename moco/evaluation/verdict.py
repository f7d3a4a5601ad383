"""Whether a run learns, in words: figures in, a verdict out."""

from collections.abc import Sequence
from typing import NamedTuple


class Look(NamedTuple):
    """The figures of a part of a run, such as a tenth."""

    step: int
    loss: float
    loss_of_chance: float
    contrast_top1: float
    contrast_top1_of_chance: float
    embedding_std: float
    rank: float
    num_keys: int
    embedding_dim: int
    knn_top1: float | None


class Baselines(NamedTuple):
    untrained: float | None
    start: float | None
    num_queries: int | None


class Verdict(NamedTuple):
    word: str
    reasons: Sequence[str]

    def __str__(self):
        return f"{self.word}: {'; '.join(self.reasons)}"


def judge(looks, baselines):
    look = looks[-1]
    return Verdict("raw", [f"{look}"])
