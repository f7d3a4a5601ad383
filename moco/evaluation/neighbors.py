"""Exact search for nearest neighbours by inner product, in blocks: matrix products, on the CPU or a GPU.

The answer has one definition. Similarities are float32 inner products of unit vectors; a query's neighbours are the rows
with the largest, in falling order, and of equal ones the smaller row comes first.

The large array of a search is the product of queries and bank, and reading it costs as much as making it. So it is read
once, strip by strip while the processor's cache still holds it, for the maxima of groups of 16 rows: the k nearest rows are
all in the k groups with the largest maxima, and only in these they are looked for. Where the k-th place is shared, in
groups or in rows, the rows are counted out one by one. Compared with top-k of the whole product that is exact as well, and
several times as fast on a CPU.

Letters: M bank size, Q queries, D feature width, k neighbours, N queries of a block, B bank rows of a block, G groups.
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
STRIP = {"cpu": 2048}  # bank rows whose similarities are looked at as soon as they are made; elsewhere a whole block's
NOTHING = np.finfo(np.float32).min  # the similarity of a place in a list that nothing fills: of features that are NaN
LIST_BYTES = 2**26  # of neighbours, their similarities and places, that are kept while the bank is walked over


def normalized(features: np.ndarray) -> np.ndarray:
    """Rows scaled to unit L2 norm in float32, as a copy; a zero row stays zero."""
    features = np.array(features, dtype=np.float32, order="C", subok=False)
    rows = torch.from_numpy(features)  # for its threads: of a large bank NumPy's one takes a tenth of the search
    rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_(min=1e-12)
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
        not_numbers = block.sum(dim=1).isnan().nonzero().flatten()
        width = max(1, PRODUCT_BYTES // (4 * len(block)))
        rooms = threading.local()  # new memory costs half as much as the product that is written to it

        def improve(
            start: int,
            block: Tensor = block,
            first: int = first,
            width: int = width,
            not_numbers: Tensor = not_numbers,
            rooms: threading.local = rooms,
        ) -> None:
            part = on_device[start : start + width]
            if not hasattr(rooms, "products"):
                rooms.products = Products(min(width, len(queries)), len(block), num_neighbors, device)
            values, columns = rooms.products.nearest(part, block, num_neighbors, not_numbers)
            merge(similarities[start : start + width], rows[start : start + width], values, columns + first)

        side_by_side(improve, range(0, len(queries), width), device)
    return similarities, rows


class Products:
    """Room for the similarities of some queries and the rows of a bank's block, (N, B), and for the maxima of their groups.

    Args:
        num_queries: N, at most.
        num_rows: of the block, at most; B is the next multiple of what a strip holds, and at least k.
        num_neighbors: k.
    """

    def __init__(self, num_queries: int, num_rows: int, num_neighbors: int, device: torch.device) -> None:
        whole = GROUP * -(-max(num_rows, num_neighbors) // GROUP)
        self.strip = min(STRIP.get(device.type, whole), whole)
        num_columns = self.strip * -(-whole // self.strip)
        self.values = torch.full((num_queries, num_columns), -torch.inf, device=device)
        self.maxima = torch.empty(num_queries, num_columns // GROUP, device=device)

    def nearest(
        self, queries: Tensor, block: Tensor, num_neighbors: int, not_numbers: Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k most similar rows of the block to each query, in any order: similarities and row numbers, (N, k) each.

        Args:
            queries: (N, D).
            block: (rows, D).
            not_numbers: the rows that are not finite, which nothing is similar to.
        """
        values, maxima = self.values[: len(queries)], self.maxima[: len(queries)]
        strips, groups = values.split(self.strip, dim=1), maxima.split(self.strip // GROUP, dim=1)
        for rows, strip, of_groups in zip(block.split(self.strip), strips, groups, strict=False):
            torch.mm(queries, rows.T, out=strip[:, : len(rows)])
            torch.amax(strip.unflatten(1, (GROUP, -1)), dim=1, out=of_groups)
        if len(not_numbers):
            values[:, not_numbers] = -torch.inf
            torch.amax(values.unflatten(1, (len(strips), GROUP, -1)), dim=2, out=maxima.unflatten(1, (len(strips), -1)))
        return self._chosen(values, maxima, num_neighbors)

    def _chosen(self, values: Tensor, maxima: Tensor, num_neighbors: int) -> tuple[np.ndarray, np.ndarray]:
        """`nearest`, of similarities (N, B) and the maxima of their groups (N, G).

        Within a strip of W columns the n-th group has the columns n, n + W / 16, n + 2 W / 16, ...
        """
        per_strip = self.strip // GROUP
        if maxima.shape[1] <= num_neighbors:
            columns, is_tied = largest(values, num_neighbors)
        else:
            group, is_tied = largest(maxima, num_neighbors)
            firsts = group // per_strip * self.strip + group % per_strip  # (N, k) first column of each
            members = firsts[:, :, None] + torch.arange(0, self.strip, per_strip, device=values.device)
            members = members.flatten(1)  # (N, k * GROUP)
            place, is_tied_within = largest(values.gather(1, members), num_neighbors)
            columns = members.gather(1, place)
            is_tied |= is_tied_within
        tied = is_tied.nonzero().flatten()
        if len(tied):
            columns[tied] = first_largest(values[tied], num_neighbors)
        return values.gather(1, columns).cpu().numpy(), columns.cpu().numpy()


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Where the k largest of each row are, in any order (N, k), and whether another is as large as the last of them (N,)."""
    cut = values.shape[1] - k
    if cut == 0:
        every = torch.arange(k, device=values.device).expand(len(values), k)
        return every.clone(), values.new_zeros(len(values), dtype=torch.bool)
    if values.device.type == "cpu":  # NumPy's selection is vectorised: several times as fast as torch's
        array = values.numpy()
        order = np.argpartition(array, cut - 1, axis=1)[:, cut - 1 :]  # of the k + 1 largest the smallest stands first
        edge = np.take_along_axis(array, order, axis=1)
        return torch.from_numpy(order[:, 1:]), torch.from_numpy(edge[:, 0] == edge[:, 1:].min(axis=1))
    top = values.topk(k + 1, dim=1)
    return top.indices[:, :k], top.values[:, k - 1] == top.values[:, k]


def first_largest(values: Tensor, k: int) -> Tensor:
    """`largest` where values are equal, as of features that have collapsed: of these the first count (N, k)."""
    smallest = values.topk(k, dim=1).values[:, -1:]
    above, equal = values > smallest, values == smallest
    room = k - above.sum(dim=1, keepdim=True)
    is_among = above | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= room))
    return is_among.nonzero()[:, 1].view(len(values), k)


def merge(similarities: np.ndarray, rows: np.ndarray, values: np.ndarray, numbers: np.ndarray) -> None:
    """Put a block's neighbours, their similarities and rows (N, k), into the lists of those so far (N, k), in place."""
    values, numbers = np.hstack([similarities, values]), np.hstack([rows, numbers])
    order = falling(values, numbers, similarities.shape[1])
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
