"""Label-free figures of a training step or of a dataset's features. Tensors in, numbers out."""

from collections.abc import Iterable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

Rows = TypeVar("Rows", np.ndarray, Tensor)

CONTAINERS = ("encoder", "features", "layers")
"""torchvision's names of the parts of a backbone that hold the stages of a Swin or the blocks of a
ViT."""

MOST_ROWS = 25_600
"""A rank is estimated from at most this many rows, as in RankMe (arXiv 2210.02885)."""

MOST_PAIRED_ROWS = 5_000
"""All pairs are compared of at most this many rows."""


def embedding_std(embeddings: Tensor) -> Tensor:
    """Return the standard deviation of each dimension over the batch, averaged over dimensions.

    It is 0 after a collapse and 1 / sqrt(embedding_dim) for embeddings that are spread evenly.
    Section 4.1 of SimSiam (arXiv 2011.10566).

    Args:
        embeddings: (batch, embedding_dim), unit norm.
    """
    return embeddings.float().std(dim=0, correction=0).mean()


def positive_similarity(query: Tensor, key: Tensor) -> Tensor:
    """Return the mean cosine between each query and its own key.

    Args:
        query, key: (batch, embedding_dim) each, unit norm.
    """
    return (query.float() * key.float()).sum(dim=1).mean()


def negative_similarity(query: Tensor, negatives: Tensor) -> Tensor:
    """Return the mean cosine over all pairs of a query and a negative.

    Args:
        query: (batch, embedding_dim), unit norm.
        negatives: (negatives, embedding_dim), unit norm.
    """
    return torch.dot(query.float().mean(dim=0), negatives.float().mean(dim=0))


def in_batch_negative_similarity(query: Tensor, key: Tensor, keys: Tensor) -> Tensor:
    """Return the mean cosine over all pairs of a query and a key that is not its own.

    Args:
        query, key: (batch, embedding_dim) each, unit norm; a query's own key is in its row.
        keys: (keys, embedding_dim), unit norm, all keys; they include `key`.
    """
    # Each query's own key is among the keys, so its pair is taken out of the sum.
    all_pairs = len(keys) * negative_similarity(query, keys)
    return (all_pairs - positive_similarity(query, key)) / (len(keys) - 1)


def alignment(query: Tensor, key: Tensor) -> Tensor:
    """Return the mean squared distance between the two embeddings of an image.

    It is 0 if they are equal and 2 for unrelated directions. Section 4.1 of arXiv 2005.10242, with
    alpha 2.

    Args:
        query, key: (batch, embedding_dim) each, unit norm; an image has the same row in both.
    """
    return (query.float() - key.float()).square().sum(dim=1).mean()


def uniformity(embeddings: Tensor) -> Tensor:
    """Return the logarithm of the mean Gaussian potential of all pairs.

    It is 0 if all rows are equal, and near -4 if they are spread evenly in many dimensions. Section
    4.1 of arXiv 2005.10242, with t 2.

    Args:
        embeddings: (rows, embedding_dim), unit norm, at least two rows.
    """
    # pdist has every pair once, and no row with itself.
    squared_distances = torch.pdist(embeddings.float()).square()
    return squared_distances.mul(-2).exp().mean().log()


def rank_me(embeddings: Tensor) -> float:
    """Return the effective number of dimensions of the rows, from 1 to min(rows, dim).

    It is the exponential of the entropy of the singular values, divided by their sum: RankMe (arXiv
    2210.02885), after the effective rank of Roy and Vetterli (EUSIPCO 2007). NaN if a value is not
    finite.

    Args:
        embeddings: (rows, dim).
    """
    # Squares of singular values lose half of the digits.
    rows = embeddings.double()
    if not bool(rows.isfinite().all()):
        return float("nan")
    if len(rows) <= rows.shape[1]:
        # The smaller one of the two products has the same singular values.
        rows = rows.T
    products = rows.T @ rows
    singular_values = torch.linalg.eigvalsh(products.cpu()).clamp(min=0).sqrt()
    return float(exponential_of_entropy(singular_values))


def lidar(embeddings: Tensor) -> float:
    """Return the effective number of dimensions in which images differ more than their own views.

    It is between 1 and embedding_dim. LiDAR (arXiv 2312.04000, section 4) takes the eigenvalues of
    the scatter between images, whitened by the scatter of views around their image's mean, which
    has 1e-4 added to its diagonal.

    Args:
        embeddings: (images, views, embedding_dim), at least two augmented views of each image.
    """
    views = embeddings.double()
    means = views.mean(dim=1)  # (images, embedding_dim)
    between = (means - means.mean(dim=0)).T.cov(correction=0)
    within = (views - means[:, None]).flatten(0, 1).T.cov(correction=0)
    within = within + 1e-4 * torch.eye(len(within)).to(within)
    values, vectors = torch.linalg.eigh(within)
    # The inverse square root of the scatter of views.
    whitening = vectors * values.rsqrt() @ vectors.T
    eigenvalues = torch.linalg.eigvalsh(whitening @ between @ whitening).clamp(min=0)
    return float(exponential_of_entropy(eigenvalues))


