"""Exact search for nearest neighbours by inner product, in blocks: matrix products, on the CPU or a GPU.

The answer has one definition. Similarities are float32 inner products of unit vectors; a query's neighbours are the rows
with the largest, in falling order, and of equal ones the smaller row comes first.

The large array of a search is the product of queries and bank, and reading it costs as much as making it. So it is read
once, for the maxima of groups of 16 rows: k groups have maxima of at least the k-th largest one, which is therefore a
floor of the k-th largest similarity, and only groups that reach it are looked into. Compared with top-k of the whole product
that is exact as well, and several times as fast on a CPU.

Letters: M bank size, Q queries, D feature width, k neighbours, N queries of a block, B bank rows of a block.
"""

import mmap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

GROUP = 16
BANK_BYTES = 2**27  # of bank rows that are normalised at once
PRODUCT_BYTES = 2**25  # of similarities that one thread makes at once
NOTHING = np.finfo(np.float32).min  # the similarity of a place in a list that nothing fills: of features that are NaN
MANY = 4  # times as many groups as neighbours reach the floor only where similarities are equal
LIST_BYTES = 2**26  # of neighbours, their similarities and places, that are kept while the bank is walked over


def normalized(features: np.ndarray) -> np.ndarray:
    """Rows scaled to unit L2 norm in float32, as a copy; a zero row stays zero."""
    features = np.array(features, dtype=np.float32, order="C", subok=False)
    norms = np.sqrt(np.einsum("md,md->m", features, features))[:, None]
    features /= np.maximum(norms, 1e-12)
    return features


