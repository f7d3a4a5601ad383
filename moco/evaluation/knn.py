"""Weighted k-nearest-neighbour classification of features, exact, on faiss.

The protocol of InstDisc (arXiv 1805.01978, section 3.4) that MoCo's authors monitor with: features are L2-normalised, the
k bank entries with the largest inner product vote for their class with weight exp(similarity / T).

Letters: M bank size, Q queries, D feature width, k neighbours.
"""

import logging
from dataclasses import dataclass

import faiss
import numpy as np

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KNNResult:
    """Accuracies are fractions of the queries; num_neighbors is k after capping."""

    top1: float
    top5: float
    num_neighbors: int
    bank_size: int
    num_queries: int


def normalized(features: np.ndarray) -> np.ndarray:
    """Rows scaled to unit L2 norm in float32; a zero row stays zero."""
    features = np.ascontiguousarray(features, dtype=np.float32)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(norms, 1e-12)


def nearest(bank: np.ndarray, queries: np.ndarray, num_neighbors: int) -> tuple[np.ndarray, np.ndarray]:
    """The bank rows most similar to each query: similarities (Q, k) in falling order and row numbers (Q, k).

    Args:
        bank: (M, D), unit norm.
        queries: (Q, D), unit norm.
        num_neighbors: k, at most M.
    """
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank)
    similarities, rows = index.search(queries, num_neighbors)
    return similarities, rows


def vote(similarities: np.ndarray, neighbor_classes: np.ndarray, num_classes: int, temperature: float) -> np.ndarray:
    """Each class's share of a query's votes up to a factor: (Q, num_classes), float64.

    Args:
        similarities: (Q, k) inner products.
        neighbor_classes: (Q, k), 0 to num_classes - 1.
        temperature: T of the weights exp(similarity / T).
    """
    # Relative to the best neighbour: the same ranking, and no overflow at any T.
    weights = np.exp((similarities - similarities.max(axis=1, keepdims=True)).astype(np.float64) / temperature)
    cells = np.arange(len(weights))[:, None] * num_classes + neighbor_classes
    return np.bincount(cells.ravel(), weights.ravel(), len(weights) * num_classes).reshape(-1, num_classes)


def knn_accuracy(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    query_labels: np.ndarray,
    num_neighbors: int,
    temperature: float,
) -> KNNResult:
    """Classify the queries by the bank.

    A class that only the queries have can never be right; one that only the bank has can win votes. Of classes with equal
    votes the smaller number ranks first.

    Args:
        bank: features (M, D), of any norm.
        bank_labels: (M,) class numbers, gaps allowed.
        queries: features (Q, D), of any norm.
        query_labels: (Q,) class numbers.
        num_neighbors: k; capped at M with a warning.
        temperature: T.
    """
    if num_neighbors > len(bank):
        log.warning("evaluation.num_neighbors=%d is more than the bank's %d; using those", num_neighbors, len(bank))
        num_neighbors = len(bank)
    classes, bank_classes = np.unique(bank_labels, return_inverse=True)
    similarities, rows = nearest(normalized(bank), normalized(queries), num_neighbors)
    scores = vote(similarities, bank_classes.reshape(-1)[rows], len(classes), temperature)
    ranked = classes[np.argsort(-scores, axis=1, kind="stable")[:, :5]]  # (Q, up to 5)
    hits = ranked == np.asarray(query_labels)[:, None]
    return KNNResult(float(hits[:, 0].mean()), float(hits.any(axis=1).mean()), num_neighbors, len(bank), len(queries))
