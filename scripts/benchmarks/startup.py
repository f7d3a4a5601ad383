"""Measure how long programs take to start, compared with ``import torch``."""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial

from benchmarks.memory import SCRIPTS
from benchmarks.peers import Peers
from benchmarks.turns import Case, Turn, timed

REFERENCE = "import torch"
PROGRAMS = {
    "python": ["-c", "pass"],
    REFERENCE: ["-c", "import torch"],
    "import pytorch_lightning": ["-c", "import pytorch_lightning"],
    "moco.train --help": ["-m", "moco.train", "--help"],
    "moco.train --cfg job": ["-m", "moco.train", "+experiment=quickstart", "--cfg", "job"],
    "the quickstart's first step, from start to end": [
        "-m",
        "moco.train",
        "+experiment=quickstart",
        "trainer.max_steps=1",
        "evaluation.baselines=false",
        "hydra.run.dir=run",
        "resume=null",
    ],
}


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    pass


def cases(arguments: argparse.Namespace, peers: Peers) -> Iterator[Case]:
    names, reference, warm_ups = list(PROGRAMS), REFERENCE, 1
    if arguments.tiny:
        names, reference, warm_ups = ["python", "moco.train --help"], "python", 0
    contenders = {}
    for name in names:
        contenders[name] = partial(started, PROGRAMS[name], arguments.threads)
    # The first round, which is not counted, brings the files into memory.
    yield Case("start-up", contenders, (reference,), warm_ups=warm_ups)


def started(command: list[str], num_threads: int) -> Turn:
    """Return a turn from the start of a process to its end, in an empty folder."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(SCRIPTS.parent),
        "OMP_NUM_THREADS": str(num_threads),
    }

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                [sys.executable, *command],
                cwd=folder,
                env=environment,
                capture_output=True,
                check=True,
            )

    return timed(work)
