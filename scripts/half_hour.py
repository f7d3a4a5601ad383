"""Compare the kNN accuracy after half an hour of training on this machine.

    python scripts/half_hour.py cifar10.npz OUTPUT_FOLDER [--minutes 30] [--turn 5] [--seeds 3]
        [--experiment cifar10_cpu] [--lightly PYTHON] [KEY=VALUE ...]

The contenders are an experiment of this project, lightly's MoCo example and the official CIFAR-10
recipe, which see views of the images' own size. They train in turns for the same time, in which no
other part of this program runs. The features and the kNN measurement (k 200, T 0.1, backbone
feature, test images against all training images) are not counted. After every turn,
half_hour.json, half_hour.md and half_hour.png are written to OUTPUT_FOLDER again. A seed that is
finished there is not repeated. KEY=VALUE are settings of the experiment, such as
trainer.max_epochs=20.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

CONTENDER = Path(__file__).with_name("half_hour_contender.py")
NAMES = {
    "ours": "this project",
    "official": "official CIFAR-10 recipe",
    "lightly": "lightly's MoCo example",
}
NUM_NEIGHBORS, TEMPERATURE = 200, 0.1

Curve = list[dict[str, float]]
"""Points with `minutes`, `epochs` and `top1`; the first one is before training."""


class Contender:
    """A process that trains in its turns.

    Args:
        python: an interpreter with its packages.
        seconds: the seconds of all its turns.
        options: further arguments of half_hour_contender.py.
        labels: of the training and the test images.
    """

    def __init__(
        self,
        name: str,
        python: str,
        npz: Path,
        folder: Path,
        seconds: float,
        options: Sequence[str],
        labels: tuple[np.ndarray, np.ndarray],
    ) -> None:
        self.name = name
        self.features = folder / f"{name}.npz"
        arguments = [name, str(npz), str(self.features), str(seconds), *options]
        self.process = subprocess.Popen(
            [python, str(CONTENDER), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.finished = False
        self.curve: Curve = []
        self.labels = labels
        self._measured()

    def train(self, seconds: float) -> None:
        """Train for one turn, and add a point to the curve."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        self._measured()

    def _measured(self) -> None:
        """Add a point to the curve."""
        answer = self._answer()
        self.finished = answer["finished"]
        arrays = np.load(self.features)
        top1 = accuracy(arrays["bank"], arrays["queries"], self.labels)
        epochs = answer["images"] / len(self.labels[0])
        minutes = answer["seconds"] / 60
        self.curve.append({"minutes": minutes, "epochs": epochs, "top1": top1})
        progress = f"{minutes:.1f} minutes, {epochs:.2f} epochs, kNN {top1:.4f}"
        print(f"{self.name}: {progress}", flush=True)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            sys.exit(f"{self.name} ended with status {status}; its output is above")
        return dict(json.loads(line))

    def end(self) -> None:
        """Kill the process and its loader processes."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def accuracy(bank: np.ndarray, queries: np.ndarray, labels: tuple[np.ndarray, np.ndarray]) -> float:
    """Return the top-1 accuracy of the kNN, 0 to 1."""
    from moco.evaluation.knn import knn_accuracy

    return knn_accuracy(bank, labels[0], queries, labels[1], NUM_NEIGHBORS, TEMPERATURE).top1


def accuracy_of_pixels(arrays: Mapping[str, np.ndarray]) -> float:
    """Return the accuracy with the pixels as features, normalised by their mean and deviation."""
    images = arrays["train_images"]
    mean = images.mean(axis=(0, 1, 2), dtype=np.float64)
    std = images.std(axis=(0, 1, 2), dtype=np.float64)
    rows = []
    for name in ("train_images", "test_images"):
        pixels = np.float32((arrays[name] - mean) / std)
        rows.append(pixels.reshape(len(pixels), -1))
    return accuracy(rows[0], rows[1], labels_of(arrays))


def labels_of(arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels of the training and the test images."""
    return arrays["train_labels"].ravel(), arrays["test_labels"].ravel()


def compare(
    contenders: Sequence[Contender], seconds: float, turn: float, done: Callable[[], None]
) -> None:
    """Let the contenders take turns until each has had its time.

    Args:
        done: is called after each round of turns.
    """
    begun = 0.0
    while begun < seconds:
        now = min(turn, seconds - begun)
        for contender in contenders:
            if not contender.finished:
                contender.train(now)
        begun += now
        done()


