"""The table that a program prints when it is done."""

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moco.cli.extensions import logger_names
from moco.cli.training_run import Run
from moco.config.data import DataConfig
from moco.config.train import TrainConfig
from moco.data.sources.own_dataset import IterableImages
from moco.data.sources.shards import ShardedImages
from moco.data.sources.source import DataSource, classes_in_words, numbered_class
from moco.errors import encodable, printable
from moco.runs.run_folder import (
    BACKBONE_FILE,
    BEST_CHECKPOINT,
    LAST_CHECKPOINT,
    as_override,
)
from moco.runs.shell_quotes import shell_quoted
from moco.targets import GIVEN
from moco.training.stopwatches import epoch_time, in_words

# The kNN figures of a pretraining, in the order of the table.
KNN_FIGURES = {
    "knn_raw_pixels/top1": "raw pixels",
    "knn_untrained/top1": "untrained backbone",
    "knn_start/top1": "weights of init_from",
    "knn/top1": "pretrained backbone",
}
# The figures of a segmentation, in the order of the table.
SEGMENT_FIGURES = {
    "segment/miou": "mIoU",
    "segment/miou_of_commonest_class": "mIoU of the commonest class everywhere",
    "segment/dice": "mean Dice",
    "segment/pixel_accuracy": "pixel accuracy",
    "segment/class_accuracy": "mean class accuracy",
    "segment/sensitivity": "sensitivity",
    "segment/specificity": "specificity",
    "segment/auc": "AUC",
}
# The figures in the line of a sweep's job, beside its loss.
JOB_FIGURES = (
    ("kNN", "knn/top1"),
    ("dense mIoU", "dense/knn_miou"),
    ("mIoU", "segment/miou"),
)


