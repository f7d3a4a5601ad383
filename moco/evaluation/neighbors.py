"""Exact search for nearest neighbours by inner product, in blocks: matrix products, on the CPU or a GPU.

The answer has one definition. Similarities are float32 inner products of unit vectors; a query's neighbours are the rows
with the largest, in falling order, and of equal ones the smaller row comes first.

The large array of a search is the product of queries and bank, and reading it costs as much as making it. So it is read
once, strip by strip while the processor's cache still holds it, for the maxima of groups of 4 rows. On a CPU the maxima
give a number that k rows reach at least, and the rows that reach it are the candidates. On a GPU, and where they would be
too many, the k nearest are looked for in the k groups with the largest maxima, which hold them all; of rows that share the
k-th place the first are counted out. Both are as exact as top-k of the whole product.

Letters: M bank size, Q queries, D feature width, k neighbours, N queries of a block, B bank rows of a block, G groups.
"""

import mmap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 4
BANK_BYTES = 2**27  # of bank rows that are normalised at once
PRODUCT_BYTES = 2**26  # of similarities that one thread makes at once
ALL_PRODUCTS_BYTES = 2**28  # of those that all threads make at once
STRIP = {
    "cpu": 512
}  # bank rows whose similarities are looked at as soon as they are made; elsewhere a whole block's
CROWD = 8  # times k: so many candidates of a query are sorted; where there are more the k largest groups are faster
NOTHING = np.finfo(
    np.float32
).min  # the similarity of a place in a list that nothing fills: of features that are NaN
LIST_BYTES = (
    2**26
)  # of neighbours, their similarities and places, that are kept while the bank is walked over


