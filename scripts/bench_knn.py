"""kNN classification against the bare matrix product of bank and queries, each measurement in a process of its own.

    python scripts/bench_knn.py [--size small|middle|large] [--threads 2] [--repeats 5] [--folder /tmp] [--device cuda]
    python scripts/bench_knn.py --indexes

small: a bank of 50,000 x 128 and 10,000 queries; middle: 200,000 x 512 and 5,000; large: 1,281,167 x 2048 and 2,000,
the bank mapped from a file of 10.5 GB that is made in --folder and removed in the end. Random features in 100 classes;
k 200, T 0.1. Takes turns in every repeat, so that a machine that is shared disturbs all alike; prints medians, ratios to the
product within a repeat, and peak memory: of the process, and what the measurement added to it. lightly takes part where it
is installed, faiss's IndexFlatIP with this project's vote as well.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from benchmarks.memory import resident_mib
from benchmarks.turns import Turn, in_turns, ratio, wait_for

from moco.evaluation.knn import Search
from moco.evaluation.neighbors import give_back

SIZES = {
    "tiny": (2000, 32, 100),
    "small": (50_000, 128, 10_000),
    "middle": (200_000, 512, 5_000),
    "large": (1_281_167, 2048, 2_000),
}
NUM_CLASSES, NUM_NEIGHBORS, TEMPERATURE = 100, 200, 0.1
BLOCK = 1024  # queries of one product
READ_BYTES = 2**27


def rows_of(seed: int, num_rows: int, width: int) -> np.ndarray:
    """Random features (num_rows, width)."""
    return np.random.default_rng(seed).standard_normal((num_rows, width), dtype=np.float32)


def write_bank(path: Path, num_rows: int, width: int) -> None:
    """A file of random features, written in blocks."""
    bank = np.lib.format.open_memmap(path, "w+", np.float32, (num_rows, width))
    height = READ_BYTES // (4 * width)
    for first in range(0, num_rows, height):
        block = bank[first : first + height]
        block[:] = rows_of(first, len(block), width)
        give_back(bank)


def product(
    bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, device: torch.device
) -> None:
    """The bare matrix product, in blocks; of a mapped bank with one read of it. On a GPU both travel there."""
    height = READ_BYTES // (4 * bank.shape[1]) if isinstance(bank, np.memmap) else len(bank)
    on_device = torch.from_numpy(queries).to(device)
    room = torch.empty(BLOCK, height, device=device)
    for first in range(0, len(bank), height):
        block = torch.from_numpy(
            np.array(bank[first : first + height]) if height < len(bank) else bank
        ).to(device)
        give_back(bank)
        for part in on_device.split(BLOCK):
            torch.mm(part, block.T, out=room[: len(part), : len(block)])
    wait_for(device)


def ours(bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, device: torch.device) -> None:
    """Search and vote of this project."""
    from moco.evaluation.knn import knn_accuracy

    knn_accuracy(
        bank, labels, queries, np.zeros(len(queries), np.int64), NUM_NEIGHBORS, TEMPERATURE, device
    )


def faiss_flat(
    bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, device: torch.device
) -> None:
    """Faiss's exact search with this project's vote."""
    import faiss

    from moco.evaluation.knn import vote

    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank / np.linalg.norm(bank, axis=1, keepdims=True))
    similarities, rows = index.search(
        queries / np.linalg.norm(queries, axis=1, keepdims=True), NUM_NEIGHBORS
    )
    vote(similarities, labels[rows], NUM_CLASSES, TEMPERATURE).argmax(axis=1)


def lightly(
    bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, device: torch.device
) -> None:
    """The knn_predict of lightly on blocks of queries."""
    from lightly.utils.benchmarking import knn_predict

    columns = F.normalize(torch.from_numpy(bank).to(device), dim=1).T.contiguous()
    on_device = torch.from_numpy(labels).to(device)
    for part in F.normalize(torch.from_numpy(queries).to(device), dim=1).split(BLOCK):
        knn_predict(part, columns, on_device, NUM_CLASSES, NUM_NEIGHBORS, TEMPERATURE)
    wait_for(device)


CONTENDERS = {work.__name__: work for work in (product, ours, faiss_flat, lightly)}


def measure(name: str, size: str, num_threads: int, path: str, device: torch.device) -> None:
    """In the child: print seconds and megabytes as JSON."""
    torch.set_num_threads(num_threads)
    if name == "faiss_flat":
        import faiss

        faiss.omp_set_num_threads(num_threads)
    num_rows, width, num_queries = SIZES[size]
    bank = np.load(path, mmap_mode="r") if size == "large" else rows_of(0, num_rows, width)
    labels = np.random.default_rng(1).integers(0, NUM_CLASSES, num_rows)
    queries = rows_of(2, num_queries, width)
    CONTENDERS[name](
        np.array(bank[:1000]), labels[:1000], queries[:10], device
    )  # libraries start their threads
    before = resident_mib("VmHWM")
    start = time.perf_counter()
    CONTENDERS[name](bank, labels, queries, device)
    seconds, peak = time.perf_counter() - start, resident_mib("VmHWM")
    print(json.dumps({"seconds": seconds, "peak": peak, "peak_mib": peak - before}))


def turns_of(size: str, num_threads: int, path: Path, device: str = "cpu") -> dict[str, Turn]:
    """The contenders, each in a process of its own, ready to take turns; ``peak_mib`` is what the measurement added.

    Args:
        path: the file of the large bank.
    """
    names = [name for name in CONTENDERS if name != "lightly" or find_spec("lightly")]
    names = ["product", "ours"] if size == "large" else names
    if device != "cpu":
        names = [name for name in names if name != "faiss_flat"]  # its wheel is for CPUs

    def turn(name: str) -> dict[str, float]:
        child = [
            sys.executable,
            __file__,
            "--child",
            name,
            "--size",
            size,
            "--threads",
            str(num_threads),
        ]
        child += ["--device", device]
        environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
        done = subprocess.run(
            [*child, "--bank", str(path)], env=environment, capture_output=True, check=True
        )
        return json.loads(done.stdout.splitlines()[-1])

    return {name: partial(turn, name) for name in names}


@contextlib.contextmanager
def bank_file(size: str, folder: str | None) -> Iterator[Path]:
    """Where the large bank is while this lasts; the others need no file."""
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        path = Path(inside, "bank.npy")
        if size == "large":
            write_bank(path, *SIZES["large"][:2])
        yield path


def run(size: str, num_threads: int, repeats: int, path: Path, device: str) -> None:
    """Measure all contenders in turns and print the table."""
    found = in_turns(turns_of(size, num_threads, path, device), repeats, warm_ups=0)
    num_rows, width, num_queries = SIZES[size]
    print(
        f"bank {num_rows:,} x {width}, {num_queries:,} queries, {device}, {num_threads} threads, {repeats} repeats"
    )
    for name, results in found.items():
        against = ratio(results, found["product"])
        keys = ("seconds", "peak", "peak_mib")
        seconds, peak, added = (statistics.median(one[key] for one in results) for key in keys)
        print(
            f"{name:<12}{seconds:9.2f} s {against:8.2f} x{peak:8.0f} MB peak{added:8.0f} MB added"
        )


def compare_indexes(num_threads: int) -> None:
    """What the approximate indexes lose, on features in overlapping clusters: 50,000 x 128 and 2,000 queries."""
    import faiss
    from moco.evaluation.approximate import KINDS, ApproximateIndex, recall

    from moco.evaluation.knn import Protocol, classify
    from moco.evaluation.neighbors import nearest_by_block

    torch.set_num_threads(num_threads)
    faiss.omp_set_num_threads(num_threads)
    centres = rows_of(3, NUM_CLASSES, 128)
    labels = np.random.default_rng(1).integers(0, NUM_CLASSES, 52_000)
    features = centres[labels] + 2 * rows_of(0, 52_000, 128)
    bank, queries = features[:50_000], features[50_000:]
    protocol = Protocol(NUM_NEIGHBORS, TEMPERATURE)

    def measured(search: Search) -> tuple[np.ndarray, float, float]:
        start = time.perf_counter()
        votes = classify(search, labels[:50_000], queries, labels[50_000:], [protocol])[protocol]
        return votes.predicted, votes.accuracy(1), time.perf_counter() - start

    exact, top1, seconds = measured(partial(nearest_by_block, bank))
    print(f"flat      {seconds:7.2f} s   top-1 {top1:.4f}")
    for kind in KINDS:
        index = ApproximateIndex(bank, kind)
        predicted, top1, seconds = measured(index.search)
        found, same = recall(index, bank, queries, NUM_NEIGHBORS), (predicted == exact).mean()
        print(
            f"{kind:<10}{seconds:7.2f} s   top-1 {top1:.4f}   recall {found:.4f}   same predictions {same:.4f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", default=None, help="where the file of the large bank goes")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--indexes", action="store_true", help="compare the approximate indexes instead"
    )
    parser.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--bank", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        measure(given.child, given.size, given.threads, given.bank, torch.device(given.device))
        return
    if given.indexes:
        compare_indexes(given.threads)
        return
    with bank_file(given.size, given.folder) as path:
        run(given.size, given.threads, given.repeats, path, given.device)


if __name__ == "__main__":
    main()