def print_table(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two columns under a title."""
    table = two_columns(title, rows)
    # Rich would fill a table's own title with spaces up to the width of the table.
    shown_title, table.title = table.title, None
    console.print(shown_title, highlight=False)
    console.print(table)


def two_columns(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    """Return a table of names and values under a title."""
    # As `Text`, because rich would take the brackets of a path for its markup.
    shown_title = Text(encodable(title), "table.title")
    table = Table(title=shown_title, show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")  # a path that is cut short cannot be copied
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def print_titled(console: Console, table: Table) -> None:
    """Print a table below its title, which may be wider than the table."""
    title, table.title = table.title, None
    console.print()
    console.print(title, highlight=False)
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


def print_pretraining(run: Run, source: DataSource, num_unreadable: int) -> None:
    """Print the results of a pretraining, where they are, and what to type next.

    In a sweep it is one line: the table of all jobs comes at the end.

    Args:
        run: the run, with all its figures.
        source: its images. Their labels decide what can be measured next.
        num_unreadable: number of skipped images.
    """
    figures = run.figures
    if is_sweep_job():
        print_plain(run.console, job_line(run))
        return
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
    if "knn/mean_average_precision" in figures:
        precision = figures["knn/mean_average_precision"]
        rows.append(("kNN mean average precision", f"{precision:.4f}"))
    if "dense/knn_miou" in figures:
        rows.append(("mIoU of kNN segmentation", shown(figures["dense/knn_miou"])))
    if "verdict" in figures:
        rows.append(("is it learning?", figures["verdict"]))
    if num_unreadable:
        rows.append(("unreadable images skipped", str(num_unreadable)))
    checkpoint = os.path.relpath(run.folder / LAST_CHECKPOINT)
    rows.append(("checkpoint", checkpoint))
    rows.append(("its backbone alone", os.path.relpath(run.folder / BACKBONE_FILE)))
    print_table(run.console, "Pretraining is done", rows)
    print_next(run.console, next_steps(run.config, checkpoint, source))


def print_next(console: Console, steps: Sequence[str]) -> None:
    """Print what to type next, each step on a line of its own that can be copied."""
    for place, step in enumerate(steps):
        name = "next" if place == 0 else "or"
        print_plain(console, f"{name}: {step}")


def next_steps(config: TrainConfig, checkpoint: str, source: DataSource) -> list[str]:
    """Return what to type after a pretraining: commands, or Python if it had objects of Python.

    Each command works on the run's own images. `moco.evaluate` needs two classes for its kNN
    accuracy, and images by number for everything else. `moco.embed` takes all images.

    Args:
        config: of the run.
        checkpoint: its path.
        source: the images of the run.
    """
    if config.backbone.name == GIVEN:
        return [f"moco.load_encoder({checkpoint!r}, backbone=module)"]
    if config.data.name == GIVEN:
        return [f"moco.load_encoder({checkpoint!r})"]
    start = [as_override("checkpoint", checkpoint)]
    for group, settings in (("backbone", config.backbone), ("data", config.data)):
        if settings.name == "custom":
            start.append(as_override(f"{group}.target", str(settings.target)))
    # The programs take all other settings of the data from the checkpoint.
    usual = DataConfig()
    for key in ("max_bad_fraction", "max_image_pixels"):
        value = getattr(config.data, key)
        if value != getattr(usual, key):
            start.append(f"data.{key}={value}")
    evaluate = ["python -m moco.evaluate", *start]
    embed = ["python -m moco.embed", *start, "output=features.npz"]
    segment = segment_step(config, start)
    if source.bank is None:
        if isinstance(source.train, (ShardedImages, IterableImages)):
            return [" ".join(embed), *segment]  # a stream has no images by number
        return [" ".join(evaluate), " ".join(embed), *segment]
    if len(np.unique(source.bank.labels[source.bank.labels >= 0])) < 2:
        evaluate.append("evaluation=label_free")
        return [" ".join(evaluate), " ".join(embed), *segment]
    return [" ".join(evaluate), *segment]


def segment_step(config: TrainConfig, start: Sequence[str]) -> list[str]:
    """Return the command that fine-tunes for segmentation, if the run was made for that.

    Args:
        config: of the run: it has masks to look at, or a decoder that moco.segment starts from.
        start: the checkpoint and the settings that all programs need.
    """
    masks = config.monitor.dense
    if masks.data is None and config.method.decoder is None:
        return []
    command = ["python -m moco.segment", *start, as_override("data.root", masks.root or "PATH")]
    if masks.data == "voc2012":
        command.append("data=voc2012")
    return [" ".join(command)]


def is_sweep_job() -> bool:
    """Return whether this process runs a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def job_line(run: Run) -> str:
    """Return how a job of a sweep ended, in one line."""
    parts = []
    for name, key in (("loss", "train/loss"), *JOB_FIGURES):
        if run.figures.get(key) is not None:
            parts.append(f"{name} {run.figures[key]:.4f}")
    if "verdict" in run.figures:
        answer = run.figures["verdict"].partition(":")[0]
        parts.append(f"learning: {answer}")
    return f"job {run.folder.name} is done: {', '.join(parts)}"


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
    if is_sweep_job():
        print_plain(run.console, job_line(run))
        return
    rows = training_rows(figures)
    if "segment/miou" in figures:
        protocol = (
            f"{figures['segment/num_images']:,} images, inference={figures['segment/inference']}"
        )
        rows.append(("measured on", protocol))
        rows += rows_of_segmentation(figures, class_names)
    checkpoint = run.folder / LAST_CHECKPOINT
    rows.append(("checkpoint", os.path.relpath(checkpoint)))
    best = run.folder / BEST_CHECKPOINT
    # A run that goes on with other images has the file of before, until there is a better one.
    if best.is_file() and "segment/best_epoch" in figures:
        checkpoint = best
        rows.append(("best checkpoint", os.path.relpath(best)))
        rows.append(("chosen by", best_in_words(run)))
    print_table(run.console, "Segmentation is done", rows)
    model = as_override("checkpoint", os.path.relpath(checkpoint))
    steps = [
        f"python -m moco.predict {model} data=images data.root=PATH",
        f"python -m moco.evaluate {model} evaluation=segmentation",
    ]
    folder = os.path.relpath(run.folder)
    if "tensorboard" in logger_names(run.plain["logger"]):
        steps.append(f"tensorboard --logdir {shell_quoted(folder)}")
    print_next(run.console, steps)


def rows_of_segmentation(
    figures: Mapping[str, Any], class_names: Sequence[str]
) -> list[tuple[str, str]]:
    """Return the figures of `moco.segmentation.metrics.segmentation_figures` in words.

    Args:
        figures: with others.
        class_names: with more than `MAX_CLASSES_SHOWN` no class has a row of its own.
    """
    rows = []
    for key, name in SEGMENT_FIGURES.items():
        if key in figures:
            rows.append((name, shown(figures[key])))
    if len(class_names) <= MAX_CLASSES_SHOWN:
        for name, in_words in zip(class_names, classes_in_words(class_names), strict=True):
            rows.append((f"IoU, {in_words}", shown_iou(figures, name)))
    return rows


def best_in_words(run: Run) -> str:
    """Return the figure that has chosen the best checkpoint, and its epoch."""
    metric = run.config.evaluation.metric
    best = run.figures[f"segment/best_{metric}"]
    epoch = run.figures["segment/best_epoch"]
    return f"{metric_in_words(metric)} {best:.4f} after epoch {epoch}"


def metric_in_words(metric: str) -> str:
    """Return how the progress bar and the closing lines call a figure of segmentation.

    Args:
        metric: ``evaluation.metric`` of the config.
    """
    kind, _, name = metric.partition("/")
    if name:
        in_words = numbered_class(int(name)) if name.isdecimal() else printable(name)
        return f"{'IoU' if kind == 'iou' else 'Dice'} of {in_words}"
    return SEGMENT_FIGURES[f"segment/{metric}"]


def shown(share: float | None) -> str:
    """Return a figure of segmentation as text. There may be no pixel that tells it."""
    if share is None:
        return "none: no held-out pixel tells it"
    return f"{share:.4f}"


def condition_in_words(key: str, value: Any) -> str:
    """Return a condition of a measurement as text: a share, a count, a size, a rate or a name.

    Args:
        key: its name in ``metrics.json``.
        value: as it is written there.
    """
    if value is None:
        return "none"
    if isinstance(value, float):
        is_share = "top1" in key or "recall" in key
        return f"{value:.4f}" if is_share else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool) and not key.endswith("seed"):
        unit = " px" if key.endswith("image_size") else ""
        return f"{value:,}{unit}"
    return str(value)


def shown_iou(figures: Mapping[str, Any], class_name: str) -> str:
    """Return the intersection over union of a class as text."""
    iou = figures[f"segment/iou/{class_name}"]
    if iou is None:
        return "neither in the masks nor predicted"
    return f"{iou:.4f}"
