"""Measure Swin V2-T, ours against torchvision's with the same weights, as `bench_swin.py` does."""

import argparse
from collections.abc import Iterator
from functools import partial

import bench_swin
import torch

from benchmarks.peers import Peers
from benchmarks.turns import Case, Turn, timed

TINY = ("64/4/fp32",)


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--case", nargs="+", default=bench_swin.CASES, help="image size/window/precision"
    )
    parser.add_argument("--no-memory", action="store_true", help="do not measure the peak memory")


def cases(arguments: argparse.Namespace, peers: Peers) -> Iterator[Case]:
    for case in TINY if arguments.tiny else arguments.case:
        steps, passes = {}, {}
        for name in ("torchvision", "ours"):
            steps[name] = partial(step_turn, name, case, arguments)
            passes[name] = partial(turn_of, name, bench_swin.forward, case, arguments.device)
        yield Case(f"{case}, forward and backward", steps, ("torchvision",))
        yield Case(f"{case}, forward", passes, ("torchvision",))


def step_turn(name: str, case: str, arguments: argparse.Namespace) -> Turn:
    """Return a turn of forward and backward with its peak memory.

    The memory is measured once, before, in a process of its own.
    """
    turn = turn_of(name, bench_swin.step, case, arguments.device)
    if arguments.no_memory:
        return turn
    peak = bench_swin.peak_memory(case, name, arguments.device)
    return lambda: {**turn(), "peak_mib": peak}


def turn_of(name: str, work: object, case: str, device: str) -> Turn:
    _, window, precision = bench_swin.parse(case)
    model, images = bench_swin.models(window, device)[name], bench_swin.images_of(case, device)
    return timed(partial(work, model, images, precision), torch.device(device), images=len(images))
