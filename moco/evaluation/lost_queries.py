"""Queries that no kNN vote can get right, whatever the features."""

import logging

import numpy as np

from moco.data.sources.source import Labelled
from moco.errors import printable

log = logging.getLogger(__name__)

MOST_NAMED = 5
"""Classes that the warning names."""


def without_class_in_bank(
    bank_labels: np.ndarray, query_labels: np.ndarray, *, is_leave_one_out: bool = False
) -> np.ndarray:
    """Return which queries no vote can get right: (queries,) bool.

    The bank has no image of their class, or in leave one out no other image than the query itself.

    Args:
        bank_labels: (bank size,) class numbers; or (bank size, classes) bool for images with
            several classes each, of which one has to be in the bank. A query without a class does
            not count.
        query_labels: the same for the queries.
        is_leave_one_out: each query is in the bank, too.
    """
    needed = 2 if is_leave_one_out else 1
    if bank_labels.ndim == 2:
        is_there = bank_labels.sum(axis=0) >= needed
        has_class = query_labels.any(axis=1)
        lost: np.ndarray = has_class & ~(query_labels & is_there).any(axis=1)
        return lost
    classes, counts = np.unique(bank_labels, return_counts=True)
    return ~np.isin(query_labels, classes[counts >= needed])


def warn_of_lost(
    lost: np.ndarray, query_labels: np.ndarray, labelled: Labelled, *, is_leave_one_out: bool
) -> None:
    """Warn of the queries that no vote can get right, if there are any.

    Args:
        lost: (queries,) bool, from `without_class_in_bank`.
        query_labels: (queries,) labels.
        labelled: names the classes.
        is_leave_one_out: as in `without_class_in_bank`.
    """
    if not lost.any():
        return
    classes = np.unique(query_labels[lost])
    names = [printable(labelled.label_name(int(number))) for number in classes[:MOST_NAMED]]
    if len(classes) > MOST_NAMED:
        names.append("...")
    reason = "the bank has no image of their class"
    if is_leave_one_out:
        reason = "they are the only image of their class"
    log.warning(
        "%d of %d queries cannot be right in kNN, because %s (%s): the accuracy is at most %.4f",
        lost.sum(),
        len(lost),
        reason,
        ", ".join(names),
        1 - lost.mean(),
    )
