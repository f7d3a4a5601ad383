"""The table that a program prints when it is done."""

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moco.cli.training_run import Run
from moco.config.train import TrainConfig
from moco.errors import encodable, printable
from moco.runs.run_folder import BACKBONE_FILE, LAST_CHECKPOINT, as_override
from moco.targets import GIVEN
from moco.training.stopwatches import epoch_time, in_words

# The kNN figures of a pretraining, in the order of the table.
KNN_FIGURES = {
    "knn_raw_pixels/top1": "raw pixels",
    "knn_untrained/top1": "untrained backbone",
    "knn_start/top1": "weights of init_from",
    "knn/top1": "pretrained backbone",
}


def print_table(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two columns under a title."""
    # As `Text`, because rich would take the brackets of a path for its markup.
    shown_title = Text(encodable(title), "table.title")
    table = Table(title=shown_title, show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")  # a path that is cut short cannot be copied
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)


def print_plain(console: Console, line: str) -> None:
    """Print a line that can be copied: it is not wrapped, and its brackets are no markup."""
    console.print(encodable(line), soft_wrap=True, highlight=False, markup=False, emoji=False)


def training_rows(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the first rows of the table of every training."""
    rows = [("epochs, steps", f"{figures['epoch']}, {figures['step']}")]
    if "train/loss" in figures:
        rows.append(("loss of the last epoch", f"{figures['train/loss']:.4f}"))
        rows.append(("images per second", f"{figures['images_per_second']:,.1f}"))
    return rows


def print_pretraining(run: Run, num_unreadable: int) -> None:
    """Print the results of a pretraining, where they are, and what to type next.

    Args:
        run: the run, with all its figures.
        num_unreadable: number of skipped images.
    """
    figures = run.figures
    rows = training_rows(figures)
    if "train/seconds" in figures:
        duration = timedelta(seconds=round(figures["train/seconds"]))
        rows.append(("time in training", str(duration)))
    if epoch_time.total:
        rows.append(("time of its epochs", in_words(epoch_time.total)))
    if "knn/top1" in figures:
        rows.append(("kNN protocol", knn_protocol(figures)))
        for key, name in KNN_FIGURES.items():
            if key in figures:
                rows.append((f"kNN top-1, {name}", f"{figures[key]:.4f}"))
    if "dense/knn_miou" in figures:
        rows.append(("mIoU of kNN segmentation", shown(figures["dense/knn_miou"])))
    if num_unreadable:
        rows.append(("unreadable images skipped", str(num_unreadable)))
    checkpoint = os.path.relpath(run.folder / LAST_CHECKPOINT)
    rows.append(("checkpoint", checkpoint))
    rows.append(("its backbone alone", os.path.relpath(run.folder / BACKBONE_FILE)))
    print_table(run.console, "Pretraining is done", rows)
    print_plain(run.console, f"next: {next_step(run.config, checkpoint)}")


def next_step(config: TrainConfig, checkpoint: str) -> str:
    """Return what to type after a pretraining: a command, or Python if it had objects of Python."""
    if config.backbone.name == GIVEN:
        return f"moco.load_encoder({checkpoint!r}, backbone=module)"
    if config.data.name == GIVEN:
        return f"moco.load_encoder({checkpoint!r})"
    command = ["python -m moco.evaluate", as_override("checkpoint", checkpoint)]
    for group, settings in (("backbone", config.backbone), ("data", config.data)):
        if settings.name == "custom":
            command.append(as_override(f"{group}.target", str(settings.target)))
    return " ".join(command)


def knn_protocol(figures: dict[str, Any]) -> str:
    """Return the protocol of a kNN figure in words."""
    is_bf16 = figures.get("knn/precision") == "bf16-mixed"  # missing in old runs: 32-true
    precision = " in bf16-mixed" if is_bf16 else ""
    return (
        f"k {figures['knn/num_neighbors']}, T {figures['knn/temperature']}, "
        f"{figures['knn/feature']} feature{precision}, {figures['knn/num_queries']:,} queries "
        f"against a bank of {figures['knn/bank_size']:,}"
    )


MAX_CLASSES_SHOWN = 40


def print_segmentation(run: Run, class_names: Sequence[str]) -> None:
    """Print what a segmentation run has reached, where it is, and what to type next.

    Args:
        run: the run, with all its figures.
        class_names: with more than `MAX_CLASSES_SHOWN` no class has a row of its own.
    """
    figures = run.figures
    rows = training_rows(figures)
    if "segment/miou" in figures:
        protocol = (
            f"{figures['segment/num_images']:,} images, inference={figures['segment/inference']}"
        )
        rows.append(("measured on", protocol))
        rows.append(("mIoU", shown(figures["segment/miou"])))
        rows.append(("pixel accuracy", shown(figures["segment/pixel_accuracy"])))
        if len(class_names) <= MAX_CLASSES_SHOWN:
            rows += [(f"IoU, {name}", shown_iou(figures, name)) for name in class_names]
    rows.append(("checkpoint", os.path.relpath(run.folder / LAST_CHECKPOINT)))
    print_table(run.console, "Segmentation is done", rows)
    print_plain(run.console, f"next: tensorboard --logdir {os.path.relpath(run.folder)}")


def shown(share: float | None) -> str:
    """Return a figure of segmentation as text. Without a pixel that has a class there is none."""
    if share is None:
        return "none: no held-out pixel has a class"
    return f"{share:.4f}"


def shown_iou(figures: Mapping[str, Any], class_name: str) -> str:
    """Return the intersection over union of a class as text."""
    iou = figures[f"segment/iou/{class_name}"]
    if iou is None:
        return "neither in the masks nor predicted"
    return f"{iou:.4f}"
