"""Measure the memory of the loader processes over the epochs and over the number of files.

    python scripts/bench_worker_memory.py [--files 2000 200000] [--epochs 5] [--batches 300]
        [--workers 2]

The script makes trees of tiny PNGs and reads them as training does. After each epoch, it measures
the private memory of each loader process and of the training process in MiB (Private_* in
/proc/PID/smaps_rollup). An epoch of a large tree ends after --batches batches. Linux only.
"""

import argparse
import itertools
import re
import tempfile
from pathlib import Path

from PIL import Image

from moco.data.augment.views import EvaluationView, ViewPair
from moco.data.loading.datamodule import PretrainingData
from moco.data.sources.registry import build_source

SIZE = 32  # px of a view
VIEW = {
    "random_resized_crop": {"scale": [0.2, 1.0]},
    "color_jitter": {"brightness": 0.4, "probability": 0.8},
}
LINKS = 30_000  # hard links of one file; file systems have a limit


def make_tree(root: Path, num_files: int) -> None:
    """Make PNGs of 4 x 4 px, 1,000 in each folder; most are hard links to the same file."""
    paths = [
        root / f"{number // 1000:05d}" / f"image_{number:08d}.png" for number in range(num_files)
    ]
    for folder in {path.parent for path in paths}:
        folder.mkdir()
    for start in range(0, num_files, LINKS):
        image, *others = paths[start : start + LINKS]
        Image.new("RGB", (4, 4)).save(image)
        for path in others:
            path.hardlink_to(image)


def own_memory(pid: int | str) -> float:
    """Return the private memory of a process, MiB."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    private = re.findall(r"^Private_\w+: +(\d+) kB$", rollup, re.MULTILINE)
    return sum(map(int, private)) / 1024


def measure(root: str, epochs: int, batches: int, workers: int) -> dict[str, list[float]]:
    """Return the MiB of each process after each epoch."""
    mean = [0.5] * 3
    data = PretrainingData(
        build_source("images", root),
        ViewPair(VIEW, VIEW, mean, mean, SIZE, 0),
        EvaluationView(SIZE, 1.0, mean, mean),
        image_size=SIZE,
        batch_size=64,
        num_workers=workers,
    )
    loader = data.train_dataloader()
    found: dict[str, list[float]] = {}
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for _ in itertools.islice(loader, batches):
            pass
        pids = [pid for pid, _ in loader.notes.read()]
        for number, pid in enumerate(pids):
            found.setdefault(f"loader process {number + 1}", []).append(own_memory(pid))
        found.setdefault("training process", []).append(own_memory("self"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, nargs="+", default=[2_000, 200_000])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument(
        "--batches", type=int, default=300, help="most batches of 64 images in an epoch"
    )
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    names = [f"epoch {epoch + 1}" for epoch in range(arguments.epochs)]
    print(f"{'files':>9}  {'':<18}" + "".join(f"{name:>10}" for name in names))
    for num_files in arguments.files:
        with tempfile.TemporaryDirectory() as scratch:
            make_tree(Path(scratch), num_files)
            found = measure(scratch, arguments.epochs, arguments.batches, arguments.workers)
        for name, sizes in found.items():
            columns = "".join(f"{size:>10.1f}" for size in sizes)
            print(f"{num_files:>9,}  {name:<18}{columns}", flush=True)


if __name__ == "__main__":
    main()
