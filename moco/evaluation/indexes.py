"""Indexes of faiss by name: ``flat``, or a string of ``faiss.index_factory`` such as ``HNSW32``."""

from collections.abc import Callable
from typing import Any

import numpy as np

from moco.errors import InputError
from moco.evaluation.neighbors import BANK_BYTES, NOTHING, joined, nearest, normalized, search_index
from moco.phases import phase

# Our name of the exact search; faiss calls such an index ``Flat``.
EXACT = "flat"
TRAINING_ROWS = 65_536
# k-means of faiss uses at most 256 rows for each cell and warns below 39.
TRAINING_ROWS_PER_CELL = 64
# Cells of an IVF index that a search looks into; faiss's own number is 1.
NUM_PROBES = 32
# Candidates that a search in an HNSW graph keeps; faiss's own number is 16.
EF_SEARCH = 256
# Queries by which the recall is measured.
SAMPLE_SIZE = 1_000


def empty_index(name: str, width: int, key: str) -> Any:
    """Return a faiss index without rows, for inner products.

    Args:
        name: `EXACT`, or a string of ``faiss.index_factory``.
        width: of the features.
        key: the setting, for the message.

    Raises:
        InputError: faiss has no such index for this width.
    """
    import faiss

    if name == EXACT:
        return faiss.IndexFlatIP(width)
    try:
        return faiss.index_factory(width, name, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        # faiss puts the names of its functions and files before the reason.
        reason = str(error).rsplit(": ", 1)[-1]
        raise InputError(
            f"{key}={name}: faiss has no such index for features of width {width} ({reason}); "
            "expected flat, which is exact, or a string of faiss.index_factory "
            "such as HNSW32 or 'IVF1024,Flat'"
        ) from error


def build_index(
    bank: np.ndarray,
    name: str,
    key: str,
    num_probes: int = NUM_PROBES,
    ef_search: int = EF_SEARCH,
) -> Any:
    """Return a faiss index of the normalised bank, which is added in blocks.

    Args:
        bank: (bank size, width) features of any norm; may be mapped from a file.
        name, key: see `empty_index`.
        num_probes: cells of an IVF index that are searched.
        ef_search: candidates that a search in an HNSW graph keeps.

    Raises:
        InputError: faiss has no such index, or the bank is too small for it.
    """
    import faiss

    index = empty_index(name, bank.shape[1], key)
    try:
        with phase(f"building the index {name}", len(bank), "rows") as say:
            _fill(index, bank, say)
    except RuntimeError as error:
        reason = str(error).rsplit(": ", 1)[-1]
        raise InputError(
            f"{key}={name}: faiss cannot build this index of {len(bank):,} rows ({reason}); "
            "choose another index"
        ) from error
    parameters = faiss.ParameterSpace()
    if "IVF" in name:
        parameters.set_index_parameter(index, "nprobe", num_probes)
    if "HNSW" in name:
        parameters.set_index_parameter(index, "efSearch", ef_search)
    return index


def _fill(index: Any, bank: np.ndarray, say: Callable[[int], None]) -> None:
    """Train an index if it needs that, and add all rows to it, normalised."""
    import faiss

    if not index.is_trained:
        # k-means needs rows for each of its cells, others a sample of a fixed size.
        num_rows = TRAINING_ROWS
        cells = faiss.try_extract_index_ivf(index)
        if cells is not None:
            num_rows = max(num_rows, TRAINING_ROWS_PER_CELL * cells.nlist)
        chosen = np.random.default_rng(0).permutation(len(bank))[:num_rows]
        index.train(normalized(bank[np.sort(chosen)]))
    block_size = max(1, BANK_BYTES // (4 * bank.shape[1]))
    for start in range(0, len(bank), block_size):
        index.add(normalized(bank[start : start + block_size]))
        say(min(start + block_size, len(bank)))


def recall(index: Any, bank: np.ndarray, queries: np.ndarray, num_neighbors: int) -> float:
    """Return the share of the exact neighbours that the index finds for a sample of queries."""
    chosen = np.random.default_rng(0).permutation(len(queries))[:SAMPLE_SIZE]
    sample = queries[np.sort(chosen)]
    with phase("measuring the index", unit=""):
        _, exact_rows = nearest(bank, sample, num_neighbors)
        similarities, found_rows = joined(search_index(index, sample, num_neighbors))
    found_rows[similarities == NOTHING] = -1
    num_found = 0
    for exact, found in zip(exact_rows, found_rows, strict=True):
        num_found += np.isin(exact, found).sum()
    return float(num_found / exact_rows.size)
