"""Weighted k-nearest-neighbour classification of features.

The protocol of InstDisc (arXiv 1805.01978, section 3.4) that MoCo's authors monitor with: features are L2-normalised, the
k bank entries with the largest inner product vote for their class with weight exp(similarity / T).

Letters: M bank size, Q queries, D feature width, k neighbours.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from moco.evaluation.neighbors import nearest_by_block

log = logging.getLogger(__name__)

SCORES = 2**22  # of query and class that are added up at once

Search = Callable[[np.ndarray, int], Iterable[tuple[np.ndarray, np.ndarray]]]
"""Of queries (Q, D) and k: similarities (., k) in falling order and rows (., k), of one block of queries after the other."""


class Protocol(NamedTuple):
    """What a kNN figure depends on beside the features."""

    num_neighbors: int
    """k."""
    temperature: float
    """T."""


@dataclass(frozen=True)
class KNNResult:
    """Accuracies are fractions of the queries; num_neighbors is k after capping."""

    top1: float
    top5: float | None
    """None with fewer than five neighbours, see `Votes.top`."""
    num_neighbors: int
    bank_size: int
    num_queries: int


class Votes(NamedTuple):
    """What a vote says of each query."""

    predicted: np.ndarray
    """(Q,) class numbers."""
    rank: np.ndarray
    """(Q,) int64: how many classes come before the query's own; of one that the bank lacks, all of them."""

    def accuracy(self, at: int) -> float:
        """Share of the queries whose own class is among the first `at`."""
        return float((self.rank < at).mean())

    def top(self, num_neighbors: int) -> dict[str, float]:
        """Return ``top1``, and ``top5`` if the votes are of at least five neighbours.

        Fewer can't name five classes: which of those without a vote would come fifth is not for the
        features to say.

        Args:
            num_neighbors: k of the vote.
        """
        shares = {"top1": self.accuracy(1)}
        if num_neighbors >= 5:
            shares["top5"] = self.accuracy(5)
        return shares


def vote(
    similarities: np.ndarray, neighbor_classes: np.ndarray, num_classes: int, temperature: float
) -> np.ndarray:
    """Each class's share of a query's votes up to a factor: (Q, num_classes), float64.

    Args:
        similarities: (Q, k) inner products in falling order.
        neighbor_classes: (Q, k), 0 to num_classes - 1.
        temperature: T of the weights exp(similarity / T).
    """
    # Relative to the best neighbour: the same ranking, and no overflow at any T.
    weights = np.exp((similarities - similarities[:, :1]).astype(np.float64) / temperature)
    return sums(weights, neighbor_classes, num_classes)


def sums(weights: np.ndarray, neighbor_classes: np.ndarray, num_classes: int) -> np.ndarray:
    """The weights (Q, k) added up by class: (Q, num_classes)."""
    cells = np.arange(len(weights))[:, None] * num_classes + neighbor_classes
    return np.bincount(cells.ravel(), weights.ravel(), len(weights) * num_classes).reshape(
        -1, num_classes
    )


