"""How often a query finds its own key among the negatives: MoCo's own task as an accuracy."""

import torch
from torch import Tensor

from moco.evaluation.diagnostics import evenly_spaced

MOST_QUERIES = 64
"""Queries of a batch that are looked at. With 65,536 negatives their similarities take 16 MB."""
ROUNDING = 1e-6
"""A product of matrices and a sum round differently, so a query's own key among the negatives may
seem to be this much nearer than it is."""


@torch.no_grad()
def contrast_top1(query: Tensor, key: Tensor, negatives: Tensor) -> Tensor:
    """Return the share of queries whose own key is more similar to them than every negative.

    The official MoCo code prints it as Acc@1, in percent. Queries that tell nothing apart get
    1 / (1 + negatives).

    Args:
        query, key: (batch, embedding_dim) each, unit norm; a query's own key is in its row.
        negatives: (negatives, embedding_dim), unit norm, at least one. They may include the
            queries' own keys.
    """
    query = evenly_spaced(query, MOST_QUERIES).float()
    key = evenly_spaced(key, MOST_QUERIES).float()
    own = (query * key).sum(dim=1)  # (queries,)
    highest = (query @ negatives.float().T).amax(dim=1)  # (queries,)
    return (own >= highest - ROUNDING).float().mean()
