"""Measure InfoNCE forward and backward, in time and peak memory.

It is compared with its two matrix products and with other implementations.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import of_lightly
from benchmarks.memory import in_child, limit_memory, peak_mib
from benchmarks.peers import Peers
from benchmarks.recipe import EMBEDDING_DIM, TEMPERATURE
from benchmarks.turns import Case, Turn, timed
from moco.methods.blocked_loss import efficient_info_nce

BOUND = "two matrix products"
TIMED = ((256, 4096), (256, 65536))  # queries, queue size
MEMORY = ((256, 65536), (256, 1048576), (4096, 65536), (4096, 1048576))
TINY, TINY_MEMORY = ((8, 64),), ((8, 64),)


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--no-memory", action="store_true", help="do not measure the peak memory")
    parser.add_argument(
        "--memory-of", nargs=3, metavar=("CONTENDER", "N", "K"), help=argparse.SUPPRESS
    )


def cases(arguments: argparse.Namespace, peers: Peers) -> Iterator[Case]:
    """Yield the times, with all contenders in one process, then the memory, in one process each."""
    device = torch.device(arguments.device)
    references = (BOUND, "plain form", "lightly")
    for num_queries, queue_size in TINY if arguments.tiny else TIMED:
        calls = calls_of(queue_size, device)
        contenders = {}
        for name, build in forms(peers).items():
            contenders[name] = partial(turn_of, build, num_queries, queue_size, device, calls)
        yield Case(f"N {num_queries:,}, K {queue_size:,}", contenders, references)
    if arguments.no_memory or device.type != "cpu":
        return
    for num_queries, queue_size in TINY_MEMORY if arguments.tiny else MEMORY:
        name = f"memory, N {num_queries:,}, K {queue_size:,}"
        contenders = {}
        for form in forms(peers):
            contenders[form] = partial(alone, form, num_queries, queue_size, arguments.threads)
        yield Case(name, contenders, references, repeats=1, warm_ups=0)


def calls_of(queue_size: int, device: torch.device) -> int:
    """Return the number of calls in one turn."""
    if device.type == "cuda":
        return 50
    return 10 if queue_size <= 4096 else 1


def forms(peers: Peers) -> dict[str, Callable[..., Callable[[], Any]]]:
    """Return the contenders; each is a function of (query, key, negatives)."""
    found = {BOUND: products, "ours": ours, "plain form": plain}
    if "lightly" in peers:
        found["lightly"] = lightly
    return found


def turn_of(
    build: Callable[..., Any], num_queries: int, queue_size: int, device: torch.device, calls: int
) -> Turn:
    return timed(build(*rows(num_queries, queue_size, device)), device, calls=calls)


def rows(num_queries: int, queue_size: int, device: torch.device) -> list[Tensor]:
    """Return queries, their keys and the negatives, all of unit norm.

    Their shapes are (num_queries, dim), (num_queries, dim) and (queue_size, dim).
    """
    generator = torch.Generator().manual_seed(0)
    counts = (num_queries, num_queries, queue_size)
    made = [
        F.normalize(torch.randn(count, EMBEDDING_DIM, generator=generator), dim=1).to(device)
        for count in counts
    ]
    made[0].requires_grad_()
    return made


def products(query: Tensor, key: Tensor, negatives: Tensor) -> Callable[[], None]:
    """Return the lower bound: the two matrix products for the logits and for the gradient.

    The memory of both results is allocated before.
    """
    query = query.detach()
    logits = query.new_empty(len(query), len(negatives))
    gradient = torch.empty_like(query)

    def work() -> None:
        torch.mm(query, negatives.T, out=logits)
        torch.mm(logits, negatives, out=gradient)

    return work


def forward_backward(loss_of: Callable[[], Tensor], query: Tensor) -> Callable[[], None]:
    def work() -> None:
        query.grad = None
        loss_of().backward()

    return work


def ours(query: Tensor, key: Tensor, negatives: Tensor) -> Callable[[], None]:
    return forward_backward(lambda: efficient_info_nce(query, key, negatives, TEMPERATURE), query)


def plain(query: Tensor, key: Tensor, negatives: Tensor) -> Callable[[], None]:
    """Compute the loss as the official code does.

    The logits have the shape (num_queries, 1 + queue_size), with the positive first.
    """
    target = torch.zeros(len(query), dtype=torch.long, device=query.device)

    def loss() -> Tensor:
        positive = (query * key).sum(dim=1, keepdim=True)
        logits = torch.cat([positive, query @ negatives.T], dim=1)
        return F.cross_entropy(logits / TEMPERATURE, target)

    return forward_backward(loss, query)


def lightly(query: Tensor, key: Tensor, negatives: Tensor) -> Callable[[], None]:
    """Call lightly's loss.

    It also normalises, copies the memory bank and adds the keys to it. It has no smaller part.
    """
    criterion = of_lightly.loss(len(negatives), EMBEDDING_DIM, TEMPERATURE).to(query.device)
    return forward_backward(lambda: criterion(query, key), query)


def alone(form: str, num_queries: int, queue_size: int, num_threads: int) -> Turn:
    """Return a turn that measures one call in a new process; its inputs are not counted."""
    return lambda: in_child(
        ["loss", "--memory-of", form, str(num_queries), str(queue_size)], num_threads
    )


def print_memory_of(form: str, num_queries: int, queue_size: int) -> None:
    """Print the figures of one call as JSON; the work of a child process.

    A small call before starts the threads and loads the libraries.
    """
    limit_memory()
    build = forms({"lightly": ""})[form]
    build(*rows(8, 64, torch.device("cpu")))()
    given = rows(num_queries, queue_size, torch.device("cpu"))
    measured: dict[str, float] = {}
    # The lower bound allocates its memory when it is built, so building is counted.
    added = peak_mib(lambda: measured.update(timed(build(*given))()))
    json.dump({**measured, "peak_mib": added}, sys.stdout)
