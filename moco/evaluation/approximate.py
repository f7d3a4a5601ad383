"""Indexes of faiss that save memory or time and pay with accuracy; `neighbors` is exact. Letters: M bank size, D width."""

from collections.abc import Iterator
from typing import Any

import faiss
import numpy as np

from moco.evaluation.neighbors import (
    BANK_BYTES,
    NOTHING,
    give_back,
    nearest,
    normalized,
    queries_at_once,
)

KINDS = ("float16", "int8", "ivf", "hnsw")
TRAINING_ROWS_PER_CELL = 64  # k-means of faiss takes at most 256 and warns below 39
LINKS = 32  # of each HNSW node
SAMPLE = 1000  # queries that the recall is measured on


class ApproximateIndex:
    """A bank in an index of faiss.

    Args:
        bank: (M, D), of any norm; may be mapped from a file.
        kind: ``float16`` and ``int8`` store each number in 2 and 1 bytes and compare all rows; ``ivf`` sorts the rows into
            cells by k-means and looks into those nearest to the query; ``hnsw`` walks a graph of neighbours.
        num_probes: cells of ``ivf`` that are looked into.
        ef_search: candidates that a walk through ``hnsw`` keeps.
    """

    def __init__(
        self, bank: np.ndarray, kind: str, num_probes: int = 32, ef_search: int = 256
    ) -> None:
        self.index: Any = empty_index(bank, kind)
        height = max(1, BANK_BYTES // (4 * bank.shape[1]))
        for first in range(0, len(bank), height):
            self.index.add(normalized(bank[first : first + height]))
            give_back(bank)
        if kind == "ivf":
            self.index.nprobe = num_probes
        if kind == "hnsw":
            self.index.hnsw.efSearch = ef_search

    def search(
        self, queries: np.ndarray, num_neighbors: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Similarities and rows (., k) of one block of queries after the other.

        Where cells hold fewer than k rows, the first row of the bank fills the list, as unlike as a number can say.
        """
        size = queries_at_once(num_neighbors, queries.shape[1])
        for start in range(0, len(queries), size):
            similarities, rows = self.index.search(
                normalized(queries[start : start + size]), num_neighbors
            )
            similarities[rows < 0] = NOTHING  # no weight in any vote
            yield similarities, np.maximum(rows, 0)


def empty_index(bank: np.ndarray, kind: str) -> Any:
    """The index without rows, trained if it needs that."""
    width = bank.shape[1]
    if kind == "hnsw":
        return faiss.IndexHNSWFlat(width, LINKS, faiss.METRIC_INNER_PRODUCT)
    if kind == "float16":
        return faiss.IndexScalarQuantizer(
            width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        )
    index: Any
    num_cells = max(1, min(round(4 * len(bank) ** 0.5), len(bank) // TRAINING_ROWS_PER_CELL))
    if kind == "int8":
        index = faiss.IndexScalarQuantizer(
            width, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
        )
        num_rows = 65_536
    else:
        index = faiss.IndexIVFFlat(
            faiss.IndexFlatIP(width), width, num_cells, faiss.METRIC_INNER_PRODUCT
        )
        num_rows = num_cells * TRAINING_ROWS_PER_CELL
    chosen = np.random.default_rng(0).permutation(len(bank))[:num_rows]
    index.train(normalized(bank[np.sort(chosen)]))
    return index


def recall(
    index: ApproximateIndex, bank: np.ndarray, queries: np.ndarray, num_neighbors: int
) -> float:
    """Share of the exact neighbours that the index finds, for a sample of the queries."""
    chosen = np.random.default_rng(0).permutation(len(queries))[:SAMPLE]
    sample = queries[np.sort(chosen)]
    _, exact = nearest(bank, sample, num_neighbors)
    found = np.concatenate(
        [
            np.where(similarities == NOTHING, -1, rows)
            for similarities, rows in index.search(sample, num_neighbors)
        ]
    )
    return float(
        np.mean([np.isin(one, other).mean() for one, other in zip(exact, found, strict=True)])
    )
