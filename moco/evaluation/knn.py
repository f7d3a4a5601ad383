"""Weighted k-nearest-neighbour classification of features.

The protocol is that of InstDisc (arXiv 1805.01978, section 3.4), by which MoCo's authors monitor
their runs. Features are L2-normalised. The k bank rows with the largest inner product vote for
their class, with weight exp(similarity / T).

Images may have several classes each. Then a neighbour votes for each of its classes, and a class's
share of the weights ranks the queries. The average precision says how good this order is; its mean
over classes is the usual figure of BigEarthNet (arXiv 1902.06148) and of chest X-rays.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from moco.data.sources.source import Labelled
from moco.errors import InputError
from moco.evaluation.neighbors import Neighbors, nearest_by_block

log = logging.getLogger(__name__)

# Scores, one for each query and class, that are in memory at once.
SCORES_AT_ONCE = 2**22

Search = Callable[[np.ndarray, int], Iterable[Neighbors]]
"""A function of queries (queries, width) and k that finds the nearest bank rows. It yields them for
one block of queries after the other."""


class Protocol(NamedTuple):
    """What a kNN accuracy depends on beside the features."""

    num_neighbors: int
    """k."""
    temperature: float
    """T."""


@dataclass(frozen=True)
class KNNResult:
    """Accuracies, as fractions of the queries, and the sizes that they were measured with."""

    top1: float
    top5: float | None
    """None with fewer than five neighbours, see `Votes.top`."""
    num_neighbors: int
    """k, after it was limited to the bank size."""
    bank_size: int
    num_queries: int
    mean_average_precision: float | None = None
    """Of images with several classes each; None if each image has one class."""


class Votes(NamedTuple):
    """The outcome of a vote for each query."""

    predicted: np.ndarray
    """(queries,) class numbers."""
    rank: np.ndarray
    """(queries,) int64: how many classes got more votes than the query's own class."""
    average_precision: np.ndarray | None = None
    """(classes,) of images with several classes each, NaN for a class that no query has. None:
    each image has one class."""

    def mean_average_precision(self) -> float | None:
        """Return the mean over the classes that the queries have; None with one class each."""
        if self.average_precision is None:
            return None
        return float(np.nanmean(self.average_precision))

    def accuracy(self, at: int) -> float:
        """Return the share of the queries whose own class is among the first `at`."""
        return float((self.rank < at).mean())

    def top(self, num_neighbors: int) -> dict[str, float]:
        """Return ``top1``, and ``top5`` if the votes are of at least five neighbours.

        With several classes for each image, also ``mean_average_precision``.

        Fewer neighbours cannot name five classes. Which class without a vote would be the fifth
        does not depend on the features.

        Args:
            num_neighbors: k of the vote.
        """
        shares = {"top1": self.accuracy(1)}
        if num_neighbors >= 5:
            shares["top5"] = self.accuracy(5)
        precision = self.mean_average_precision()
        if precision is not None:
            shares["mean_average_precision"] = precision
        return shares


def vote(
    similarities: np.ndarray, neighbor_classes: np.ndarray, num_classes: int, temperature: float
) -> np.ndarray:
    """Return each class's share of a query's votes up to a factor: (queries, classes) float64.

    Args:
        similarities: (queries, k) inner products in falling order.
        neighbor_classes: (queries, k), from 0 to num_classes - 1.
        num_classes: number of classes.
        temperature: T of the weights exp(similarity / T).
    """
    # Weights relative to the first neighbour's give the same ranking and do not overflow at any T.
    relative = (similarities - similarities[:, :1]).astype(np.float64)
    weights = np.exp(relative / temperature)
    # Each query and class has a cell of its own, so one call adds up all votes.
    first_cells = np.arange(len(weights))[:, None] * num_classes
    cells = (first_cells + neighbor_classes).ravel()
    sums = np.bincount(cells, weights.ravel(), len(weights) * num_classes)
    return sums.reshape(-1, num_classes)


def votes_of(scores: np.ndarray, classes: np.ndarray, own: np.ndarray) -> Votes:
    """Return the outcome of scores. Of equal scores the smaller class comes first.

    The rank of a class that is not there is at least 5.

    Args:
        scores: (queries, classes).
        classes: (classes,) their numbers.
        own: (queries,) place of each query's class among them; the number of classes stands for one
            that is not there.
    """
    num_classes = len(classes)
    is_known = own < num_classes
    # The column of an unknown class does not matter, its rank is replaced below.
    own_column = np.minimum(own, num_classes - 1)[:, None]
    own_score = np.take_along_axis(scores, own_column, axis=1)
    is_smaller_class = np.arange(num_classes) < own[:, None]
    is_before = (scores > own_score) | ((scores == own_score) & is_smaller_class)
    rank = np.where(is_known, is_before.sum(axis=1), num_classes + 5)
    return Votes(classes[scores.argmax(axis=1)], rank)


