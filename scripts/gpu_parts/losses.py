"""Measure InfoNCE forward and backward against other implementations, as `benchmarks/loss.py`."""

from functools import partial

from benchmarks import loss

from gpu_parts.measuring import Context, in_turns, rows_of_case
from gpu_parts.results import Result
from gpu_parts.rows import LIGHTLY, PRODUCTS


def measure(case: str, context: Context) -> list[Result]:
    """Measure all implementations in one process, in turns."""
    num_queries, queue_size = context.sizes.losses[case]
    calls = 2 if context.is_rehearsal else loss.calls_of(queue_size, context.device)
    contenders = {
        name: partial(loss.turn_of, build, num_queries, queue_size, context.device, calls)
        for name, build in loss.forms(context.peers).items()
    }
    rows = rows_of_case("loss", case, context)
    return in_turns(context, rows, contenders, (PRODUCTS, LIGHTLY))
