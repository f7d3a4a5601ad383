"""How often a query finds its key: the accuracy of the task that InfoNCE sets.

Shapes use N for the queries of this device, K for negatives and C for the width of an embedding.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SIMILARITIES_PER_BLOCK_ON_CPU = 2**19
"""2 MiB, which stay in the cache of a processor."""
SIMILARITIES_PER_BLOCK_ON_GPU = 2**22
"""16 MiB, a quarter of what N = 256 and K = 65,536 would need."""


@torch.no_grad()
def contrast_accuracy(
    query: Tensor,
    key: Tensor,
    negatives: Tensor,
    ks: tuple[int, ...] = (1, 5),
    first_own_row: int | None = None,
    is_own_group: Callable[[slice], Tensor] | None = None,
) -> Tensor:
    """Return for each k the share of queries whose key is among the k most similar of 1 + K keys.

    These are the Acc@1 and Acc@5 of the official code. Chance is k / (1 + K). There is no buffer of
    N x K, and nothing waits for the device. A negative that is as similar as the key counts as more
    similar, so that embeddings that are all the same are not right. The same holds for a similarity
    that is not a number.

    Args:
        query: (N, C), unit norm.
        key: (N, C), unit norm; row i is the positive of query i.
        negatives: (K, C), unit norm.
        ks: numbers of keys.
        first_own_row: for negatives that include the positives, as those of a batch do: the row of
            the first query's positive in `negatives`. The others follow it.
        is_own_group: returns for a block of negatives which of them are of each query's own group,
            (N, columns) bool. They are left out, as in the loss.

    Returns:
        (len(ks),) float32, on the device of the queries.

    Source: https://github.com/facebookresearch/moco, main_moco.py, ``accuracy``.
    """
    with torch.autocast(query.device.type, enabled=False):
        query, key, negatives = query.float(), key.float(), negatives.float()
        positive = (query * key).sum(dim=1, keepdim=True)  # (N, 1)
        on_cpu = query.device.type == "cpu"
        per_block = SIMILARITIES_PER_BLOCK_ON_CPU if on_cpu else SIMILARITIES_PER_BLOCK_ON_GPU
        width = max(1, per_block // max(1, len(query)))
        num_ahead = torch.zeros(len(query), device=query.device)  # exact up to 2**24
        for start in range(0, len(negatives), width):
            block = slice(start, start + width)
            # Not "greater or equal", which is false for NaN.
            is_ahead = ~(query @ negatives[block].T < positive)  # (N, width)
            if is_own_group is not None:
                is_ahead &= ~is_own_group(block)
            if first_own_row is not None:
                columns = torch.arange(start, start + is_ahead.shape[1], device=query.device)
                own = first_own_row + torch.arange(len(query), device=query.device)
                is_ahead &= own[:, None] != columns
            # A sum of bool takes twice as long on a CPU.
            num_ahead += is_ahead.float().sum(dim=1)
        is_found = positive.isfinite().T  # (1, N)
        return torch.cat([((num_ahead < k) & is_found).float().mean(dim=1) for k in ks])
