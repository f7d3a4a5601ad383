"""Label-free figures of a step or of a set's features. Tensors in, numbers out.

Letters: N batch, M rows or images, C embedding width, K queue size, V views of an image.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

Rows = TypeVar("Rows", np.ndarray, Tensor)

CONTAINERS = ("encoder", "features", "layers")
"""What torchvision calls a backbone's parts that hold the stages of a Swin or the blocks of a ViT."""

MOST_ROWS = 25_600
"""Of which a rank is estimated, as in RankMe (arXiv 2210.02885)."""

MOST_PAIRED_ROWS = 5_000
"""Of which all pairs are looked at."""


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


def alignment(query: Tensor, key: Tensor) -> Tensor:
    """Mean squared distance between the two embeddings of an image: 0 if they are equal, 2 for unrelated directions.

    Arxiv 2005.10242, section 4.1, with alpha 2.

    Args:
        query, key: (N, C) each, unit norm; rows of one image in the same place.
    """
    return (query.float() - key.float()).square().sum(dim=1).mean()


def uniformity(embeddings: Tensor) -> Tensor:
    """Logarithm of the mean Gaussian potential of all pairs: 0 if all rows are equal, near -4 evenly on a wide sphere.

    Arxiv 2005.10242, section 4.1, with t 2.

    Args:
        embeddings: (M, C), unit norm, at least two rows.
    """
    return torch.pdist(embeddings.float()).square().mul(-2).exp().mean().log()


def rank_me(embeddings: Tensor) -> float:
    """The effective number of dimensions that rows (M, C) take up, from 1 to min(M, C).

    The exponential of the entropy of the singular values, which are made to sum to 1: RankMe (arXiv 2210.02885),
    after the effective rank of Roy and Vetterli (EUSIPCO 2007). NaN if a value is not finite.
    """
    rows = embeddings.double()  # squares of singular values lose half the digits
    if not bool(rows.isfinite().all()):
        return float("nan")
    products = rows.T @ rows if len(rows) > rows.shape[1] else rows @ rows.T
    singular_values = torch.linalg.eigvalsh(products.cpu()).clamp(min=0).sqrt()
    return float(exponential_of_entropy(singular_values))


def lidar(embeddings: Tensor) -> float:
    """The effective number of dimensions in which images differ more than their own views do, from 1 to C.

    LiDAR (arXiv 2312.04000, section 4): the singular values of the whitened scatter between images, within being that
    of views around their image's mean, plus 1e-4 on the diagonal.

    Args:
        embeddings: (M, V, C), V augmented views of each image, at least two.
    """
    views = embeddings.double()
    means = views.mean(dim=1)  # (M, C)
    between = (means - means.mean(dim=0)).T.cov(correction=0)  # (C, C)
    within = (views - means[:, None]).flatten(0, 1).T.cov(correction=0) + 1e-4 * torch.eye(
        views.shape[2]
    ).to(views)
    values, vectors = torch.linalg.eigh(within)
    whitening = vectors * values.rsqrt() @ vectors.T
    return float(
        exponential_of_entropy(torch.linalg.eigvalsh(whitening @ between @ whitening).clamp(min=0))
    )


def exponential_of_entropy(weights: Tensor) -> Tensor:
    """How many weights (C,), none negative, count: C if all are equal, 1 if one is all; also if all are 0."""
    shares = (
        weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny) + 1e-7
    )  # of RankMe and LiDAR alike
    return (-shares * shares.log()).sum().exp().clamp(min=1)


