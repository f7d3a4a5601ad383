"""kNN classification against the bare matrix product, each measurement in a process of its own.

    python scripts/bench_knn.py [--size small|middle|large] [--threads 2] [--repeats 5]
        [--folder /tmp] [--device cuda]
    python scripts/bench_knn.py --indexes

small: a bank of 50,000 x 128 and 10,000 queries; middle: 200,000 x 512 and 5,000; large: 1,281,167
x 2048 and 2,000, the bank mapped from a file of 10.5 GB that is made in --folder and removed in the
end. Random features in 100 classes; k 200, T 0.1.

The contenders take turns in every repeat, so that a machine that is shared disturbs all alike. The
table has medians of the wall time and of the processor time, their ratios to the product within a
repeat, and peak memory: of the process, and what the measurement added to it. lightly takes part
where it is installed.
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

SIZES = {
    "tiny": (2000, 32, 100),
    "small": (50_000, 128, 10_000),
    "middle": (200_000, 512, 5_000),
    "large": (1_281_167, 2048, 2_000),
}
NUM_CLASSES, NUM_NEIGHBORS, TEMPERATURE = 100, 200, 0.1
BLOCK = 1024  # queries of one product
READ_BYTES = 2**27
INDEXES = ("IVF781,Flat", "HNSW32")


def rows_of(seed: int, num_rows: int, width: int) -> np.ndarray:
    """Return random features (num_rows, width)."""
    return np.random.default_rng(seed).standard_normal((num_rows, width), dtype=np.float32)


def write_bank(path: Path, num_rows: int, width: int) -> None:
    """Write a file of random features in blocks."""
    bank = np.lib.format.open_memmap(path, "w+", np.float32, (num_rows, width))
    height = READ_BYTES // (4 * width)
    for first in range(0, num_rows, height):
        block = bank[first : first + height]
        block[:] = rows_of(first, len(block), width)


def product(
    bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, device: torch.device
) -> None:
    """Compute the bare matrix product in blocks, with one read of a mapped bank."""
    height = len(bank)
    if isinstance(bank, np.memmap):
        height = READ_BYTES // (4 * bank.shape[1])
    queries_on_device = torch.from_numpy(queries).to(device)
    room = torch.empty(BLOCK, height, device=device)
    for first in range(0, len(bank), height):
        rows = bank[first : first + height]
        if isinstance(bank, np.memmap):
            rows = np.array(rows)
        block = torch.from_numpy(rows).to(device)
        for part in queries_on_device.split(BLOCK):
            torch.mm(part, block.T, out=room[: len(part), : len(block)])
    wait_for(device)


def ours(bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, device: torch.device) -> None:
    """Search and vote as this project does."""
    from moco.evaluation.knn import knn_accuracy

    query_labels = np.zeros(len(queries), np.int64)
    knn_accuracy(bank, labels, queries, query_labels, NUM_NEIGHBORS, TEMPERATURE, device)


def lightly(
    bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, device: torch.device
) -> None:
    """Call lightly's knn_predict on blocks of queries."""
    from lightly.utils.benchmarking import knn_predict

    columns = F.normalize(torch.from_numpy(bank).to(device), dim=1).T.contiguous()
    on_device = torch.from_numpy(labels).to(device)
    for part in F.normalize(torch.from_numpy(queries).to(device), dim=1).split(BLOCK):
        knn_predict(part, columns, on_device, NUM_CLASSES, NUM_NEIGHBORS, TEMPERATURE)
    wait_for(device)


CONTENDERS = {"product": product, "ours": ours, "lightly": lightly}


def measure(name: str, size: str, num_threads: int, path: str, device: torch.device) -> None:
    """Print seconds and megabytes as JSON; the work of a child process."""
    torch.set_num_threads(num_threads)
    num_rows, width, num_queries = SIZES[size]
    bank = np.load(path, mmap_mode="r") if size == "large" else rows_of(0, num_rows, width)
    labels = np.random.default_rng(1).integers(0, NUM_CLASSES, num_rows)
    queries = rows_of(2, num_queries, width)
    # Libraries start their threads at their first use.
    CONTENDERS[name](np.array(bank[:1000]), labels[:1000], queries[:10], device)
    before = resident_mib("VmHWM")
    start, processor_start = time.perf_counter(), time.process_time()
    CONTENDERS[name](bank, labels, queries, device)
    seconds = time.perf_counter() - start
    processor_seconds = time.process_time() - processor_start
    peak = resident_mib("VmHWM")
    found = {"seconds": seconds, "processor_seconds": processor_seconds}
    print(json.dumps(found | {"peak": peak, "peak_mib": peak - before}))


def turns_of(size: str, num_threads: int, path: Path, device: str = "cpu") -> dict[str, Turn]:
    """Return the contenders, each in a process of its own, ready to take turns.

    Args:
        size: a key of `SIZES`.
        num_threads: of torch and faiss.
        path: the file of the large bank.
        device: where to compute.
    """
    names = ["product", "ours"]
    if size != "large" and find_spec("lightly"):
        names.append("lightly")

    def turn(name: str) -> dict[str, float]:
        command = [sys.executable, __file__, "--child", name, "--size", size, "--device", device]
        command += ["--threads", str(num_threads), "--bank", str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
        done = subprocess.run(command, env=environment, capture_output=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    return {name: partial(turn, name) for name in names}


@contextlib.contextmanager
def bank_file(size: str, folder: str | None) -> Iterator[Path]:
    """Yield the path of the large bank, which exists inside the block; the others need no file."""
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
        f"bank {num_rows:,} x {width}, {num_queries:,} queries, {device}, "
        f"{num_threads} threads, {repeats} repeats"
    )
    for name, results in found.items():
        medians = {}
        for key in ("seconds", "processor_seconds", "peak", "peak_mib"):
            medians[key] = statistics.median(result[key] for result in results)
        processor_ratios = []
        for result, reference in zip(results, found["product"], strict=True):
            processor_ratios.append(result["processor_seconds"] / reference["processor_seconds"])
        print(
            f"{name:<10}{medians['seconds']:8.2f} s {ratio(results, found['product']):6.2f} x"
            f"{medians['processor_seconds']:8.2f} s of processor time "
            f"{statistics.median(processor_ratios):6.2f} x"
            f"{medians['peak']:7.0f} MB peak{medians['peak_mib']:7.0f} MB added"
        )


def compare_indexes(num_threads: int) -> None:
    """Print what approximate indexes lose on features in overlapping clusters.

    The bank is 50,000 x 128, with 2,000 queries.
    """
    from moco.evaluation.indexes import build_index, recall
    from moco.evaluation.knn import Protocol, classify
    from moco.evaluation.neighbors import nearest_by_block, search_index

    torch.set_num_threads(num_threads)
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
    print(f"{'flat':<12}{seconds:7.2f} s   top-1 {top1:.4f}")
    for name in INDEXES:
        index = build_index(bank, name, "index")
        predicted, top1, seconds = measured(partial(search_index, index))
        found = recall(index, bank, queries, NUM_NEIGHBORS)
        same = (predicted == exact).mean()
        print(
            f"{name:<12}{seconds:7.2f} s   top-1 {top1:.4f}   "
            f"recall {found:.4f}   same predictions {same:.4f}"
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
