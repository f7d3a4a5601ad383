"""InfoNCE as a pure function. Letters: N batch, C embedding width, K negatives."""

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
