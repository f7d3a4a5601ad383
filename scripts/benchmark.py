"""Measure this project and its peers on the same machine, in the same run, with the same work.

    python scripts/benchmark.py KIND
        [--against lightly] [--against official=PATH] [--only 'resnet18*fp32*'] [--repeats 5]
        [--sittings 1] [--threads 2] [--device cpu] [--json FILE] [--tiny]

KIND is one of step, crops, switches, loss, update, data, knn, swin, timm, end_to_end and startup.
`python scripts/benchmark.py step --help` shows the further options of ``step``, and so on.
``--against`` names the peers that take part; by default, all that are installed do. ``official`` is
a checkout of facebookresearch/moco. Peers run unchanged.

The contenders take turns. The tables have the median of each contender, its lowest and highest
turn, and its time over the time of each reference: the median over the rounds of the ratio within
one round. Below 1 is faster. Trust these ratios. Trust single times only on a machine that does
nothing else.
``--only`` takes patterns of ``case: contender``; the lower bound always takes part. ``--json``
keeps every turn. ``--tiny`` shows within seconds that everything works; its figures mean nothing.
"""

import argparse
import importlib
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks import report
from benchmarks.machine import describe
from benchmarks.peers import peers_of, versions
from benchmarks.turns import Row, measure
from rich.console import Console

from moco.errors import InputError

KINDS = (
    "step",
    "crops",
    "switches",
    "loss",
    "update",
    "data",
    "knn",
    "swin",
    "timm",
    "end_to_end",
    "startup",
)


def positive(text: str) -> int:
    """Return a count from the command line, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line.

    Only the module of the chosen kind is imported. It adds its own options.
    """
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("kind", nargs="?", choices=KINDS)
    kind = first.parse_known_args(arguments)[0].kind
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument(
        "--against", action="append", default=[], metavar="PEER", help="lightly, official=PATH"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="only what matches 'case: contender'",
    )
    parser.add_argument("--repeats", type=positive, default=5, help="rounds that are counted")
    parser.add_argument(
        "--sittings",
        type=positive,
        default=1,
        help="how often all contenders are built anew, each time with all rounds",
    )
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--tiny", action="store_true")
    if kind:
        module = importlib.import_module(f"benchmarks.{kind}")
        module.add_arguments(parser.add_argument_group(kind, module.__doc__))
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace, console: Console) -> list[Row]:
    """Measure; print the times after each case, and one table with the machine at the end.

    Raises:
        InputError: a peer is not available.
    """
    peers = peers_of(arguments.against)
    torch.set_num_threads(arguments.threads)
    machine = describe(torch.device(arguments.device), arguments.threads) | versions(peers)
    settings: dict[str, Any] = dict(vars(arguments))
    del settings["kind"], settings["json"]
    say = partial(console.print, highlight=False)
    module = importlib.import_module(f"benchmarks.{arguments.kind}")
    rows: list[Row] = []
    for case in module.cases(arguments, peers):
        found = measure(case, arguments.repeats, arguments.only, say, arguments.sittings)
        rows += found
        for row in found:
            say(f"{row.case}: {row.contender}: {report.spread(row)} ms")
        if arguments.json:  # after each case, so that a case that fails later loses nothing
            report.write(arguments.json, arguments.kind, settings, machine, rows)
    report.show(console, rows, machine)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark; exit with code 2 and one line if a peer is not available."""
    given = parsed(arguments)
    # Lightning would say of every Trainer that there is no GPU.
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    if getattr(given, "memory_of", None):
        form, num_queries, queue_size = given.memory_of
        module = importlib.import_module("benchmarks.loss")
        module.print_memory_of(form, int(num_queries), int(queue_size))
        return
    try:
        run(given, Console(width=None if sys.stdout.isatty() else report.WIDTH))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
