"""Measure the images per second of a training with its data, as `benchmarks/end_to_end.py`."""

import argparse
import os

from benchmarks import end_to_end

from gpu_parts.measuring import Context, in_turns, rows_of_case
from gpu_parts.results import Result
from gpu_parts.rows import LIGHTLY, OFFICIAL, STEP_ALONE

MOST_WORKERS = 8
"""Loader processes of the peers."""
ROUNDS = 2
"""Each turn of ours compiles again."""


def measure(case: str, context: Context) -> list[Result]:
    """Measure on noise, because the content of the images does not change the cost."""
    net = context.sizes.trainings[case]
    arguments = argparse.Namespace(
        device=context.device.type,
        steps=context.sizes.training_steps,
        workers=0 if context.is_rehearsal else min(MOST_WORKERS, os.cpu_count() or 1),
        npz=None,
    )
    archive = end_to_end.write_noise(context.scratch, net, arguments.steps)
    contenders = end_to_end.case_of(net, archive, arguments, context.peers).contenders
    rounds = 1 if context.is_rehearsal else ROUNDS
    references = (STEP_ALONE, OFFICIAL, LIGHTLY)
    rows = rows_of_case("end_to_end", case, context)
    return in_turns(context, rows, contenders, references, is_prepared=True, repeats=rounds)
