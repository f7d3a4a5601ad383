"""InfoNCE as a pure function, of images and of the cells of a grid.

Letters: N batch, M batch of all devices, C embedding width, D feature width, K negatives, S cells of the grid.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(query: Tensor, key: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy of finding each query's own key among its key and all negatives, in nats.

    Equation 1 of arXiv 1911.05722. With every similarity equal it is log(1 + K).

    Args:
        query: (N, C), unit norm; carries the gradient.
        key: (N, C), unit norm; row i is the positive of query i.
        negatives: (K, C), unit norm; K = 0 makes the loss 0.
        temperature: T.
    """
    # fp32 whatever the precision: with T = 0.07 a similarity error of bf16's 1/256 would move a logit by 0.06.
    with torch.autocast(query.device.type, enabled=False):
        query, key, negatives = query.float(), key.float(), negatives.float()
        positive = (query * key).sum(dim=1, keepdim=True)  # (N, 1)
        logits = torch.cat([positive, query @ negatives.T], dim=1)  # (N, 1 + K)
        target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        return F.cross_entropy(logits / temperature, target)


def in_batch_info_nce(query: Tensor, keys: Tensor, temperature: float, rank: int = 0) -> Tensor:
    """Mean cross-entropy of finding each query's own key among the keys of a batch, in nats: MoCo v3 without its factor 2T.

    Algorithm 1 of arXiv 2104.02057. With every similarity equal it is log(M).

    Args:
        query: (N, C), unit norm; carries the gradient.
        keys: (M, C), unit norm; those of all devices, N each, in the order of their ranks.
        temperature: T.
        rank: of the device whose queries these are.
    """
    with torch.autocast(query.device.type, enabled=False):
        logits = query.float() @ keys.float().T  # (N, M)
        own = rank * len(query) + torch.arange(len(query), device=query.device)  # (N,)
        return F.cross_entropy(logits / temperature, own)


def dense_info_nce(
    query_cells: Tensor, key_cells: Tensor, matches: Tensor, negatives: Tensor, temperature: float
) -> Tensor:
    """Mean InfoNCE over the cells of all queries, in nats: the dense loss of DenseCL (arXiv 2011.09157, section 3).

    Args:
        query_cells: (N, S, C), unit norm; carries the gradient.
        key_cells: (N, S, C), unit norm.
        matches: (N, S), which cell of its own key is the positive of each query cell.
        negatives: (K, C), unit norm.
        temperature: T.
    """
    positives = key_cells.gather(1, matches[:, :, None].expand(-1, -1, key_cells.shape[2]))  # (N, S, C)
    return info_nce(query_cells.flatten(0, 1), positives.flatten(0, 1), negatives, temperature)


@torch.no_grad()
def most_similar_cells(query_features: Tensor, key_features: Tensor) -> Tensor:
    """For each cell of each query, the most similar cell of its own key, (N, S): the correspondence of DenseCL, section 3.

    Args:
        query_features, key_features: the backbone's features of the cells, (N, S, D) each, unit norm.
    """
    with torch.autocast(query_features.device.type, enabled=False):
        similarities = query_features.float() @ key_features.float().transpose(1, 2)  # (N, S, S)
        return similarities.argmax(dim=2)
