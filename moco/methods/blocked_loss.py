"""InfoNCE without a buffer of N x K logits, and the rule that says when it is used.

On a CPU the blocked form is about twice as fast as the plain one, and it needs 3 MiB where the
plain one needs 198 (N = 256, K = 65,536). On a GPU the plain form is faster at usual sizes: 0.57 ms
against 0.98 ms at the same N and K. See docs/performance.md.
"""

from typing import Any, Protocol

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
SMALLEST_TOTAL = 1e-30
"""Less than the smallest exponential, exp(-40)."""


class LeftOutNegatives(Protocol):
    """Says which negatives a query's loss leaves out, such as `Groups`."""

    def is_own(self, columns: slice) -> Tensor:
        """Return which of these negatives are left out for each query, (N, columns) bool."""

    def of_queries(self, rows: slice) -> "LeftOutNegatives":
        """Return the same for some of the queries."""


def is_plain_form_better(query: Tensor, negatives: Tensor, temperature: float) -> bool:
    """Return whether a loss should make all N x K logits at once.

    Args:
        query: (N, C).
        negatives: (K, C).
        temperature: T.
    """
    is_small = len(query) * len(negatives) <= MOST_PLAIN_LOGITS
    is_fast = query.device.type != "cpu" and is_small
    return is_fast or temperature < LOWEST_TEMPERATURE


def columns_per_block(num_queries: int, device_type: str) -> int:
    """Return how many negatives make a block of logits with these queries."""
    logits_per_block = LOGITS_PER_BLOCK_ON_GPU
    if device_type == "cpu":
        logits_per_block = LOGITS_PER_BLOCK_ON_CPU
    return logits_per_block // num_queries


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
    if is_plain_form_better(query, negatives, temperature):
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
    total, weighted = sums_over_negatives(scaled, negatives, groups, needs_gradient)
    losses = F.softplus(total.log() - positive)  # log(1 + total / exp(positive))
    # softplus hides a positive of infinity, which the plain form turns into NaN.
    losses = losses + 0 * positive
    if not needs_gradient:
        return losses, weighted
    scale = (total + positive.exp()) * temperature
    gradients = (weighted - total[:, None] * key) / scale[:, None]
    return losses, gradients


def blocked_log_total(
    query: Tensor, negatives: Tensor, temperature: float, left_out: LeftOutNegatives | None
) -> Tensor:
    """Return the logarithm of the sum of exp(query * negative / T) over the negatives, (N,).

    It is computed block by block. It can be differentiated once, with respect to the queries alone.

    Args:
        query: (N, C), unit norm, float32, with gradient.
        negatives: (K, C), unit norm, float32, no gradient. They may change before the backward
            pass.
        temperature: T, at least `LOWEST_TEMPERATURE`.
        left_out: the negatives that do not count; None: all count.
    """
    needs_gradient = query.requires_grad and torch.is_grad_enabled()
    return _BlockedLogTotal.apply(query, negatives, temperature, left_out, needs_gradient)


class _BlockedLogTotal(torch.autograd.Function):
    """`blocked_log_total`, whose gradient is computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        negatives: Tensor,
        temperature: float,
        left_out: LeftOutNegatives | None,
        needs_gradient: bool,
    ) -> Tensor:
        totals = []
        gradients = []
        for start in range(0, len(query), MOST_QUERIES_PER_BLOCK):
            rows = slice(start, start + MOST_QUERIES_PER_BLOCK)
            left_out_of_rows = None
            if left_out is not None:
                left_out_of_rows = left_out.of_queries(rows)
            scaled = query[rows] / temperature
            total, weighted = sums_over_negatives(
                scaled, negatives, left_out_of_rows, needs_gradient
            )
            totals.append(total)
            # A query without any negatives has the total 0, and a gradient of 0.
            scale = total.clamp(min=SMALLEST_TOTAL) * temperature
            gradients.append(weighted / scale[:, None])
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(totals).log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upper_gradient: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return upper_gradient[:, None] * gradient, None, None, None, None


def sums_over_negatives(
    scaled: Tensor,
    negatives: Tensor,
    left_out: LeftOutNegatives | None,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Return two sums over the negatives, collected block by block.

    With p the exponential of a logit they are the sum of p, (N,), and the sum of p * negative,
    (N, C), which is (N, 0) without `needs_gradient`. Negatives that are left out have p = 0.

    Args:
        scaled: (N, C), the queries divided by T.
    """
    # Logits of unit vectors lie between -1/T and 1/T, so their exponentials need no common factor.
    total = scaled.new_zeros(len(scaled))
    weighted = scaled[:, :0]  # nothing is collected in it
    if needs_gradient:
        weighted = torch.zeros_like(scaled)
    columns = columns_per_block(len(scaled), scaled.device.type)
    buffer = scaled.new_empty(len(scaled) * min(columns, len(negatives)))
    for start in range(0, len(negatives), columns):
        of_block = slice(start, start + columns)
        block = negatives[of_block]
        # A view of one buffer, so that all blocks use the same part of the cache.
        num_logits = len(scaled) * len(block)
        logits = buffer[:num_logits].view(len(scaled), len(block))
        torch.mm(scaled, block.T, out=logits)
        exponentials = logits.exp_()
        if left_out is not None:
            exponentials.masked_fill_(left_out.is_own(of_block), 0)
        total = total + exponentials.sum(dim=1)
        if needs_gradient:
            weighted = torch.addmm(weighted, exponentials, block)
    return total, weighted
