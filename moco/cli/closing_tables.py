"""What a pretraining says at its end."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console

from moco.cli.progress import print_table
from moco.runs.run_folder import BACKBONE_FILE, LAST_CHECKPOINT, as_override
from moco.training.stopwatches import epoch_time, in_words


def close(console: Console, folder: Path, figures: dict[str, Any], num_unreadable: int) -> None:
    """Print what was reached, where it is, what to type next.

    Args:
        num_unreadable: images that were skipped.
    """
    rows = [("epochs, steps", f"{figures.get('epoch', 0)}, {figures.get('step', 0)}")]
    if "train/loss" in figures:
        rows.append(("loss of the last epoch", f"{figures['train/loss']:.4f}"))
        rows.append(("images per second", f"{figures['images_per_second']:,.0f}"))
    if "train/seconds" in figures:
        rows.append(("time in training", str(timedelta(seconds=round(figures["train/seconds"])))))
    if epoch_time.total:
        rows.append(("time of its epochs", in_words(epoch_time.total)))
    if "knn/top1" in figures:
        rows.append(("kNN protocol", knn_protocol(figures)))
        for key, name in (
            ("knn_raw_pixels/top1", "raw pixels"),
            ("knn_untrained/top1", "untrained backbone"),
            ("knn_start/top1", "weights of init_from"),
            ("knn/top1", "pretrained backbone"),
        ):
            if key in figures:
                rows.append((f"kNN top-1, {name}", f"{figures[key]:.4f}"))
    if "dense/knn_miou" in figures:
        rows.append(("mIoU of kNN segmentation", f"{figures['dense/knn_miou']:.4f}"))
    if num_unreadable:
        rows.append(("unreadable images skipped", str(num_unreadable)))
    checkpoint = os.path.relpath(folder / LAST_CHECKPOINT)
    rows.append(("checkpoint", checkpoint))
    rows.append(("its backbone alone", os.path.relpath(folder / BACKBONE_FILE)))
    print_table(console, "Pretraining is done", rows)
    console.print(
        f"next: python -m moco.evaluate {as_override('checkpoint', checkpoint)}",
        soft_wrap=True,
        highlight=False,
    )


def knn_protocol(figures: dict[str, Any]) -> str:
    """The conditions of a kNN figure in words."""
    # A run from before there was a choice does not say: it was 32-true.
    precision = " in bf16-mixed" if figures.get("knn/precision") == "bf16-mixed" else ""
    return (
        f"k {figures['knn/num_neighbors']}, T {figures['knn/temperature']}, {figures['knn/feature']} feature{precision}, "
        f"{figures['knn/num_queries']:,} queries against a bank of {figures['knn/bank_size']:,}"
    )
