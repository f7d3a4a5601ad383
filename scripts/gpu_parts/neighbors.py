"""Measure kNN classification on the device against the bare matrix product."""

from collections.abc import Callable
from functools import partial

import bench_knn
import numpy as np
from benchmarks.turns import Turn, timed

from gpu_parts.measuring import Context, in_turns, rows_of_case
from gpu_parts.results import Result
from gpu_parts.rows import KNN_PRODUCT, LIGHTLY, OURS


def measure(case: str, context: Context) -> list[Result]:
    """Measure with bank and queries in the host's memory; the time includes their transfer."""
    num_rows, width, num_queries = context.sizes.banks[case]
    bank, queries = bench_knn.rows_of(0, num_rows, width), bench_knn.rows_of(2, num_queries, width)
    labels = np.random.default_rng(1).integers(0, bench_knn.NUM_CLASSES, num_rows)

    def turn_of(work: Callable[..., None]) -> Turn:
        return timed(partial(work, bank, labels, queries, context.device), context.device)

    contenders = {
        KNN_PRODUCT: partial(turn_of, bench_knn.product),
        OURS: partial(turn_of, bench_knn.ours),
    }
    if LIGHTLY in context.peers:
        contenders[LIGHTLY] = partial(turn_of, bench_knn.lightly)
    return in_turns(context, rows_of_case("knn", case, context), contenders, (KNN_PRODUCT, LIGHTLY))
