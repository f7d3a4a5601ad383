"""Measure kNN against the bare matrix product, each contender of `bench_knn.py` in a process."""

import argparse
from collections.abc import Iterator
from functools import partial

import bench_knn

from benchmarks.peers import Peers
from benchmarks.turns import Case, return_it


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--size", choices=bench_knn.SIZES, default="small")
    parser.add_argument("--folder", default=None, help="where the file of the large bank goes")


def cases(arguments: argparse.Namespace, peers: Peers) -> Iterator[Case]:
    size = "tiny" if arguments.tiny else arguments.size
    num_rows, width, num_queries = bench_knn.SIZES[size]
    with bench_knn.bank_file(size, arguments.folder) as path:
        turns = bench_knn.turns_of(size, arguments.threads, path, arguments.device)
        ready = {}
        for name, turn in turns.items():
            if name != "lightly" or name in peers:
                ready[name] = partial(return_it, turn)
        yield Case(
            f"bank {num_rows:,} x {width}, {num_queries:,} queries",
            ready,
            ("product", "lightly"),
            warm_ups=0,
        )
