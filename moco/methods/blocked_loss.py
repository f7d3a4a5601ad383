"""InfoNCE without a buffer of N x K logits, and the rule that says when it is used.

On a CPU the blocked form is about twice as fast as the plain one, and it needs 3 MiB where the
plain one needs 198 (N = 256, K = 65,536). On a GPU the plain form is faster at usual sizes: 0.57 ms
against 0.98 ms at the same N and K. See docs/performance.md.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moco.methods.losses import Groups, info_nce, shares_of

MOST_PLAIN_LOGITS = 2**26
"""The plain form on a GPU may have this many logits: 256 MiB, of which it needs about three."""
MOST_QUERIES_PER_BLOCK = 1024
LOGITS_PER_BLOCK_ON_CPU = 2**19
"""2 MiB, which stay in the cache of a processor."""
LOGITS_PER_BLOCK_ON_GPU = 2**26
LOWEST_TEMPERATURE = 1 / 40
"""exp(40) is 2e17: float32 holds the sum of a billion of these, and their inverse."""


def efficient_info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor,
    temperature: float,
    groups: Groups | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Return `info_nce` by the form that is faster for the device and the sizes.

    Args:
        query: (N, C), unit norm, with gradient.
        key: (N, C), unit norm, no gradient.
        negatives: (K, C), unit norm, no gradient.
        temperature: T.
        groups, weights: see `info_nce`.
    """
    is_small = len(query) * len(negatives) <= MOST_PLAIN_LOGITS
    is_fast = query.device.type != "cpu" and is_small
    if is_fast or temperature < LOWEST_TEMPERATURE:
        return info_nce(query, key, negatives, temperature, groups, weights)
    return blocked_info_nce(query, key, negatives, temperature, groups, weights)


def blocked_info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor,
    temperature: float,
    groups: Groups | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Return `info_nce`, computed block by block.

    The loss can be differentiated once, with respect to the queries alone.

    Args:
        query: (N, C), unit norm, with gradient.
        key: (N, C), unit norm, no gradient.
        negatives: (K, C), unit norm, no gradient. They may change before the backward pass.
        temperature: T, at least `LOWEST_TEMPERATURE`.
        groups, weights: see `info_nce`.
    """
    needs_gradient = query.requires_grad and torch.is_grad_enabled()
    with torch.autocast(query.device.type, enabled=False):
        query, key, negatives = query.float(), key.float(), negatives.float()
        return _BlockedInfoNCE.apply(
            query, key, negatives, temperature, groups, weights, needs_gradient
        )


class _BlockedInfoNCE(torch.autograd.Function):
    """`blocked_info_nce`, whose gradient is computed in the forward pass.

    The loss ends in a mean, so the gradient of the queries is known up to the factor that comes
    from above. The logits are needed once, and nothing of size N x K is kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        negatives: Tensor,
        temperature: float,
        groups: Groups | None,
        weights: Tensor | None,
        needs_gradient: bool,
    ) -> Tensor:
        losses = []
        gradients = []
        for start in range(0, len(query), MOST_QUERIES_PER_BLOCK):
            rows = slice(start, start + MOST_QUERIES_PER_BLOCK)
            groups_of_rows = None
            if groups is not None:
                groups_of_rows = groups.of_queries(rows)
            block_losses, block_gradients = losses_and_gradients(
                query[rows], key[rows], negatives, temperature, groups_of_rows, needs_gradient
            )
            losses.append(block_losses)
            gradients.append(block_gradients)
        if weights is None:
            ctx.save_for_backward(torch.cat(gradients) / len(query))
            return torch.cat(losses).mean()
        shares = shares_of(weights)  # (N,)
        ctx.save_for_backward(torch.cat(gradients) * shares[:, None])
        return (torch.cat(losses) * shares).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upper_gradient: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return upper_gradient * gradient, None, None, None, None, None, None


def losses_and_gradients(
    query: Tensor,
    key: Tensor,
    negatives: Tensor,
    temperature: float,
    groups: Groups | None,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Return each query's loss (N,) and its gradient with respect to that query (N, C).

    With p the exponential of a logit and P the sum of p over the key and all negatives, the
    gradient is (sum of p * negative - (P - p of the key) * key) / (T * P). Both sums are collected
    block by block. Negatives of a query's own group have p = 0.

    Without `needs_gradient` the gradients are (N, 0).
    """
    scaled = query / temperature
    positive = (scaled * key).sum(dim=1)  # (N,)
    # Logits of unit vectors lie between -1/T and 1/T, so their exponentials need no common factor.
    total = torch.zeros_like(positive)  # (N,) sum of the negatives' exponentials
    weighted = key[:, :0]  # nothing is collected in it
    if needs_gradient:
        weighted = torch.zeros_like(key)  # (N, C)
    logits_per_block = LOGITS_PER_BLOCK_ON_GPU
    if query.device.type == "cpu":
        logits_per_block = LOGITS_PER_BLOCK_ON_CPU
    columns = logits_per_block // len(query)
    buffer = query.new_empty(len(query) * min(columns, len(negatives)))
    for start in range(0, len(negatives), columns):
        of_block = slice(start, start + columns)
        block = negatives[of_block]
        # A view of one buffer, so that all blocks use the same part of the cache.
        num_logits = len(query) * len(block)
        logits = buffer[:num_logits].view(len(query), len(block))
        torch.mm(scaled, block.T, out=logits)
        exponentials = logits.exp_()
        if groups is not None:
            exponentials.masked_fill_(groups.is_own(of_block), 0)
        total = total + exponentials.sum(dim=1)
        if needs_gradient:
            weighted = torch.addmm(weighted, exponentials, block)
    losses = F.softplus(total.log() - positive)  # log(1 + total / exp(positive))
    # softplus hides a positive of infinity, which the plain form turns into NaN.
    losses = losses + 0 * positive
    if not needs_gradient:
        return losses, weighted
    scale = (total + positive.exp()) * temperature
    gradients = (weighted - total[:, None] * key) / scale[:, None]
    return losses, gradients