def nearest(
    bank: np.ndarray, queries: np.ndarray, num_neighbors: int, device: torch.device | str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """The bank rows most similar to each query: similarities (Q, k) in falling order and row numbers (Q, k).

    Args:
        bank: (M, D), of any norm; may be mapped from a file (`np.memmap`).
        queries: (Q, D), of any norm.
        num_neighbors: k, at most M.
    """
    blocks = list(nearest_by_block(bank, queries, num_neighbors, device))
    similarities, rows = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    return similarities, rows


def nearest_by_block(
    bank: np.ndarray, queries: np.ndarray, num_neighbors: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`nearest` of one block of queries after the other, so that memory does not grow with their number."""
    size = queries_at_once(num_neighbors, queries.shape[1])
    for start in range(0, len(queries), size):
        yield walk(bank, normalized(queries[start : start + size]), num_neighbors, torch.device(device))


def queries_at_once(num_neighbors: int, width: int) -> int:
    """So many that neither their lists of neighbours nor their features (., D) take more than a block may."""
    return max(1, min(LIST_BYTES // (12 * num_neighbors), BANK_BYTES // (4 * width)))


def walk(
    bank: np.ndarray, queries: np.ndarray, num_neighbors: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """`nearest` of queries of unit norm, by one walk over the bank."""
    similarities = np.full((len(queries), num_neighbors), NOTHING, np.float32)
    rows = np.zeros((len(queries), num_neighbors), np.int64)
    on_device = torch.from_numpy(queries).to(device)
    height = max(num_neighbors, BANK_BYTES // (4 * bank.shape[1]))
    for first in range(0, len(bank), height):
        block = torch.from_numpy(normalized(bank[first : first + height])).to(device)
        give_back(bank)
        width = max(1, PRODUCT_BYTES // (4 * len(block)))
        room = threading.local()  # new memory costs half as much as the product that is written to it

        def improve(
            start: int,
            block: Tensor = block,
            first: int = first,
            width: int = width,
            room: threading.local = room,
        ) -> None:
            part = slice(start, start + width)
            if not hasattr(room, "product"):
                shape = min(width, len(queries)), GROUP * -(-len(block) // GROUP)
                room.product = on_device.new_full(shape, -torch.inf)
            found = candidates(on_device[part], block, similarities[part, -1], num_neighbors, room.product)
            merge(similarities[part], rows[part], *found, first)

        side_by_side(improve, range(0, len(queries), width), device)
    return similarities, rows


def candidates(
    queries: Tensor, block: Tensor, worst: np.ndarray, num_neighbors: int, product: Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of query and row of the block that may be among the query's k nearest.

    Args:
        queries: (N, D).
        block: (B, D).
        worst: (N,) similarity of the last neighbour found so far; a later row has to surpass it.
        product: room for the similarities, (N or more, B or more), a multiple of GROUP wide; minus infinity beyond B.

    Returns:
        Which query, rising; which row; and their similarity.
    """
    num_groups = product.shape[1] // GROUP
    torch.mm(queries, block.T, out=product[: len(queries), : len(block)])
    groups = product[: len(queries)].view(len(queries), GROUP, num_groups)
    maxima = groups.amax(dim=1)  # (N, groups)
    floor = torch.from_numpy(np.nextafter(worst, np.float32(np.inf))).to(queries.device)
    if num_groups >= num_neighbors:
        floor = torch.maximum(floor, kth_largest(maxima, num_neighbors))
    reaches = maxima >= floor[:, None]
    if int(reaches.sum()) > MANY * len(queries) * num_neighbors:
        return of_many_ties(product[: len(queries), : len(block)], floor, num_neighbors)
    query, group = places(reaches)
    members = groups[query, :, group]  # (groups that reach the floor, GROUP)
    reached, member = places(members >= floor[query, None])
    found = query[reached], member * num_groups + group[reached], members[reached, member]
    return tuple(values.cpu().numpy() for values in found)  # type: ignore[return-value]


def of_many_ties(product: Tensor, floor: Tensor, num_neighbors: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`candidates` where most rows are as near as the k-th, as with features that have collapsed.

    Of those as near as the floor only the first k rows of each query can be among its neighbours.
    """
    above = places(product > floor[:, None])
    query, row = places(product == floor[:, None])
    counts = torch.bincount(query, minlength=len(product))
    first = torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts)[query] < num_neighbors
    query, row = torch.cat([above[0], query[first]]), torch.cat([above[1], row[first]])
    order = query.argsort(stable=True)
    found = query[order], row[order], product[query[order], row[order]]
    return tuple(values.cpu().numpy() for values in found)  # type: ignore[return-value]


def places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of what is true in a matrix, rows rising."""
    if mask.device.type == "cpu":  # two to three times as fast as torch's
        rows, columns = np.divmod(np.flatnonzero(mask.numpy()), mask.shape[1])
        return torch.from_numpy(rows), torch.from_numpy(columns)
    row, column = mask.nonzero(as_tuple=True)
    return row, column


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest of each row, (N,)."""
    if values.device.type == "cpu":  # NumPy's selection is vectorised: six times as fast as torch's
        place = values.shape[1] - k
        return torch.from_numpy(np.partition(values.numpy(), place, axis=1)[:, place])
    return values.topk(k, dim=1).values[:, -1]


def merge(
    similarities: np.ndarray, rows: np.ndarray, query: np.ndarray, row: np.ndarray, similarity: np.ndarray, first: int
) -> None:
    """Put candidates into the lists (N, k) of neighbours, in place.

    Args:
        query, row, similarity: see `candidates`.
        first: row of the bank at which the block begins.
    """
    num_neighbors = similarities.shape[1]
    counts = np.bincount(query, minlength=len(similarities))
    place = np.arange(len(query)) - (np.cumsum(counts) - counts)[query]
    values = np.full((len(similarities), counts.max(initial=0)), -np.inf, np.float32)
    numbers = np.zeros(values.shape, np.int64)
    values[query, place] = similarity
    numbers[query, place] = row + first
    values, numbers = np.hstack([similarities, values]), np.hstack([rows, numbers])
    order = falling(values, numbers, num_neighbors)
    similarities[:] = np.take_along_axis(values, order, axis=1)
    rows[:] = np.take_along_axis(numbers, order, axis=1)


def falling(values: np.ndarray, numbers: np.ndarray, num_first: int) -> np.ndarray:
    """Where the `num_first` largest values of each row are, in falling order, of equal ones by rising numbers."""
    order = np.argsort(-values, axis=1)
    ordered = np.take_along_axis(values, order[:, : num_first + 1], axis=1)
    tied = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    for row in tied.nonzero()[0]:
        order[row] = np.lexsort((numbers[row], -values[row]))
    return order[:, :num_first]


def give_back(bank: np.ndarray) -> None:
    """Let the pages of a mapped file go, which count as this process's memory until something else needs the room."""
    if not isinstance(bank, np.memmap) or bank.mode == "c":  # of a private copy the changes would be lost
        return
    owner: object = bank
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, mmap.mmap):
        owner.madvise(mmap.MADV_DONTNEED)


def side_by_side(work: Callable[[int], None], starts: range, device: torch.device) -> None:
    """Call `work` for each start: on a CPU in as many threads as torch computes with.

    Selecting is NumPy's work, which uses one thread for each call, so blocks of queries go side by side.
    """
    num_threads = torch.get_num_threads()
    if device.type != "cpu" or num_threads == 1 or len(starts) == 1:
        for start in starts:
            work(start)
        return
    try:
        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(work, starts):
                pass
    finally:
        torch.set_num_threads(num_threads)
