"""Run what a GPU runs on machines without one, on the stand-in of `tests.stand_in.gpu`.

The tests check devices, types, layouts and waits. The stand-in computes no numbers.
"""

import json
import sys

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.processes import run_to_end

pytestmark = [
    pytest.mark.skipif(
        torch.version.cuda is None,
        reason="needs a build of PyTorch with CUDA, for its fake kernels",
    ),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a real GPU, and the tests marked gpu use it"
    ),
]

MIXED = "16-mixed"
OPTIMIZER = "_local_scalar_dense in moco.py: optimizer_step"
BAD_STEPS = "_local_scalar_dense in bad_steps.py: on_before_optimizer_step"
COUNTED = "_local_scalar_dense in bad_steps.py: _read"
# Waits that are allowed between two steps that are not logged, as (wait, reason). A key is a part
# of the case's name.
ALLOWED = {
    MIXED: [
        (OPTIMIZER, "PyTorch's loss scaling asks in every step whether a gradient is infinite"),
    ],
    "lars": [
        (BAD_STEPS, "timm's LARS has no kernel that skips a bad step by itself"),
        (COUNTED, "the host knows the answer by then, and counts it"),
    ],
}


def sweep(folder, size):
    """Run the sweep in a process of its own; return the results by case."""
    told = run_to_end(
        sys.executable, "-m", "tests.stand_in.sweep", folder, size, cwd=REPOSITORY, timeout=3600
    )
    assert told.returncode == 0, told.stderr[-4000:]
    return {result["case"]: result for result in map(json.loads, told.stdout.splitlines())}


def allowed_for(case):
    waits = set()
    for part, of_part in ALLOWED.items():
        if part in case:
            waits |= {wait for wait, _ in of_part}
    return waits


def assert_healthy(results):
    failed = {case: result["error"] for case, result in results.items() if result["error"]}
    assert not failed
    waiting = {case: set(result["waits"]) - allowed_for(case) for case, result in results.items()}
    assert not {case: waits for case, waits in waiting.items() if waits}


def assert_faults_are_found(results):
    missed = [
        case for case, result in results.items() if not result["error"] and not result["waits"]
    ]
    assert not missed


def parts(results):
    """Return the healthy cases, and those with a planted fault."""
    faults = {case: result for case, result in results.items() if case.startswith("fault: ")}
    healthy = {case: result for case, result in results.items() if case not in faults}
    return healthy, faults


@pytest.mark.slow
def test_programs_and_steps_keep_to_the_gpu_and_do_not_wait(tmp_path):
    healthy, faults = parts(sweep(tmp_path, "quick"))
    assert len(healthy) >= 9
    assert_healthy(healthy)
    assert len(faults) == 8
    assert_faults_are_found(faults)


@pytest.mark.slow
def test_every_method_family_and_precision_keeps_to_the_gpu_and_does_not_wait(tmp_path):
    healthy, faults = parts(sweep(tmp_path, "full"))
    assert len(healthy) >= 72 + 68  # each method, family and precision; each as one of two GPUs
    assert_healthy(healthy)
    assert_faults_are_found(faults)