def ranked(scores: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first class of each row (Q,), and how many come before its own (Q,); of equal scores the smaller class first.

    Args:
        scores: (Q, num_classes).
        own: (Q,); num_classes stands for one that is not among them.
    """
    num_classes = scores.shape[1]
    own_score = np.take_along_axis(scores, np.minimum(own, num_classes - 1)[:, None], axis=1)
    is_before = (scores > own_score) | (
        (scores == own_score) & (np.arange(num_classes) < own[:, None])
    )
    return scores.argmax(axis=1), np.where(
        own < num_classes, is_before.sum(axis=1), num_classes + 5
    )


def votes_of_block(
    similarities: np.ndarray,
    classes: np.ndarray,
    own: np.ndarray,
    num_classes: int,
    protocols: Sequence[Protocol],
) -> dict[Protocol, tuple[np.ndarray, np.ndarray]]:
    """`ranked` under every protocol; for each T the votes of a larger k go on from those of the smaller one.

    Args:
        similarities, classes: of the neighbours (Q, k), k the largest of the protocols.
        own: as of `ranked`.
    """
    found = {}
    for temperature in {protocol.temperature for protocol in protocols}:
        weights = np.exp((similarities - similarities[:, :1]).astype(np.float64) / temperature)
        scores, done = np.zeros((len(weights), num_classes)), 0
        for num_neighbors in sorted({k for k, other in protocols if other == temperature}):
            added = slice(done, num_neighbors)
            scores += sums(weights[:, added], classes[:, added], num_classes)
            found[Protocol(num_neighbors, temperature)] = ranked(scores, own)
            done = num_neighbors
    return found


def classify(
    search: Search,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    query_labels: np.ndarray,
    protocols: Sequence[Protocol],
    own_rows: np.ndarray | None = None,
) -> dict[Protocol, Votes]:
    """Classify the queries under several protocols by one search.

    A class that only the queries have can never be right; one that only the bank has can win votes. Of classes with equal
    votes the smaller number ranks first.

    Args:
        search: finds neighbours in the bank.
        bank_labels: (M,) class numbers, gaps allowed.
        queries: features (Q, D), of any norm.
        query_labels: (Q,) class numbers.
        own_rows: (Q,) each query's own row in the bank, which has no vote (leave-one-out); None: the queries are others.
    """
    names, bank_classes = np.unique(bank_labels, return_inverse=True)
    own = np.searchsorted(names, query_labels)
    own = np.where(names[np.minimum(own, len(names) - 1)] == query_labels, own, len(names))
    num_neighbors = max(k for k, _ in protocols)
    size = max(1, SCORES // max(len(names), num_neighbors))
    parts: dict[Protocol, list[tuple[np.ndarray, np.ndarray]]] = {
        protocol: [] for protocol in protocols
    }
    done = 0
    for similarities, rows in blocks_of(
        search(queries, num_neighbors + (own_rows is not None)), size
    ):
        block = slice(done, done + len(rows))
        done += len(rows)
        if own_rows is not None:
            similarities, rows = without_own(similarities, rows, own_rows[block])
        found = votes_of_block(similarities, bank_classes[rows], own[block], len(names), protocols)
        for protocol, votes in found.items():
            parts[protocol].append(votes)
    joined = {
        protocol: [np.concatenate(part) for part in zip(*found, strict=True)]
        for protocol, found in parts.items()
    }
    return {
        protocol: Votes(names[predicted], rank) for protocol, (predicted, rank) in joined.items()
    }


def blocks_of(
    found: Iterable[tuple[np.ndarray, np.ndarray]], size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Similarities and rows in pieces of at most `size` queries."""
    for similarities, rows in found:
        for start in range(0, len(rows), size):
            yield similarities[start : start + size], rows[start : start + size]


def without_own(
    similarities: np.ndarray, rows: np.ndarray, own_rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours (Q, k + 1) without the query itself: (Q, k); the last one goes where it is not among them."""
    is_own = rows == own_rows[:, None]
    # Only its first place: an index may fill a list with the bank's first row, again and again.
    place = np.where(is_own.any(axis=1), is_own.argmax(axis=1), rows.shape[1] - 1)
    kept = np.arange(rows.shape[1]) != place[:, None]
    shape = len(rows), rows.shape[1] - 1
    return similarities[kept].reshape(shape), rows[kept].reshape(shape)


def capped(num_neighbors: int, most: int) -> int:
    """k, at most `most`, with a warning."""
    if num_neighbors > most:
        log.warning(
            "evaluation.num_neighbors=%d is more than the bank's %d; using those",
            num_neighbors,
            most,
        )
    return min(num_neighbors, most)


def knn_accuracy(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    query_labels: np.ndarray,
    num_neighbors: int,
    temperature: float,
    device: torch.device | str = "cpu",
) -> KNNResult:
    """Classify the queries by the bank, see `classify`.

    Args:
        bank: features (M, D), of any norm.
        bank_labels: (M,) class numbers, gaps allowed.
        queries: features (Q, D), of any norm.
        query_labels: (Q,) class numbers.
        num_neighbors: k; capped at M with a warning.
        temperature: T.
        device: that searches.
    """
    protocol = Protocol(capped(num_neighbors, len(bank)), temperature)
    search = partial(nearest_by_block, bank, device=device)
    votes = classify(search, bank_labels, queries, query_labels, [protocol])[protocol]
    k = protocol.num_neighbors
    shares = votes.top(k)
    return KNNResult(shares["top1"], shares.get("top5"), k, len(bank), len(queries))


def scores_of(result: KNNResult) -> dict[str, float]:
    """Return a result's accuracies under the names of ``metrics.json``, those that there are."""
    scores = {"knn/top1": result.top1}
    if result.top5 is not None:
        scores["knn/top5"] = result.top5
    return scores


def protocol_figures(result: KNNResult, temperature: float, feature: str) -> dict[str, Any]:
    """Return the conditions of a kNN figure under the names of ``metrics.json``."""
    return {
        "knn/num_neighbors": result.num_neighbors,
        "knn/temperature": temperature,
        "knn/feature": feature,
        "knn/bank_size": result.bank_size,
        "knn/num_queries": result.num_queries,
    }