@dataclass
class Results:
    """The curves of all seeds, in the files of a folder."""

    output: Path
    minutes: float
    experiment: str
    raw_pixels: float
    """Accuracy with pixels as features."""
    curves: dict[str, list[Curve]] = field(default_factory=dict)
    """By contender, a curve for each seed."""

    def read(self) -> int:
        """Read what an earlier call has left, and return the number of finished seeds."""
        path = self.output / "half_hour.json"
        if not path.is_file():
            return 0
        found = json.loads(path.read_text())
        if found["minutes"] != self.minutes or found["experiment"] != self.experiment:
            sys.exit(f"{path} is of another comparison; choose another folder")
        for name, curves in found["curves"].items():
            self.curves[name] = curves[: found["finished_seeds"]]
        return int(found["finished_seeds"])

    def write(self, now: Sequence[Contender], finished_seeds: int) -> None:
        """Write the three files.

        Args:
            now: the contenders of the running seed.
            finished_seeds: number of seeds before it, or with it if it has ended.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        curves = {name: list(before) for name, before in self.curves.items()}
        for contender in now:
            curves.setdefault(contender.name, []).append(contender.curve)
        result = {
            "minutes": self.minutes,
            "experiment": self.experiment,
            "num_neighbors": NUM_NEIGHBORS,
            "temperature": TEMPERATURE,
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "raw_pixels": self.raw_pixels,
            "finished_seeds": finished_seeds,
            "curves": curves,
        }
        (self.output / "half_hour.json").write_text(json.dumps(result, indent=2) + "\n")
        text = table(curves, self.experiment, self.raw_pixels)
        (self.output / "half_hour.md").write_text(text)
        draw(curves, self.raw_pixels, self.output / "half_hour.png")
        if finished_seeds > len(next(iter(self.curves.values()), [])):
            self.curves = curves


def table(curves: dict[str, list[Curve]], experiment: str, raw_pixels: float) -> str:
    """Return the figures of each contender, means over seeds, as a Markdown table."""
    lines = [
        "| | minutes | epochs | kNN top-1 untrained, % | kNN top-1, % |",
        "|---|---|---|---|---|",
    ]
    for name, of_seeds in curves.items():
        title = f"{NAMES[name]}, {experiment}" if name == "ours" else NAMES[name]
        minutes = statistics.mean(curve[-1]["minutes"] for curve in of_seeds)
        epochs = statistics.mean(curve[-1]["epochs"] for curve in of_seeds)
        cells = [title, f"{minutes:.1f}", f"{epochs:.2f}"]
        for place in (0, -1):
            cells.append(mean_and_spread([100 * curve[place]["top1"] for curve in of_seeds]))
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(f"| raw pixels | | | | {100 * raw_pixels:.1f} |")
    return "\n".join(lines) + "\n"


def mean_and_spread(percents: Sequence[float]) -> str:
    """Return the mean, and the standard deviation if there are several."""
    text = f"{statistics.mean(percents):.1f}"
    if len(percents) > 1:
        text += f" ± {statistics.stdev(percents):.1f}"
    return text


def draw(curves: dict[str, list[Curve]], raw_pixels: float, path: Path) -> None:
    """Plot the accuracy over the minutes of training, a line for each seed."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, of_seeds) in enumerate(curves.items()):
        for seed, curve in enumerate(of_seeds):
            minutes = [point["minutes"] for point in curve]
            percents = [100 * point["top1"] for point in curve]
            label = NAMES[name] if seed == 0 else None
            axes.plot(minutes, percents, ".-", color=f"C{number}", label=label)
    axes.axhline(100 * raw_pixels, color="gray", linestyle="--", label="raw pixels")
    axes.set(xlabel="minutes of training", ylabel="kNN top-1, %")
    axes.set_title(f"{os.cpu_count()} cores")
    axes.legend()
    figure.savefig(path, dpi=90)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "npz", type=Path, help="train_images, train_labels, test_images, test_labels"
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument(
        "--turn", type=float, default=5, help="minutes until the next contender's turn"
    )
    parser.add_argument("--contenders", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument(
        "--lightly",
        default=sys.executable,
        metavar="PYTHON",
        help="an interpreter that has lightly",
    )
    parser.add_argument(
        "--batch-size", default="0", help="batch size of the others; 0: as published"
    )
    parser.add_argument(
        "--num-workers", default=str(os.cpu_count()), help="loader processes of the others"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--experiment", default="cifar10_cpu", help="of this project")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="its settings")
    given = parser.parse_intermixed_args(arguments)
    arrays = np.load(given.npz)
    results = Results(given.output, given.minutes, given.experiment, accuracy_of_pixels(arrays))
    for seed in range(results.read(), given.seeds):
        run_seed(seed, given, labels_of(arrays), results)
    print((given.output / "half_hour.md").read_text(), end="")


def run_seed(
    seed: int, given: argparse.Namespace, labels: tuple[np.ndarray, np.ndarray], results: Results
) -> None:
    """Run one comparison, and add it to the results."""
    seconds = 60 * given.minutes
    options = ["--batch-size", given.batch_size, "--num-workers", given.num_workers]
    options += ["--seed", str(seed)]
    contenders: list[Contender] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in given.contenders:
                python, own = sys.executable, options
                if name == "lightly":
                    python = given.lightly
                if name == "ours":
                    own = [*options, "--experiment", given.experiment, *given.overrides]
                place = Path(folder)
                contenders.append(Contender(name, python, given.npz, place, seconds, own, labels))
            compare(contenders, seconds, 60 * given.turn, lambda: results.write(contenders, seed))
        finally:
            for contender in contenders:
                contender.end()
    results.write(contenders, seed + 1)


if __name__ == "__main__":
    main()
