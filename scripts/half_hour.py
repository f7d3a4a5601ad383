"""Compare the accuracy on CIFAR-10 after half an hour of training on this machine.

    python scripts/half_hour.py cifar10.npz OUTPUT_FOLDER [--minutes 30] [--turn 5]
        [--lightly PYTHON] [KEY=VALUE ...]

The contenders are `+experiment=cifar10_cpu`, lightly's MoCo example and the official CIFAR-10
recipe. They train in turns for the same time, in which no other part of this program runs. The
features and the kNN measurement (k 200, T 0.1, backbone feature, test images against all training
images) are not counted. After every turn, half_hour.json, half_hour.md and half_hour.png are
written to OUTPUT_FOLDER again. KEY=VALUE are settings of cifar10_cpu, such as
trainer.max_epochs=20.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

CONTENDER = Path(__file__).with_name("half_hour_contender.py")
NAMES = {
    "ours": "this project, cifar10_cpu",
    "official": "official CIFAR-10 recipe",
    "lightly": "lightly's MoCo example",
}
NUM_NEIGHBORS, TEMPERATURE = 200, 0.1


class Contender:
    """A process that trains in its turns.

    Args:
        python: an interpreter with its packages.
        seconds: the seconds of all its turns.
        options: further arguments of half_hour_contender.py.
    """

    def __init__(
        self,
        name: str,
        python: str,
        npz: Path,
        folder: Path,
        seconds: float,
        options: Sequence[str],
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
        self.curve: list[dict[str, float]] = []
        self._answer()

    def train(self, seconds: float, labels: tuple[np.ndarray, np.ndarray]) -> None:
        """Train for one turn, and add a point to the curve."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.finished = answer["finished"]
        top1 = accuracy(self.features, labels)
        epochs = answer["images"] / len(labels[0])
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


def accuracy(features: Path, labels: tuple[np.ndarray, np.ndarray]) -> float:
    """Return the top-1 accuracy of the kNN, 0 to 1."""
    from moco.evaluation.knn import knn_accuracy

    arrays = np.load(features)
    return knn_accuracy(
        arrays["bank"], labels[0], arrays["queries"], labels[1], NUM_NEIGHBORS, TEMPERATURE
    ).top1


def compare(
    contenders: Sequence[Contender], npz: Path, seconds: float, turn: float, output: Path
) -> None:
    """Let the contenders take turns until each has had its time; write the results each time."""
    arrays = np.load(npz)
    labels = (arrays["train_labels"].ravel(), arrays["test_labels"].ravel())
    begun = 0.0
    while begun < seconds:
        now = min(turn, seconds - begun)
        for contender in contenders:
            if not contender.finished:
                contender.train(now, labels)
        begun += now
        write(contenders, seconds, output)


def write(contenders: Sequence[Contender], seconds: float, output: Path) -> None:
    """Write the three files."""
    output.mkdir(parents=True, exist_ok=True)
    curves = {contender.name: contender.curve for contender in contenders}
    machine = {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    result = {
        "minutes": seconds / 60,
        "num_neighbors": NUM_NEIGHBORS,
        "temperature": TEMPERATURE,
        **machine,
        "curves": curves,
    }
    (output / "half_hour.json").write_text(json.dumps(result, indent=2) + "\n")
    (output / "half_hour.md").write_text(table(curves))
    draw(curves, output / "half_hour.png")


def table(curves: dict[str, list[dict[str, float]]]) -> str:
    """Return the final figures of each contender as a Markdown table."""
    lines = ["| | minutes | epochs | kNN top-1, % |", "|---|---|---|---|"]
    for name, curve in curves.items():
        end = curve[-1]
        cells = [NAMES[name], f"{end['minutes']:.1f}", f"{end['epochs']:.2f}"]
        lines.append(f"| {' | '.join(cells)} | {100 * end['top1']:.1f} |")
    return "\n".join(lines) + "\n"


def draw(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Plot the accuracy over the minutes of training."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, curve in curves.items():
        minutes = [point["minutes"] for point in curve]
        percents = [100 * point["top1"] for point in curve]
        axes.plot(minutes, percents, "o-", label=NAMES[name])
    axes.set(xlabel="minutes of training", ylabel="kNN top-1, %")
    axes.set_title(f"CIFAR-10, {os.cpu_count()} cores")
    axes.legend()
    figure.savefig(path, dpi=90)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "npz", type=Path, help="CIFAR-10: train_images, train_labels, test_images, test_labels"
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
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of cifar10_cpu")
    given = parser.parse_intermixed_args(arguments)
    seconds = 60 * given.minutes
    options = ["--batch-size", given.batch_size, "--num-workers", given.num_workers]
    contenders: list[Contender] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in given.contenders:
                python = given.lightly if name == "lightly" else sys.executable
                own = [*options, *(given.overrides if name == "ours" else [])]
                contenders.append(Contender(name, python, given.npz, Path(folder), seconds, own))
            compare(contenders, given.npz, seconds, 60 * given.turn, given.output)
        finally:
            for contender in contenders:
                contender.end()
    print((given.output / "half_hour.md").read_text(), end="")


if __name__ == "__main__":
    main()
