"""Images per second that become two views: `bench_data.py`'s pipelines on files and on images in memory."""

import argparse
from collections.abc import Iterator

import bench_data

from benchmarks.peers import Peers
from benchmarks.turns import Case


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--what", nargs="+", choices=bench_data.KINDS, default=list(bench_data.KINDS)
    )
    bench_data.add_arguments(parser)


def cases(arguments: argparse.Namespace, peers: Peers) -> Iterator[Case]:
    """All pipelines of ``files`` on one core, and those of ``memory``."""
    if arguments.tiny:
        arguments.images, arguments.size, arguments.memory_images = 4, "64x48", 16
    for what in arguments.what:
        with bench_data.turns_of(what, arguments) as turns:
            ready = {
                name: (lambda turn=turn: turn)
                for name, turn in turns.items()
                if name != "lightly" or name in peers
            }
            yield Case(
                what,
                ready,
                tuple(name for name in ready if name.startswith(("official", "lightly"))),
            )
