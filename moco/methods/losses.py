"""InfoNCE as a pure function, of images and of the cells of a grid.

Letters: N batch, M batch of all devices, C embedding width, D feature width, K negatives, S cells of the grid, n rows of one
block of queries.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 1024
"""Queries of one block, at most."""
BLOCK = {"cpu": 2**19}
"""Logits of one block, on a CPU so many that they stay in its cache (2 MiB)."""
HIGHEST = 40.0
"""A logit whose exponential, 2e17, fp32 can add up a billion times and more; its inverse is no number too small either."""
BLOCK_ON_A_GPU = 2**26
"""A quarter of a GiB: with 256 queries the 65,536 negatives of the official queue are one block."""


def info_nce(query: Tensor, key: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy of finding each query's own key among its key and all negatives, in nats.

    Equation 1 of arXiv 1911.05722. With every similarity equal it is log(1 + K).

    Args:
        query: (N, C), unit norm; carries the gradient, alone.
        key: (N, C), unit norm; row i is the positive of query i.
        negatives: (K, C), unit norm; K = 0 makes the loss 0. They may change before the backward pass.
        temperature: T.
    """
    # fp32 whatever the precision: with T = 0.07 a similarity error of bf16's 1/256 would move a logit by 0.06.
    with torch.autocast(query.device.type, enabled=False):
        with_gradient = query.requires_grad and torch.is_grad_enabled()
        return InfoNCE.apply(
            query.float(), key.float(), negatives.float(), temperature, with_gradient
        )


class InfoNCE(torch.autograd.Function):
    """`info_nce` with its gradient made in the forward pass.

    The loss ends in a mean, so that the gradient of the queries is known up to the factor that comes from above. That needs
    the logits once, block by block, and neither they nor the negatives have to be kept for the backward pass: a queue may
    replace them meanwhile. There is no second derivative.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        negatives: Tensor,
        temperature: float,
        with_gradient: bool,
    ) -> Tensor:
        blocks = zip(query.split(ROWS), key.split(ROWS), strict=True)
        parts = [contrast(*rows, negatives, temperature, with_gradient) for rows in blocks]
        losses, gradients = (
            parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
        )
        ctx.save_for_backward(gradients / len(query))
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (of_query,) = ctx.saved_tensors
        return gradient * of_query, None, None, None, None


def contrast(
    query: Tensor, key: Tensor, negatives: Tensor, temperature: float, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Each query's own loss (n,), and its gradient with respect to that query (n, C), or (n, 0) without.

    The exponentials of the negatives' logits are added up block by block, and with them, as weights, the negatives
    themselves: what they weigh more or less than the key, over T and the sum of all exponentials, is the gradient. Where
    they could leave the range of fp32 they are taken relative to the highest logit so far (arXiv 1805.02867), for which
    every block has to be looked at twice more.
    """
    scaled = query / temperature
    positive = (scaled * key).sum(dim=1)  # (n,)
    is_in_range = 1 / temperature <= HIGHEST  # of unit vectors
    highest: Tensor | float = 0.0 if is_in_range else positive
    total = torch.zeros_like(positive)
    weighted = torch.zeros_like(key) if with_gradient else key[:, :0]  # (n, C)
    columns = BLOCK.get(query.device.type, BLOCK_ON_A_GPU) // len(query)
    room = query.new_empty(len(query) * min(columns, len(negatives)))
    for start in range(0, len(negatives), columns):
        block = negatives[start : start + columns]
        logits = torch.mm(
            scaled, block.T, out=room[: len(query) * len(block)].view(len(query), -1)
        )  # (n, columns)
        if isinstance(highest, Tensor):
            before, highest = highest, torch.maximum(highest, logits.amax(dim=1))
            shrink = (before - highest).exp()
            total, weighted = total * shrink, weighted * shrink[:, None]
            logits -= highest[:, None]
        weights = logits.exp_()
        total = total + weights.sum(dim=1)
        if with_gradient:
            weighted = torch.addmm(weighted, weights, block)
    # On a GPU each of these lines is a few small kernels, whose starts take longer than they do.
    above = positive - highest if isinstance(highest, Tensor) else positive
    losses = F.softplus(total.log() - above)  # log(1 + total / exp(above))
    losses = losses.add(positive, alpha=0)  # not a number where the positive is infinite
    if not with_gradient:
        return losses, weighted
    of_all = (total + above.exp()) * temperature
    return losses, torch.addcmul(weighted, total[:, None], key, value=-1) / of_all[:, None]


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
    positives = key_cells.gather(
        1, matches[:, :, None].expand(-1, -1, key_cells.shape[2])
    )  # (N, S, C)
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
