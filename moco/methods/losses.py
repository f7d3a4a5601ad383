"""The losses as the papers write them: pure functions of embeddings.

Shapes use N for the queries of this device, M for the keys of all devices, K for negatives, S for
the cells of a view, C for the width of an embedding and D for the width of a feature.

Images can belong to groups, such as the photographs of one place. Group numbers are int64, and -1
means that the group is unknown. A loss that gets them leaves the negatives of a query's own group
out of the sum, because they show the same thing as the positive.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Groups(NamedTuple):
    """The groups of the queries and of the negatives of a loss."""

    queries: Tensor
    """(N,) int64, -1 for an unknown group."""
    negatives: Tensor
    """(K,) int64, -1 for an unknown group."""

    def is_own(self, columns: slice = slice(None)) -> Tensor:
        """Return which of these negatives belong to each query's own group, (N, columns) bool."""
        # A number that no negative has: a second comparison of size N x K would cost as much.
        queries = self.queries.where(self.queries >= 0, -2)
        return queries[:, None] == self.negatives[columns]

    def of_queries(self, rows: slice) -> "Groups":
        """Return the groups for some of the queries."""
        return Groups(self.queries[rows], self.negatives)


def info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor,
    temperature: float,
    groups: Groups | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Return InfoNCE: the mean cross-entropy of finding each query's key among its negatives.

    The unit is nats. If all similarities are equal, the loss is log(1 + K). Logits and loss are
    float32 whatever the precision: at T = 0.07 a similarity that is rounded to bfloat16 (by up to
    1/256) would move its logit by 0.06.

    Args:
        query: (N, C), unit norm, with gradient.
        key: (N, C), unit norm; row i is the positive of query i.
        negatives: (K, C), unit norm. They must not change before the backward pass.
        temperature: T.
        groups: leave out the negatives of a query's own group; None takes all negatives.
        weights: (N,) of the queries, for a weighted mean, see `shares_of`; None: the plain mean.

    Source: arXiv 1911.05722, equation 1.
    """
    with torch.autocast(query.device.type, enabled=False):
        query, key, negatives = query.float(), key.float(), negatives.float()
        positive = (query * key).sum(dim=1, keepdim=True)  # (N, 1)
        similarities = query @ negatives.T  # (N, K)
        if groups is not None:
            similarities = similarities.masked_fill(groups.is_own(), -torch.inf)
        logits = torch.cat([positive, similarities], dim=1)  # (N, 1 + K)
        target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        if weights is None:
            return F.cross_entropy(logits / temperature, target)
        losses = F.cross_entropy(logits / temperature, target, reduction="none")
        return (losses * shares_of(weights)).sum()


def shares_of(weights: Tensor) -> Tensor:
    """Return the share of each query in a weighted mean of losses, (N,); all 0 if no weight is.

    Args:
        weights: (N,) float32, at least 0. A query of weight 0 counts for nothing.
    """
    total = weights.sum()
    return weights / total.where(total > 0, 1.0)


def in_batch_info_nce(
    query: Tensor,
    keys: Tensor,
    temperature: float,
    rank: int = 0,
    groups: Groups | None = None,
) -> Tensor:
    """Return the mean cross-entropy of finding each query's key among all keys of the batch.

    The unit is nats. If all similarities are equal, the loss is log(M). Differs from the paper: the
    factor 2T is left to the caller.

    Args:
        query: (N, C), unit norm, with gradient.
        keys: (M, C), unit norm; N keys of each device, in the order of the ranks.
        temperature: T.
        rank: of the device that the queries are on.
        groups: of the queries and of all keys. Other keys of a query's own group are left out. None
            takes all keys.

    Source: arXiv 2104.02057, algorithm 1.
    """
    with torch.autocast(query.device.type, enabled=False):
        query, keys = query.float(), keys.float()
        logits = query @ keys.T  # (N, M)
        target = rank * len(query) + torch.arange(len(query), device=query.device)  # (N,)
        if groups is not None:
            is_left_out = groups.is_own().scatter(1, target[:, None], False)  # never the positive
            logits = logits.masked_fill(is_left_out, -torch.inf)
        return F.cross_entropy(logits / temperature, target)


def matched_cells(key_cells: Tensor, matches: Tensor) -> Tensor:
    """Return for each query cell the key cell that is its positive in DenseCL: (N, S, C).

    Args:
        key_cells: (N, S, C).
        matches: (N, S), from `most_similar_cells` or `cells_at_the_same_place`.
    """
    width = key_cells.shape[2]
    return key_cells.gather(1, matches[:, :, None].expand(-1, -1, width))


@torch.no_grad()
def most_similar_cells(query_features: Tensor, key_features: Tensor) -> Tensor:
    """Return for each cell of a query the number of the most similar cell of its key: (N, S).

    Args:
        query_features: (N, S, D), the backbone's features of the cells, unit norm.
        key_features: (N, S, D), those of the keys, unit norm.

    Source: DenseCL, arXiv 2011.09157, section 3.
    """
    with torch.autocast(query_features.device.type, enabled=False):
        similarities = query_features.float() @ key_features.float().transpose(1, 2)  # (N, S, S)
        return similarities.argmax(dim=2)
