"""Draw what runs reached: view pairs of the first, if it has drawn any, kNN accuracy and loss of all.

    python scripts/plot_runs.py OUTPUT.png RUN_FOLDER [RUN_FOLDER ...]

Reads the TensorBoard events and metrics.json of each run folder. Needs matplotlib: pip install ".[docs]".
"""

import io
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PAIRS = "views/query_above_key"


def scalars(events: EventAccumulator, tag: str) -> tuple[list[int], list[float]]:
    """Steps and values of one curve, the latest value where a resumed run wrote a step twice."""
    latest = (
        {event.step: event.value for event in events.Scalars(tag)}
        if tag in events.Tags()["scalars"]
        else {}
    )
    return list(latest), list(latest.values())


def main(output: Path, folders: list[Path]) -> None:
    """Write the image."""
    runs = {
        folder: EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 1})
        for folder in folders
    }
    for events in runs.values():
        events.Reload()
    first = runs[folders[0]]
    has_pairs = PAIRS in first.Tags()["images"]
    figure = plt.figure(figsize=(10, 5.2 if has_pairs else 3.6), layout="constrained")
    grid = (
        figure.add_gridspec(2, 2, height_ratios=[1, 2.4])
        if has_pairs
        else figure.add_gridspec(1, 2)
    )
    knn, loss = (figure.add_subplot(grid[-1, column]) for column in (0, 1))
    if has_pairs:
        pairs = figure.add_subplot(grid[0, :])
        image = Image.open(io.BytesIO(first.Images(PAIRS)[0].encoded_image_string))
        pairs.imshow(np.asarray(image), interpolation="nearest")
        pairs.set_title("Pairs of views: queries above, their keys below")
        pairs.axis("off")
    for folder, events in runs.items():
        figures = json.loads((folder / "metrics.json").read_text())
        steps_per_epoch = figures["step"] / figures["epoch"]
        for axes, tag in ((knn, "knn/top1"), (loss, "epoch/loss")):
            steps, values = scalars(events, tag)
            axes.plot(
                [step / steps_per_epoch for step in steps],
                values,
                marker=".",
                label="/".join(folder.parts[-2:]),
            )
        for key, style, name in (
            ("knn_raw_pixels/top1", ":", "raw pixels"),
            ("knn_untrained/top1", "--", "untrained backbone"),
        ):
            if key in figures:
                knn.axhline(figures[key], linestyle=style, color="gray", label=name)
        protocol = f"k {figures['knn/num_neighbors']}, T {figures['knn/temperature']}, {figures['knn/feature']} feature"
    knn.set(title=f"kNN top-1 ({protocol})", xlabel="epoch")
    loss.set(title="InfoNCE, mean of the epoch, nats", xlabel="epoch")
    knn.legend()
    loss.legend()
    figure.savefig(output, dpi=90)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