def classify(
    search: Search,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    query_labels: np.ndarray,
    protocols: Collection[Protocol],
    own_rows: np.ndarray | None = None,
) -> dict[Protocol, Votes]:
    """Classify the queries under several protocols by one search.

    A class that only the queries have is never right. A class that only the bank has can win votes.
    Of classes with equal votes the smaller number ranks first.

    Args:
        search: finds neighbours in the bank.
        bank_labels: (bank size,) class numbers, gaps allowed; or (bank size, classes) bool for
            images with several classes each, see `classify_several`.
        queries: (queries, width) features of any norm.
        query_labels: the same for the queries.
        protocols: in any order.
        own_rows: (queries,) each query's own row in the bank, which has no vote (leave one out);
            None if the queries are not in the bank.
    """
    if bank_labels.ndim == 2:
        return classify_several(search, bank_labels, queries, query_labels, protocols, own_rows)
    classes, bank_classes = np.unique(bank_labels, return_inverse=True)
    own = class_places(classes, query_labels)
    most_neighbors = max(protocol.num_neighbors for protocol in protocols)
    block_size = max(1, SCORES_AT_ONCE // max(len(classes), most_neighbors))
    parts: dict[Protocol, list[Votes]] = {protocol: [] for protocol in protocols}
    for block, similarities, rows in found_blocks(
        search, queries, most_neighbors, own_rows, block_size
    ):
        neighbor_classes = bank_classes[rows]
        for (k, temperature), votes in parts.items():
            scores = vote(similarities[:, :k], neighbor_classes[:, :k], len(classes), temperature)
            votes.append(votes_of(scores, classes, own[block]))
    together = {}
    for protocol, votes in parts.items():
        predicted = np.concatenate([block.predicted for block in votes])
        rank = np.concatenate([block.rank for block in votes])
        together[protocol] = Votes(predicted, rank)
    return together


def found_blocks(
    search: Search,
    queries: np.ndarray,
    num_neighbors: int,
    own_rows: np.ndarray | None,
    block_size: int,
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yield blocks of at most `block_size` queries with their neighbours, see `classify`.

    Yields:
        Which queries; and the similarities and bank rows of their neighbours, (queries, k) each.
    """
    # The query itself may be found and is removed, so one more row is needed.
    num_searched = num_neighbors if own_rows is None else num_neighbors + 1
    num_done = 0
    for similarities, rows in split_blocks(search(queries, num_searched), block_size):
        block = slice(num_done, num_done + len(rows))
        num_done += len(rows)
        if own_rows is not None:
            similarities, rows = without_own(similarities, rows, own_rows[block])
        yield block, similarities, rows


def share_of_votes(
    similarities: np.ndarray, neighbor_classes: np.ndarray, temperature: float
) -> np.ndarray:
    """Return each class's share of the weights of a query's neighbours, (queries, classes), 0 to 1.

    Args:
        similarities: (queries, k) inner products in falling order.
        neighbor_classes: (queries, k, classes) bool.
        temperature: T of the weights exp(similarity / T).
    """
    relative = (similarities - similarities[:, :1]).astype(np.float64)
    weights = np.exp(relative / temperature)
    weights /= weights.sum(axis=1, keepdims=True)
    shares: np.ndarray = np.einsum("qk,qkc->qc", weights, neighbor_classes)
    return shares


def classify_several(
    search: Search,
    bank_classes: np.ndarray,
    queries: np.ndarray,
    query_classes: np.ndarray,
    protocols: Collection[Protocol],
    own_rows: np.ndarray | None = None,
) -> dict[Protocol, Votes]:
    """Classify the queries under several protocols by one search.

    Args:
        search: finds neighbours in the bank.
        bank_classes: (bank size, classes) bool.
        queries: (queries, width) features of any norm.
        query_classes: (queries, classes) bool.
        protocols: in any order.
        own_rows: (queries,) each query's own row in the bank, which has no vote; None if the
            queries are not in the bank.

    Returns:
        The votes of each protocol. A query is right at n if one of its classes is among its n first
        classes. Queries without a class count for the average precision alone.
    """
    num_classes = bank_classes.shape[1]
    most_neighbors = max(protocol.num_neighbors for protocol in protocols)
    block_size = max(1, SCORES_AT_ONCE // (num_classes * most_neighbors))
    shares = {protocol: np.empty((len(queries), num_classes)) for protocol in protocols}
    for block, similarities, rows in found_blocks(
        search, queries, most_neighbors, own_rows, block_size
    ):
        neighbor_classes = bank_classes[rows]
        for protocol, all_shares in shares.items():
            k, temperature = protocol
            all_shares[block] = share_of_votes(
                similarities[:, :k], neighbor_classes[:, :k], temperature
            )
    return {protocol: votes_for(found, query_classes) for protocol, found in shares.items()}


def votes_for(shares: np.ndarray, own: np.ndarray) -> Votes:
    """Return the outcome of each class's share of the votes. Of equal shares the smaller is first.

    Args:
        shares: (queries, classes).
        own: (queries, classes) bool, the classes of the queries.
    """
    has_class = own.any(axis=1)
    order = np.argsort(-shares[has_class], axis=1, kind="stable")
    is_own = np.take_along_axis(own[has_class], order, axis=1)
    return Votes(order[:, 0], is_own.argmax(axis=1), average_precision(shares, own))


def average_precision(scores: np.ndarray, is_class: np.ndarray) -> np.ndarray:
    """Return the average precision of each class, (classes,), NaN for a class that no image has.

    Args:
        scores: (images, classes), higher for images that seem to have the class.
        is_class: (images, classes) bool.
    """
    from sklearn.metrics import average_precision_score

    precision = np.full(scores.shape[1], np.nan)
    for number in np.flatnonzero(is_class.any(axis=0)):
        precision[number] = average_precision_score(is_class[:, number], scores[:, number])
    return precision


def classes_of(labels: np.ndarray, name: str) -> np.ndarray:
    """Return the class numbers (classes,) of labels, rising.

    Args:
        name: of the dataset, for the message.

    Raises:
        InputError: there are no labels, or all are of one class.
    """
    classes = np.unique(labels)
    if len(classes) < 2:
        raise InputError(
            f"data={name}: a classifier needs two classes, and the {len(labels):,} labelled "
            f"training images are of {len(classes)}; evaluation=label_free needs no classes"
        )
    return classes


def refuse_several_classes(labelled: Labelled | None, setting: str) -> None:
    """Raise InputError if the images have several classes each.

    Args:
        labelled: the images.
        setting: what needs one class for each image.
    """
    if labelled is not None and labelled.label_sets is not None:
        raise InputError(
            f"{setting} needs one class for each image, and these have several; "
            "evaluation=knn measures their mean average precision"
        )


def class_places(classes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the place of each label among the rising class numbers.

    The number of classes stands for a label that is not among them.
    """
    places = np.minimum(np.searchsorted(classes, labels), len(classes) - 1)
    return np.where(classes[places] == labels, places, len(classes))


def turns_of_classes(labels: np.ndarray) -> np.ndarray:
    """Return how many rows of the same class come before each row: (rows,) int64."""
    order = np.argsort(labels, kind="stable")
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    turns = np.empty(len(labels), np.int64)
    turns[order] = np.arange(len(labels)) - np.repeat(starts, counts)
    return turns


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count how many queries of each class were taken for each class.

    Returns:
        Class numbers (classes,), and counts (classes, classes), the true class by row.
    """
    classes, places = np.unique(np.concatenate([labels, predicted]), return_inverse=True)
    true, taken_for = places[: len(labels)], places[len(labels) :]
    counts = np.bincount(true * len(classes) + taken_for, minlength=len(classes) ** 2)
    return classes, counts.reshape(len(classes), -1)


def split_blocks(blocks: Iterable[Neighbors], size: int) -> Iterator[Neighbors]:
    """Yield the neighbours in blocks of at most `size` queries."""
    for similarities, rows in blocks:
        for start in range(0, len(rows), size):
            yield similarities[start : start + size], rows[start : start + size]


def without_own(similarities: np.ndarray, rows: np.ndarray, own_rows: np.ndarray) -> Neighbors:
    """Remove each query itself from its neighbours, or the last one if it is not among them.

    Args:
        similarities, rows: (queries, k + 1) each.
        own_rows: (queries,) each query's row in the bank.

    Returns:
        Similarities and rows, (queries, k) each.
    """
    is_own = rows == own_rows[:, None]
    last = rows.shape[1] - 1
    # Only the first place: an index may fill a list with the bank's first row again and again.
    place = np.where(is_own.any(axis=1), is_own.argmax(axis=1), last)
    is_kept = np.arange(rows.shape[1]) != place[:, None]
    shape = (len(rows), last)
    return similarities[is_kept].reshape(shape), rows[is_kept].reshape(shape)


def capped(num_neighbors: int, most: int, key: str = "evaluation.num_neighbors") -> int:
    """Return k, at most `most`, with a warning where it is lowered."""
    if num_neighbors > most:
        log.warning("%s=%d is more than the bank's %d; using those", key, num_neighbors, most)
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
        bank: (bank size, width) features of any norm.
        bank_labels: (bank size,) class numbers, gaps allowed; or (bank size, classes) bool for
            images with several classes each.
        queries: (queries, width) features of any norm.
        query_labels: the same for the queries.
        num_neighbors: k; limited to the bank size with a warning.
        temperature: T.
        device: where to search.
    """
    protocol = Protocol(capped(num_neighbors, len(bank)), temperature)
    search = partial(nearest_by_block, bank, device=device)
    votes = classify(search, bank_labels, queries, query_labels, [protocol])[protocol]
    shares = votes.top(protocol.num_neighbors)
    return KNNResult(
        shares["top1"],
        shares.get("top5"),
        protocol.num_neighbors,
        len(bank),
        len(queries),
        votes.mean_average_precision(),
    )