def normalized(features: np.ndarray) -> np.ndarray:
    """Rows scaled to unit L2 norm in float32, as a copy; a zero row stays zero."""
    features = np.array(features, dtype=np.float32, order="C", subok=False)
    rows = torch.from_numpy(
        features
    )  # for its threads: of a large bank NumPy's one takes a tenth of the search
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
        yield walk(
            bank, normalized(queries[start : start + size]), num_neighbors, torch.device(device)
        )


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
        num_threads = torch.get_num_threads() if device.type == "cpu" else 1
        width = max(1, min(PRODUCT_BYTES, ALL_PRODUCTS_BYTES // num_threads) // (4 * len(block)))
        rooms = (
            threading.local()
        )  # new memory costs half as much as the product that is written to it

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
                rooms.products = Products(
                    min(width, len(queries)), len(block), num_neighbors, device
                )
            values, columns = rooms.products.nearest(part, block, num_neighbors, not_numbers)
            lists = slice(start, start + width)
            merge(similarities[lists], rows[lists], values, columns + first, is_first=not first)

        side_by_side(improve, range(0, len(queries), width), device)
    return similarities, rows


class Products:
    """Room for the similarities of some queries and the rows of a bank's block, (N, B), and for the maxima of their groups.

    Args:
        num_queries: N, at most.
        num_rows: of the block, at most; B is the next multiple of what a strip holds, and at least k.
        num_neighbors: k.
    """

    def __init__(
        self, num_queries: int, num_rows: int, num_neighbors: int, device: torch.device
    ) -> None:
        whole = GROUP * -(-max(num_rows, num_neighbors) // GROUP)
        self.strip = min(STRIP.get(device.type, whole), whole)
        num_columns = self.strip * -(-whole // self.strip)
        self.values = torch.empty(num_queries, num_columns, device=device)
        self.values[:, num_rows:] = -torch.inf
        self.maxima = torch.empty(num_queries, num_columns // GROUP, device=device)
        # A strip's n-th group has its columns n, n + strip // GROUP, ...
        columns = torch.arange(num_columns, device=device).view(-1, GROUP, self.strip // GROUP)
        self.first_columns = columns[:, 0].flatten()  # of each group
        self.steps = columns[0, :, 0].clone()  # from there to each column of the group

    def nearest(
        self, queries: Tensor, block: Tensor, num_neighbors: int, not_numbers: Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k most similar rows of the block to each query, and maybe more, in any order: similarities and row numbers.

        Where the block has fewer, and for a query that is not a number, the rest is -inf and of no row.

        Args:
            queries: (N, D).
            block: (rows, D).
            not_numbers: the rows that are not finite, which nothing is similar to.
        """
        values, maxima = self.values[: len(queries)], self.maxima[: len(queries)]
        strips, groups = values.split(self.strip, dim=1), maxima.split(self.strip // GROUP, dim=1)
        for rows, strip, of_groups in zip(block.split(self.strip), strips, groups, strict=False):
            # Whole strips only: of a few rows the products would be rounded in another way, and equal rows not be equal.
            num_rows = len(rows)
            if num_rows < strip.shape[1]:
                rows = F.pad(rows, (0, 0, 0, strip.shape[1] - num_rows))
            torch.mm(queries, rows.T, out=strip)
            strip[:, num_rows:] = -torch.inf
            torch.amax(strip.unflatten(1, (GROUP, -1)), dim=1, out=of_groups)
        if len(not_numbers):
            values[:, not_numbers] = -torch.inf
            torch.amax(
                values.unflatten(1, (len(strips), GROUP, -1)),
                dim=2,
                out=maxima.unflatten(1, (len(strips), -1)),
            )
        no_queries = queries.isnan().any(dim=1)
        if no_queries.any():
            values[no_queries], maxima[no_queries] = -torch.inf, -torch.inf
        if maxima.shape[1] > num_neighbors and not values.is_cuda:
            found = self.by_threshold(values.numpy(), maxima.numpy(), num_neighbors)
            if found is not None:
                return found
        chosen, columns = self.by_top_k(values, maxima, num_neighbors)
        return chosen.cpu().numpy(), columns.cpu().numpy()

    def by_threshold(
        self, values: np.ndarray, maxima: np.ndarray, num_neighbors: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """`nearest` on a CPU: all that is as large as a number that k rows reach at least, usually 1.4 k.

        It is the k-th largest maximum of 2 k large groups: to select from so few costs next to nothing, and to compare all
        small groups with it little. None where many are equal, as of features that have collapsed.

        Args:
            values, maxima: the similarities (N, B), and of their groups (N, G); G is above k.

        Returns:
            Similarities and row numbers, (N, L) each, L the most that a query has; the places of others are -inf.
        """
        most = CROWD * num_neighbors
        at_once = max(1, maxima.shape[1] // (2 * num_neighbors))
        of_many = (
            maxima[:, : maxima.shape[1] // at_once * at_once]
            .reshape(len(maxima), at_once, -1)
            .max(axis=1)
        )
        cut = of_many.shape[1] - num_neighbors
        least = np.partition(of_many, cut, axis=1)[:, cut]  # (N,)
        query, group = np.divmod(np.flatnonzero(maxima >= least[:, None]), maxima.shape[1])
        if len(query) > most * len(values):
            return None
        width, first_columns, steps = (
            values.shape[1],
            self.first_columns.numpy(),
            self.steps.numpy(),
        )
        places = (query * width + first_columns[group])[
            :, None
        ] + steps  # in `values`, (groups of all queries, GROUP)
        members = values.ravel().take(places)
        chosen = np.flatnonzero(members >= least[query][:, None])
        query, places, members = (
            query[chosen // GROUP],
            places.ravel()[chosen],
            members.ravel()[chosen],
        )
        counts = np.bincount(query, minlength=len(values))
        if counts.max() > most:
            return None
        place = np.arange(len(query)) - (counts.cumsum() - counts)[query]
        lists = np.full((len(values), counts.max()), -np.inf, np.float32)
        numbers = np.zeros(lists.shape, np.int64)
        lists[query, place], numbers[query, place] = members, places - query * width
        return lists, numbers

    def by_top_k(self, values: Tensor, maxima: Tensor, num_neighbors: int) -> tuple[Tensor, Tensor]:
        """`nearest` on a GPU, and where there are no more groups than neighbours: exactly k, (N, k).

        Args:
            values, maxima: the similarities (N, B), and of their groups (N, G).
        """
        if maxima.shape[1] <= num_neighbors:
            columns, is_tied = largest(values, num_neighbors)
        else:
            group, is_tied = largest(maxima, num_neighbors)
            members = (self.first_columns[group][:, :, None] + self.steps).flatten(
                1
            )  # (N, k * GROUP)
            place, is_tied_within = largest(values.gather(1, members), num_neighbors)
            columns = members.gather(1, place)
            is_tied |= is_tied_within
        tied = is_tied.nonzero().flatten()
        if len(tied):
            columns[tied] = first_largest(values[tied], num_neighbors)
        return values.gather(1, columns), columns


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Where the k largest of each row are, in any order (N, k), and whether another is as large as the last of them (N,)."""
    if values.shape[1] == k:
        every = torch.arange(k, device=values.device).expand(len(values), k)
        return every.clone(), values.new_zeros(len(values), dtype=torch.bool)
    top = values.topk(k + 1, dim=1)
    return top.indices[:, :k], top.values[:, k - 1] == top.values[:, k]


def first_largest(values: Tensor, k: int) -> Tensor:
    """`largest` where values are equal, as of features that have collapsed: of these the first count (N, k)."""
    smallest = values.topk(k, dim=1).values[:, -1:]
    above, equal = values > smallest, values == smallest
    room = k - above.sum(dim=1, keepdim=True)
    is_among = above | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= room))
    return is_among.nonzero()[:, 1].view(len(values), k)


def merge(
    similarities: np.ndarray,
    rows: np.ndarray,
    values: np.ndarray,
    numbers: np.ndarray,
    is_first: bool,
) -> None:
    """Put a block's neighbours, their similarities and rows (N, L), into the lists of those so far (N, k), in place.

    Args:
        is_first: there are none so far. L is usually 1.4 k, so that to sort without their places takes half the time.
    """
    num_neighbors = similarities.shape[1]
    fill_all = is_first and np.count_nonzero(values > NOTHING, axis=1).min() >= num_neighbors
    if not fill_all:
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
    if (
        not isinstance(bank, np.memmap) or bank.mode == "c"
    ):  # of a private copy the changes would be lost
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
        with ThreadPoolExecutor(
            num_threads, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            for _ in pool.map(work, starts):
                pass
    finally:
        torch.set_num_threads(num_threads)