def exponential_of_entropy(weights: Tensor) -> Tensor:
    """Return how many of the weights count: all if they are equal, 1 if one of them is all.

    Args:
        weights: (n,), none negative. If all are 0, the result is 1.
    """
    total = weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
    # RankMe and LiDAR both add 1e-7.
    shares = weights / total + 1e-7
    return (-shares * shares.log()).sum().exp().clamp(min=1)


def label_free_figures(
    features: np.ndarray, embeddings: np.ndarray | None, views: np.ndarray | None = None
) -> dict[str, float]:
    """Return the label-free figures of an encoder, by their names in TensorBoard.

    Args:
        features: (images, feature_dim) the backbone's features of plain images.
        embeddings: (images, embedding_dim) the projector's embeddings of the same images; of any
            norm. None: only the rank of the features is measured.
        views: (images, views, embedding_dim) embeddings of at least two augmented views of other or
            the same images; of any norm. Without them there is no alignment and no LiDAR.
    """
    some_features = torch.from_numpy(evenly_spaced(features, MOST_ROWS))
    figures = {"label_free/feature_rank_me": rank_me(some_features)}
    if embeddings is None:
        return figures
    some_embeddings = torch.from_numpy(evenly_spaced(embeddings, MOST_ROWS))
    units = nn.functional.normalize(some_embeddings.float(), dim=1)
    figures["label_free/rank_me"] = rank_me(units)
    figures["label_free/embedding_std"] = float(embedding_std(units))
    figures["label_free/uniformity"] = float(uniformity(evenly_spaced(units, MOST_PAIRED_ROWS)))
    if views is not None:
        unit_views = nn.functional.normalize(torch.from_numpy(views).float(), dim=2)
        figures["label_free/alignment"] = float(alignment(unit_views[:, 0], unit_views[:, 1]))
        figures["label_free/lidar"] = lidar(unit_views)
    return figures


def evenly_spaced(rows: Rows, most: int) -> Rows:
    """Return all rows, or `most` of them from the first to the last."""
    if len(rows) <= most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]


def stage_of(name: str) -> str:
    """Return the stage of an encoder that a parameter belongs to.

    For example ``backbone.layer1``, ``backbone.features.1`` or ``projector``.
    """
    parts = name.split(".")
    end = 2 if parts[0] == "backbone" else 1
    while parts[end - 1] in CONTAINERS:
        end += 1
    return ".".join(parts[:end])


def norms_by_stage(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
    """Return the L2 norm of each stage's tensors together.

    Args:
        tensors: pairs of a parameter's name and a tensor.
    """
    stages: dict[str, list[Tensor]] = {}
    for name, tensor in tensors:
        stages.setdefault(stage_of(name), []).append(tensor)
    return {stage: float(nn.utils.get_total_norm(parts)) for stage, parts in stages.items()}


def gradient_norms(encoder: nn.Module) -> dict[str, float]:
    """Return the L2 norm of each stage's gradients.

    Stages without gradients are omitted, so a skipped step has none.
    """
    gradients = []
    for name, parameter in encoder.named_parameters():
        if parameter.grad is not None:
            gradients.append((name, parameter.grad))
    return norms_by_stage(gradients)


@torch.no_grad()
def encoder_distances(key_encoder: nn.Module, query_encoder: nn.Module) -> dict[str, float]:
    """Return how far each stage of the key encoder is behind the query encoder.

    It is the L2 norm of the difference of their weights, divided by that of the query encoder's.
    """
    query_weights = dict(query_encoder.named_parameters())
    differences = []
    for name, key_weight in key_encoder.named_parameters():
        differences.append((name, key_weight - query_weights[name]))
    sizes = norms_by_stage(query_weights.items())
    distances = norms_by_stage(differences)
    return {stage: distance / max(sizes[stage], 1e-12) for stage, distance in distances.items()}


def pair_similarities(
    query: Tensor, key: Tensor, negatives: Tensor, most_negatives: int = 1024
) -> dict[str, Tensor]:
    """Return the cosines that a step compared, on the CPU.

    ``positive`` (batch,) are those of each query and its own key, ``negative`` (pairs,) those of
    queries and the keys of other images.

    Args:
        query, key: (batch, embedding_dim) each, unit norm.
        negatives: (negatives, embedding_dim), unit norm. They may include the queries' own keys,
            which are recognised by their value and left out.
        most_negatives: of more negatives, this many evenly spaced ones are taken.
    """
    query, key = query.float(), key.float()
    others = evenly_spaced(negatives, most_negatives).float()
    similarities = query @ others.T  # (batch, negatives)
    # By differences: a matrix product would not give exactly 0 for equal rows.
    is_own = torch.cdist(key, others, compute_mode="donot_use_mm_for_euclid_dist") == 0
    positive = (query * key).sum(dim=1)
    return {"positive": positive.cpu(), "negative": similarities[~is_own].cpu()}
