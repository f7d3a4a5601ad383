"""How long programs take to begin, in processes of their own, against ``import torch``."""

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
        "-m", "moco.train", "+experiment=quickstart", "trainer.max_steps=1", "evaluation.baselines=false",
        "hydra.run.dir=run", "resume=null",
    ],
}  # fmt: skip


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    pass


def cases(arguments: argparse.Namespace, peers: Peers) -> Iterator[Case]:
    contenders = {
        name: partial(started, command, arguments.threads) for name, command in PROGRAMS.items()
    }
    if arguments.tiny:
        contenders = {name: contenders[name] for name in ("python", "moco.train --help")}
        yield Case("start-up", contenders, ("python",), warm_ups=0)
        return
    yield Case(
        "start-up", contenders, (REFERENCE,)
    )  # the round that does not count brings the files into memory


def started(command: list[str], num_threads: int) -> Turn:
    """From the start of a process to its end, in an empty folder."""
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
