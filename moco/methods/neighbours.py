"""Nearest neighbours in the queue as extra positives.

The idea is that of NNCLR (arXiv 2104.14548) and of van Gansbeke et al. (arXiv 2106.05967): keys of
other images that are most similar to a query's own key probably show the same kind of thing.

Shapes use N for the queries of this device, K for the negatives, k for the neighbours of a query
and C for the width of an embedding.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.errors import InputError
from moco.methods.blocked_loss import (
    blocked_log_total,
    columns_per_block,
    is_plain_form_better,
)
from moco.methods.losses import Groups

NEVER = -1e30
"""The logit of a negative that is left out. It is finite, so that a query without any negatives has
a gradient of zero and not NaN."""


class NeighbourTerms(NamedTuple):
    """The two terms of the loss with neighbours, in nats."""

    of_key: Tensor
    """Scalar: the mean cross-entropy of finding the query's own key."""
    of_neighbours: Tensor
    """Scalar: the mean cross-entropy of finding one of the neighbours of that key."""

    def weighted_mean(self, weight: float) -> Tensor:
        """Return (1 - weight) * of_key + weight * of_neighbours."""
        return (1 - weight) * self.of_key + weight * self.of_neighbours


class LeftOut(NamedTuple):
    """The queue's keys that are no negatives of a query."""

    neighbours: Tensor
    """(N, k) int64, the rows of the query's neighbours."""
    num_negatives: int
    """K."""
    groups: Groups | None = None
    """If there are groups, the keys of the query's own group are left out too."""

    def is_own(self, columns: slice = slice(None)) -> Tensor:
        """Return which of these keys are left out for each query, (N, columns) bool."""
        first, last, _ = columns.indices(self.num_negatives)
        num_columns = last - first
        places = self.neighbours - first
        is_inside = (places >= 0) & (places < num_columns)
        # The neighbours of other columns go to one column more, which is cut off again. Nothing
        # waits for the device.
        places = places.where(is_inside, num_columns)
        is_own = torch.zeros(
            len(places), num_columns + 1, dtype=torch.bool, device=places.device
        ).scatter_(1, places, True)
        is_own = is_own[:, :num_columns]
        if self.groups is not None:
            is_own = is_own | self.groups.is_own(columns)
        return is_own

    def of_queries(self, rows: slice) -> "LeftOut":
        """Return the same for some of the queries."""
        groups = self.groups
        if groups is not None:
            groups = groups.of_queries(rows)
        return LeftOut(self.neighbours[rows], self.num_negatives, groups)


def nearest_rows(key: Tensor, negatives: Tensor, num_neighbours: int) -> Tensor:
    """Return for each key the rows of the most similar negatives, (N, k) int64, nearest first.

    No tensor of N x K similarities is made where the losses make none either, see
    `moco.methods.blocked_loss`.

    Args:
        key: (N, C), unit norm.
        negatives: (K, C), unit norm.
        num_neighbours: k, at most K.
    """
    num_columns = columns_per_block(len(key), key.device.type)
    similarities = []
    rows = []
    with torch.no_grad(), torch.autocast(key.device.type, enabled=False):
        key = key.float()
        for start in range(0, len(negatives), num_columns):
            block = negatives[start : start + num_columns].float()
            most = min(num_neighbours, len(block))
            nearest = (key @ block.T).topk(most, dim=1)
            similarities.append(nearest.values)
            rows.append(nearest.indices + start)
        best = torch.cat(similarities, dim=1).topk(num_neighbours, dim=1).indices
        return torch.cat(rows, dim=1).gather(1, best)


def neighbour_info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor,
    neighbours: Tensor,
    temperature: float,
    groups: Groups | None = None,
) -> NeighbourTerms:
    """Return InfoNCE for the key and, on average, for the neighbours of each query.

    With p the key or a neighbour, and S the sum of exp(query * negative / T) over the negatives of
    the query, a term is -log(exp(query * p / T) / (exp(query * p / T) + S)). The negatives are all
    keys of the queue but the neighbours, so that no positive is a negative of the same query.
    Logits and losses are float32 whatever the precision.

    Args:
        query: (N, C), unit norm, with gradient.
        key: (N, C), unit norm, no gradient.
        negatives: (K, C), unit norm, no gradient. They must not change before the backward pass.
        neighbours: (N, k) int64, rows of `negatives`, from `nearest_rows`.
        temperature: T.
        groups: leave out the negatives of a query's own group; a neighbour of that group stays a
            positive. None takes all negatives.

    Source: NNCLR (arXiv 2104.14548, section 3.2), in which the nearest entry alone takes the place
    of the key. Differs from it: the key stays a positive with a term of its own, there may be
    several neighbours, and the negatives are the rest of the queue in place of the batch.
    """
    left_out = LeftOut(neighbours, len(negatives), groups)
    with torch.autocast(query.device.type, enabled=False):
        query, key, negatives = query.float(), key.float(), negatives.float()
        if is_plain_form_better(query, negatives, temperature):
            logits = (query @ negatives.T) / temperature  # (N, K)
            logits = logits.masked_fill(left_out.is_own(), NEVER)
            log_total = logits.logsumexp(dim=1, keepdim=True)  # (N, 1)
        else:
            log_total = blocked_log_total(query, negatives, temperature, left_out)[:, None]
        key_logit = (query * key).sum(dim=1, keepdim=True) / temperature  # (N, 1)
        neighbour_logits = torch.einsum("nc,nkc->nk", query, negatives[neighbours]) / temperature
        of_key = losses_of_positives(key_logit, log_total).mean()
        of_neighbours = losses_of_positives(neighbour_logits, log_total).mean()
    return NeighbourTerms(of_key, of_neighbours)


def losses_of_positives(logits: Tensor, log_total: Tensor) -> Tensor:
    """Return the cross-entropy of each positive beside the same negatives, (N, positives).

    Args:
        logits: (N, positives).
        log_total: (N, 1), the logarithm of the sum of the negatives' exponentials.
    """
    losses = F.softplus(log_total - logits)  # log(1 + total / exp(logit))
    # softplus hides a logit of infinity, which `info_nce` turns into NaN.
    return losses + 0 * logits


def check_neighbours(neighbours: int, negatives: str, queue_size: int | None) -> None:
    """Raise InputError if the queue has no such neighbours.

    Args:
        neighbours: k; 0 needs no queue.
        negatives: ``queue`` or ``batch``.
        queue_size: K.
    """
    if neighbours == 0:
        return
    if negatives != "queue" or queue_size is None:
        raise InputError(
            f"method.neighbours={neighbours}: neighbours are looked for in a queue, and "
            f"method.negatives={negatives} has none; expected 0, or method.negatives=queue"
        )
    if neighbours >= queue_size:
        raise InputError(
            f"method.neighbours={neighbours}: a queue of method.queue_size={queue_size} keys "
            f"leaves no negatives; expected at most {queue_size - 1}"
        )