def label_free_figures(
    features: np.ndarray, embeddings: np.ndarray, views: np.ndarray | None = None
) -> dict[str, float]:
    """What can be said of an encoder without labels, by the names of TensorBoard.

    Args:
        features: (M, D) of the backbone, of plain images.
        embeddings: (M, C) of the projector, of the same images; any norm.
        views: (M', V, C) embeddings of V >= 2 augmented views of other or the same images; any norm. Without them there
            is no alignment and no LiDAR.
    """
    units = nn.functional.normalize(
        torch.from_numpy(evenly_spaced(embeddings, MOST_ROWS)).float(), dim=1
    )
    figures = {
        "label_free/feature_rank_me": rank_me(torch.from_numpy(evenly_spaced(features, MOST_ROWS))),
        "label_free/rank_me": rank_me(units),
        "label_free/embedding_std": float(embedding_std(units)),
        "label_free/uniformity": float(uniformity(evenly_spaced(units, MOST_PAIRED_ROWS))),
    }
    if views is None:
        return figures
    unit_views = nn.functional.normalize(torch.from_numpy(views).float(), dim=2)
    return figures | {
        "label_free/alignment": float(alignment(unit_views[:, 0], unit_views[:, 1])),
        "label_free/lidar": lidar(unit_views),
    }


def evenly_spaced(rows: Rows, most: int) -> Rows:
    """All rows, or `most` of them from the first to the last."""
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]


def stage_of(name: str) -> str:
    """The stage that an encoder's parameter belongs to: ``backbone.layer1``, ``backbone.features.1``, ``projector``."""
    parts = name.split(".")
    end = 2 if parts[0] == "backbone" else 1
    while parts[end - 1] in CONTAINERS:
        end += 1
    return ".".join(parts[:end])


def by_stage(values: Iterable[tuple[str, Tensor]]) -> dict[str, list[Tensor]]:
    """Tensors with parameters' names, gathered by `stage_of`, in order."""
    stages: dict[str, list[Tensor]] = {}
    for name, value in values:
        stages.setdefault(stage_of(name), []).append(value)
    return stages


def total_norms(stages: Mapping[str, list[Tensor]]) -> dict[str, float]:
    """Of each stage the L2 norm of all its tensors together; one wait for the device."""
    if not stages:
        return {}
    norms = torch.stack([nn.utils.get_total_norm(tensors) for tensors in stages.values()])
    return dict(zip(stages, norms.tolist(), strict=True))


def gradient_norms(encoder: nn.Module) -> dict[str, float]:
    """Of each stage the L2 norm of its gradients; none of a stage without, as all are in a step that was left out."""
    return total_norms(
        by_stage(
            (name, part.grad) for name, part in encoder.named_parameters() if part.grad is not None
        )
    )


@torch.no_grad()
def encoder_distances(key_encoder: nn.Module, query_encoder: nn.Module) -> dict[str, float]:
    """Of each stage how far the key encoder's weights are behind: the L2 norm of the difference over the query's norm."""
    queries = dict(query_encoder.named_parameters())
    apart = total_norms(
        by_stage((name, key - queries[name]) for name, key in key_encoder.named_parameters())
    )
    sizes = total_norms(by_stage(queries.items()))
    return {stage: distance / max(sizes[stage], 1e-12) for stage, distance in apart.items()}


class PairSimilarities(NamedTuple):
    """Cosines of a step, on the CPU."""

    positive: Tensor
    """(N,) of each query and its own key."""
    negative: Tensor
    """(P,) of queries and others' keys."""


def pair_similarities(
    query: Tensor, key: Tensor, negatives: Tensor, most_negatives: int = 1024
) -> PairSimilarities:
    """The cosines that a step compared: of `query` (N, C) with its own `key` (N, C) and with `negatives` (K, C).

    Args:
        negatives: may hold the own keys too, which are left out by their value.
        most_negatives: of more, so many evenly spaced ones are taken.
    """
    query, key = query.float(), key.float()
    others = evenly_spaced(negatives, most_negatives).float()
    similarities = query @ others.T  # (N, K)
    is_own = torch.cdist(key, others, compute_mode="donot_use_mm_for_euclid_dist") == 0
    return PairSimilarities((query * key).sum(dim=1).cpu(), similarities[~is_own].cpu())
