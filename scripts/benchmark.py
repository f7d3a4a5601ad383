"""What this project and its peers take, side by side: same machine, same run, same work, in turns.

    python scripts/benchmark.py step|loss|update|data|knn|swin|end_to_end|startup
        [--against lightly] [--against official=PATH] [--only 'resnet18*fp32*'] [--repeats 5] [--sittings 1] [--threads 2]
        [--device cpu] [--json FILE] [--tiny]

`python scripts/benchmark.py step --help` shows what else ``step`` takes, and so on. ``--against`` names the peers that take
part: by default every one that is installed; ``official`` is a checkout of facebookresearch/moco. Peers run as they are.

The tables hold medians, with the lowest and highest turn, and the time over each reference's, below 1 is faster: the median
over the rounds of the ratio within one round. Trust these; single times only on a machine that does nothing else.
``--only`` takes patterns of ``case: contender``; the lower bound always comes along. ``--json`` keeps every turn.
``--tiny`` shows in seconds that everything works, and its figures mean nothing.
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

KINDS = ("step", "loss", "update", "data", "knn", "swin", "end_to_end", "startup")


def positive(text: str) -> int:
    """A count from the command line, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; the chosen kind, which alone is imported, adds its own options."""
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
        "--only", nargs="+", default=[], metavar="PATTERN", help="of 'case: contender'"
    )
    parser.add_argument("--repeats", type=positive, default=5, help="rounds that count")
    parser.add_argument(
        "--sittings",
        type=positive,
        default=1,
        help="new processes for all contenders, each with its rounds",
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
    """Measure, print a table after each case, and at the end all of them with the machine.

    Raises:
        InputError: a peer is not there.
    """
    peers = peers_of(arguments.against)
    torch.set_num_threads(arguments.threads)
    machine = describe(torch.device(arguments.device), arguments.threads) | versions(peers)
    settings: dict[str, Any] = {
        name: value for name, value in vars(arguments).items() if name not in ("kind", "json")
    }
    rows: list[Row] = []
    for case in importlib.import_module(f"benchmarks.{arguments.kind}").cases(arguments, peers):
        say = partial(console.print, highlight=False)
        found = measure(case, arguments.repeats, arguments.only, say, arguments.sittings)
        rows += found
        for row in found:
            console.print(f"{row.case}: {row.contender}: {report.spread(row)} ms", highlight=False)
        if arguments.json:  # after each case: what was measured is kept when a later one fails
            report.write(arguments.json, arguments.kind, settings, machine, rows)
    report.show(console, rows, machine)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Entry point: the exit code is 2, with one line, for a peer that is not there."""
    given = parsed(arguments)
    logging.getLogger("pytorch_lightning").setLevel(
        logging.WARNING
    )  # it would tell of every Trainer that there is no GPU
    if getattr(given, "memory_of", None):
        importlib.import_module("benchmarks.loss").print_memory_of(
            given.memory_of[0], *map(int, given.memory_of[1:])
        )
        return
    try:
        run(given, Console(width=None if sys.stdout.isatty() else report.WIDTH))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
