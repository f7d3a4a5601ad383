"""Search for the rows of a bank that are most similar to a query.

The similarity is the inner product of unit vectors, the cosine. faiss searches on the CPU, torch
on a GPU.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

# Bank rows that are searched at once. They are copied twice, to normalise them and by faiss, so
# this bounds the memory that a search needs beside the bank.
BANK_BYTES = 2**28
# Neighbours that are kept at once, their similarities and rows.
RESULT_BYTES = 2**27
# Similarities that a GPU computes at once.
PRODUCT_BYTES = 2**28
# The similarity in a place of a list that nothing fills. It has no weight in any vote.
NOTHING = np.finfo(np.float32).min
# Rows that are found beyond the k nearest, to see which rows are as similar as the last of them.
NUM_BEYOND = 8
# The largest result of such a search. Where all features are equal, it would be the whole bank.
BEYOND_BYTES = 2**27

Neighbors = tuple[np.ndarray, np.ndarray]
"""Similarities (queries, k) float32 in falling order, and rows of the bank (queries, k) int64."""


def normalized(features: np.ndarray) -> np.ndarray:
    """Return a float32 copy with rows of unit L2 norm; a zero row stays zero."""
    features = np.array(features, dtype=np.float32, order="C", subok=False)
    rows = torch.from_numpy(features)  # torch uses all threads here, NumPy only one
    rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_(min=1e-12)
    return features


def nearest(
    bank: np.ndarray, queries: np.ndarray, num_neighbors: int, device: torch.device | str = "cpu"
) -> Neighbors:
    """Return the bank rows that are most similar to each query.

    Equally similar rows come in the order of the bank, and of the rows that are as similar as the
    last neighbour the first ones are included. So the nearest k of a search for more are these k.
    Only if so many rows are equally similar that their list would exceed `BEYOND_BYTES`, faiss or
    torch chooses among them.

    Args:
        bank: (bank size, width) features of any norm; may be mapped from a file (`np.memmap`).
        queries: (queries, width) features of any norm.
        num_neighbors: k, at most the bank size.
        device: where to search.
    """
    return joined(nearest_by_block(bank, queries, num_neighbors, device))


def joined(blocks: Iterable[Neighbors]) -> Neighbors:
    """Return the neighbours of all blocks of queries together."""
    similarities, rows = zip(*blocks, strict=True)
    return np.concatenate(similarities), np.concatenate(rows)


def nearest_by_block(
    bank: np.ndarray, queries: np.ndarray, num_neighbors: int, device: torch.device | str = "cpu"
) -> Iterator[Neighbors]:
    """Yield what `nearest` returns, for one block of queries after the other."""
    for block in query_blocks(queries, num_neighbors):
        yield search_bank(bank, block, num_neighbors, torch.device(device))


def search_index(index: Any, queries: np.ndarray, num_neighbors: int) -> Iterator[Neighbors]:
    """Yield the neighbours that a faiss index finds, for one block of queries after the other.

    An approximate index may find fewer than k rows. Row 0 with the similarity `NOTHING` fills such
    a list.
    """
    for block in query_blocks(queries, num_neighbors):
        yield search_with_faiss(index, block, num_neighbors)


def query_blocks(queries: np.ndarray, num_neighbors: int) -> Iterator[np.ndarray]:
    """Yield normalised blocks of queries whose features and neighbours fit the memory limits."""
    bytes_per_neighbor = 4 + 8  # a float32 similarity and an int64 row
    by_result = RESULT_BYTES // (bytes_per_neighbor * num_neighbors)
    by_features = BANK_BYTES // (4 * queries.shape[1])
    block_size = max(1, min(by_result, by_features))
    for start in range(0, len(queries), block_size):
        yield normalized(queries[start : start + block_size])


def search_bank(
    bank: np.ndarray, queries: np.ndarray, num_neighbors: int, device: torch.device
) -> Neighbors:
    """Search normalised queries in the bank, one block of its rows after the other."""
    import faiss

    # A block holds at least k rows, so that the first one fills the lists.
    block_size = max(num_neighbors, BANK_BYTES // (4 * bank.shape[1]))
    best: Neighbors | None = None
    for start in range(0, len(bank), block_size):
        block = normalized(bank[start : start + block_size])
        block_neighbors = min(num_neighbors, len(block))
        if device.type == "cpu":
            index = faiss.IndexFlatIP(bank.shape[1])
            index.add(block)
            search = partial(search_with_faiss, index, queries)
        else:
            search = partial(search_with_torch, block, queries, device=device)
        found = first_of_equal(search, block_neighbors, len(block))
        found = found[0], found[1] + start
        best = found if best is None else merge(best, found, num_neighbors)
    assert best is not None
    return best


def first_of_equal(
    search: Callable[[int], Neighbors], num_neighbors: int, num_rows: int
) -> Neighbors:
    """Return the k nearest rows; of equally similar ones those that come first in the bank.

    Args:
        search: returns so many neighbours. Of rows as similar as the last one, any may be there.
        num_neighbors: k.
        num_rows: of the bank.
    """
    num_searched = min(num_rows, num_neighbors + NUM_BEYOND)
    while True:
        similarities, rows = search(num_searched)
        is_decided = similarities[:, -1] < similarities[:, num_neighbors - 1]
        is_too_large = 2 * similarities.nbytes + 2 * rows.nbytes > BEYOND_BYTES
        if num_searched == num_rows or is_too_large or is_decided.all():
            return similarities[:, :num_neighbors], rows[:, :num_neighbors]
        num_searched = min(num_rows, 2 * num_searched)


def search_with_faiss(index: Any, queries: np.ndarray, num_neighbors: int) -> Neighbors:
    """Search normalised queries in an index, with as many threads as torch uses."""
    # faiss is imported where it is used: training without kNN does not need it.
    import faiss

    # faiss brings an OpenMP library of its own, which does not know of torch's number of threads.
    faiss.omp_set_num_threads(torch.get_num_threads())
    similarities, rows = index.search(queries, num_neighbors)
    # faiss marks the places that it cannot fill by row -1.
    is_missing = rows < 0
    similarities[is_missing] = NOTHING
    rows[is_missing] = 0
    return with_ties_in_order(similarities, rows)


def search_with_torch(
    bank: np.ndarray, queries: np.ndarray, num_neighbors: int, device: torch.device
) -> Neighbors:
    """Search normalised queries in a normalised bank by matrix products and top-k on the device."""
    bank_on_device = torch.from_numpy(bank).to(device)
    blocks = []
    block_size = max(1, PRODUCT_BYTES // (4 * len(bank)))
    for block in torch.from_numpy(queries).split(block_size):
        products = block.to(device) @ bank_on_device.T  # (block, bank size)
        products.nan_to_num_(nan=NOTHING)  # top-k would take NaN for the largest number
        top = products.topk(num_neighbors, dim=1)
        blocks.append((top.values.cpu().numpy(), top.indices.cpu().numpy()))
    return with_ties_in_order(*joined(blocks))


def with_ties_in_order(similarities: np.ndarray, rows: np.ndarray) -> Neighbors:
    """Sort equally similar neighbours by their row, so that no search decides on their order."""
    # Few queries have ties, so only these are sorted.
    is_tied = (similarities[:, 1:] == similarities[:, :-1]).any(axis=1)
    tied_rows = rows[is_tied]
    order = np.lexsort((tied_rows, -similarities[is_tied]))
    rows[is_tied] = np.take_along_axis(tied_rows, order, axis=1)
    return similarities, rows


def merge(first: Neighbors, second: Neighbors, num_neighbors: int) -> Neighbors:
    """Return the most similar neighbours of two lists; equal ones of the first list come first."""
    similarities = np.hstack([first[0], second[0]])
    rows = np.hstack([first[1], second[1]])
    # A stable sort keeps equally similar rows in the order of the bank.
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :num_neighbors]
    best = np.take_along_axis(similarities, order, axis=1)
    return best, np.take_along_axis(rows, order, axis=1)
