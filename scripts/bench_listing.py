"""Measure how long it takes to list a folder tree, compared with ``find ROOT -type f``.

    python scripts/bench_listing.py [--folders 1000] [--files 200] [--repeats 9] [--root EXISTING]

Without --root, the script makes a tree of empty files. The system caches the tree when it is first
read. The script prints medians, the ratio of listing to find (the goal is below 2), the seconds of
a second start, which reads the cached listing, and the bytes that a loader process gets for the
names.
"""

import argparse
import pickle
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import torch.multiprocessing  # noqa: F401  (registers how tensors are sent to processes)

from moco.data.files.listing import SETTLED_SECONDS, listed
from moco.data.sources.source import FileImages


def make_tree(root: Path, num_folders: int, num_files: int) -> None:
    """Make files with names like those of ImageNet, in no order."""
    for folder in range(num_folders):
        path = root / f"n{folder:08d}"
        path.mkdir(parents=True)
        for number in range(num_files):
            (path / f"n{folder:08d}_{number * 7919 % 100_003}.JPEG").touch()


def seconds(work: Callable[[], object]) -> float:
    """Return the seconds that the work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(root: str, cache: Path, repeats: int) -> None:
    """Print the figures of one tree."""
    works: dict[str, Callable[[], object]] = {
        "find": lambda: subprocess.run(
            ["find", root, "-type", "f"], stdout=subprocess.DEVNULL, check=True
        ),
        "listing": lambda: listed([root]),
        "second start": lambda: listed([root], cache=cache),
    }
    time.sleep(SETTLED_SECONDS + 0.1)
    found = listed([root], cache=cache)
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats):
        order = list(works)
        if repeat % 2 == 0:
            order.reverse()
        for name in order:
            times[name].append(seconds(works[name]))
    for name, all_times in times.items():
        spread = f"from {min(all_times):.3f} to {max(all_times):.3f}"
        print(f"{name:<14}{statistics.median(all_times):8.3f} s ({spread})")
    ratios = np.divide(times["listing"], times["find"])
    print(f"{len(found.paths):,} images; listing / find {np.median(ratios):.2f}")
    images = FileImages(found.paths)
    sent = len(ForkingPickler.dumps(images))
    print(f"sent to each loader process: {sent:,} bytes; shared by all: {shared(images):,} bytes")
    print(f"as a list of strings: {len(pickle.dumps(list(found.paths))):,} bytes to each")


def shared(images: FileImages) -> int:
    """Return the bytes in memory that all loader processes share."""
    return images.text.nbytes + images.ends.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folders", type=int, default=1000)
    parser.add_argument("--files", type=int, default=200, help="files in each folder")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--root", help="an existing tree, in place of a new one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = arguments.root or f"{scratch}/tree"
        if not arguments.root:
            make_tree(Path(root), arguments.folders, arguments.files)
        measure(root, Path(scratch) / "images.npz", arguments.repeats)


if __name__ == "__main__":
    main()
