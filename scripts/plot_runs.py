"""Plot what runs reached: kNN accuracy and loss of all, and the first run's pairs of views.

    python scripts/plot_runs.py OUTPUT.png RUN_FOLDER [RUN_FOLDER ...]

Reads the TensorBoard events and metrics.json of each run folder. Pairs of views are plotted if the
first run has any.
"""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moco.training.board_layout import tag_of

PAIRS = tag_of("views/query_above_key")
BASELINES = (
    ("knn_raw_pixels/top1", ":", "raw pixels"),
    ("knn_untrained/top1", "--", "untrained backbone"),
)


def read_events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 1})
    events.Reload()
    return events


def scalars(events: EventAccumulator, name: str) -> dict[int, float]:
    """Return a figure's values by step; of a step that was written twice, the later value."""
    tag = tag_of(name)
    if tag not in events.Tags()["scalars"]:
        return {}
    return {event.step: event.value for event in events.Scalars(tag)}


def plot_pairs(axes: Axes, events: EventAccumulator) -> None:
    image = Image.open(io.BytesIO(events.Images(PAIRS)[0].encoded_image_string))
    axes.imshow(np.asarray(image))
    axes.set_title("Pairs of views: queries above, their keys below")
    axes.axis("off")


def plot_curve(axes: Axes, values: dict[int, float], figures: dict[str, Any], name: str) -> None:
    """Plot a curve over epochs.

    Args:
        values: by step.
        figures: of the run's ``metrics.json``.
    """
    steps_per_epoch = figures["step"] / figures["epoch"]
    epochs = [step / steps_per_epoch for step in values]
    axes.plot(epochs, list(values.values()), marker=".", label=name)


def protocol(figures: dict[str, Any]) -> str:
    """Return the conditions of a run's kNN accuracy in words."""
    k, temperature = figures["knn/num_neighbors"], figures["knn/temperature"]
    return f"k {k}, T {temperature}, {figures['knn/feature']} feature"


def main(output: Path, folders: list[Path]) -> None:
    """Write the plot."""
    first = read_events(folders[0])
    has_pairs = PAIRS in first.Tags()["images"]
    if has_pairs:
        figure = Figure(figsize=(10, 5.2), layout="constrained")
        grid = figure.add_gridspec(2, 2, height_ratios=[1, 2.4])
        plot_pairs(figure.add_subplot(grid[0, :]), first)
    else:
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        grid = figure.add_gridspec(1, 2)
    knn = figure.add_subplot(grid[-1, 0])
    loss = figure.add_subplot(grid[-1, 1])
    for folder in folders:
        events = read_events(folder)
        figures = json.loads((folder / "metrics.json").read_text())
        name = "/".join(folder.parts[-2:])
        plot_curve(knn, scalars(events, "knn/top1"), figures, name)
        plot_curve(loss, scalars(events, "epoch/loss"), figures, name)
        for key, style, baseline in BASELINES:
            if key in figures:
                knn.axhline(figures[key], linestyle=style, color="gray", label=baseline)
    # The runs are comparable, so they have one protocol.
    knn.set(title=f"kNN top-1 ({protocol(figures)})", xlabel="epoch")
    loss.set(title="InfoNCE, mean of the epoch, nats", xlabel="epoch")
    knn.legend()
    loss.legend()
    figure.savefig(output, dpi=90)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
