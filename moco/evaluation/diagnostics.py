"""Label-free figures of a step. Tensors in, numbers out. Letters: N batch, C embedding width, K queue size."""

import torch
from torch import Tensor


def embedding_std(embeddings: Tensor) -> Tensor:
    """Standard deviation of each dimension over the batch, averaged: 0 is collapse, 1 / sqrt(C) evenly spread.

    Section 4.1 of SimSiam (arXiv 2011.10566).

    Args:
        embeddings: (N, C), unit norm.
    """
    return embeddings.float().std(dim=0, correction=0).mean()


def positive_similarity(query: Tensor, key: Tensor) -> Tensor:
    """Mean cosine between each query (N, C) and its own key (N, C), both of unit norm."""
    return (query.float() * key.float()).sum(dim=1).mean()


def negative_similarity(query: Tensor, negatives: Tensor) -> Tensor:
    """Mean cosine over all pairs of query (N, C) and negative (K, C), both of unit norm."""
    return torch.dot(query.float().mean(dim=0), negatives.float().mean(dim=0))


def in_batch_negative_similarity(query: Tensor, key: Tensor, keys: Tensor) -> Tensor:
    """Mean cosine over all pairs of query (N, C) and key (M, C) but its own, of unit norm.

    Args:
        key: (N, C), each query's own key, which is also one of `keys`.
    """
    others = len(keys) * negative_similarity(query, keys) - positive_similarity(query, key)
    return others / (len(keys) - 1)
