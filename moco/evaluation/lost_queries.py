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
        bank_labels: (bank size,) class numbers.
        query_labels: (queries,) class numbers.
        is_leave_one_out: each query is in the bank, too.
    """
    classes, counts = np.unique(bank_labels, return_counts=True)
    needed = 2 if is_leave_one_out else 1
    return ~np.isin(query_labels, classes[counts >= needed])


def warn_of_lost(
    lost: np.ndarray, query_labels: np.ndarray, labelled: Labelled, *, is_leave_one_out: bool
) -> None:
    """Warn of the queries that no vote can get right, if there are any.

    Args:
        lost: (queries,) bool, from `without_class_in_bank`.
        query_labels: (queries,) class numbers.
        labelled: names the classes.
        is_leave_one_out: as in `without_class_in_bank`.
    """
    if not lost.any():
        return
    classes = np.unique(query_labels[lost])
    names = [printable(labelled.class_name(int(number))) for number in classes[:MOST_NAMED]]
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
