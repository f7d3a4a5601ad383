"""Measure how many images per second become two views, with the pipelines of `bench_data.py`."""

import argparse
from collections.abc import Iterator
from functools import partial

import bench_data

from benchmarks.peers import Peers
from benchmarks.turns import Case, return_it


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--what", nargs="+", choices=bench_data.KINDS, default=list(bench_data.KINDS)
    )
    bench_data.add_arguments(parser)


def cases(arguments: argparse.Namespace, peers: Peers) -> Iterator[Case]:
    """Yield the pipelines of ``files``, on one core, and those of ``memory``."""
    if arguments.tiny:
        arguments.images, arguments.size, arguments.memory_images = 4, "64x48", 16
    for what in arguments.what:
        with bench_data.turns_of(what, arguments) as turns:
            ready = {}
            for name, turn in turns.items():
                if name != "lightly" or name in peers:
                    ready[name] = partial(return_it, turn)
            references = [name for name in ready if name.startswith(("official", "lightly"))]
            yield Case(what, ready, references)
