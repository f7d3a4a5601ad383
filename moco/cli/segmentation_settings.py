"""Settings of ``moco.segment`` that only the dataset can complete: class weights, best metric."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moco.cli.checks import check_class_weights
from moco.config.segment import SegmentConfig
from moco.data.sources.source import classes_in_words
from moco.errors import InputError, printable, unknown_name
from moco.runs.atomic_files import write_atomically
from moco.runs.training_set import counted
from moco.segmentation.mask_sources import SegmentationSource
from moco.segmentation.pixel_losses import balanced_class_weights
from moco.segmentation.segmentation_data import SegmentationData

log = logging.getLogger(__name__)

TRAIN_IMAGES = "train_images.txt"
"""The file in the run folder that names the images of a draw."""
MOST_SHOWN = 12
"""Classes whose weight the log tells."""


def resolved_class_weights(setting: Any, source: SegmentationSource) -> list[float] | None:
    """Return the weight of each class in the loss; None: all weigh alike.

    Weights of ``auto`` are counted in the masks at every start, so they are those of the masks as
    they are now.

    Args:
        setting: ``class_weights`` of the config.
        source: the dataset.

    Raises:
        InputError: the setting is no list of numbers above 0, one for each class.
    """
    if setting is None:
        return None
    names = source.class_names
    if setting == "auto":
        weights = balanced_class_weights(source.class_pixels)
        shown = []
        for name, weight in zip(classes_in_words(names), weights, strict=True):
            shown.append(f"{printable(name)} {weight:.3g}")
        rest = "" if len(shown) <= MOST_SHOWN else f" and {len(shown) - MOST_SHOWN} more"
        log.info("class weights (auto): %s%s", ", ".join(shown[:MOST_SHOWN]), rest)
        return weights
    check_class_weights(setting, len(names))
    return [float(weight) for weight in setting]


def check_metric(metric: str, class_names: Sequence[str]) -> None:
    """Check that the dataset's classes have the figure which chooses the best checkpoint.

    Args:
        metric: ``evaluation.metric`` of the config.
        class_names: of the dataset.

    Raises:
        InputError: there is no such figure.
    """
    if metric == "auc" and len(class_names) != 2:
        raise InputError(
            f"evaluation.metric=auc: needs two classes, and the dataset has {len(class_names)}"
        )
    _, _, name = metric.partition("/")
    if name and name not in class_names:
        problem = unknown_name("class", name, class_names)
        raise InputError(f"evaluation.metric={metric}: {problem}")


def tell_of_draw(data: SegmentationData, config: SegmentConfig) -> None:
    """Log which part of the training images is used, and what that does to the epochs."""
    draw = data.source.draw
    if draw is None:
        return
    num_images = len(data.source.train)
    num_all = num_images + data.source.num_undrawn
    log.info(
        "%s: %d of %d training images, drawn by their names with label_seed=%d",
        draw.setting(),
        num_images,
        num_all,
        draw.label_seed,
    )
    if data.crops_per_image > 1:
        log.info(
            "data.batch_size=%d is more than these images: an epoch is one step with several "
            "crops of each",
            data.batch_size,
        )
    factor = epochs_of_equal_steps(data)
    if factor > 1:
        log.info(
            "an epoch has %s instead of %d; it is measured and saved every %d epochs; "
            "to train as long as with all images: trainer.max_epochs=%d",
            counted(data.steps_per_epoch, "step"),
            num_all // data.batch_size,
            config.evaluation.every_n_epochs,
            factor * config.trainer.max_epochs,
        )


def settle_intervals(data: SegmentationData, config: SegmentConfig) -> None:
    """Set how often the run is measured and saved where the config leaves it open."""
    factor = epochs_of_equal_steps(data)
    if config.evaluation.every_n_epochs is None:
        config.evaluation.every_n_epochs = factor
    if config.checkpoint_every_n_epochs is None:
        config.checkpoint_every_n_epochs = factor


def epochs_of_equal_steps(data: SegmentationData) -> int:
    """Return how many epochs have the steps of one epoch of all training images, at least 1."""
    num_all = len(data.source.train) + data.source.num_undrawn
    steps_of_all = num_all // data.batch_size
    return max(1, math.ceil(steps_of_all / data.steps_per_epoch))


def write_drawn_images(folder: Path, source: SegmentationSource, root: Any) -> None:
    """Write the paths of the drawn images below `root` into the run folder, one a line.

    A run on all training images has no such file.
    """
    if source.draw is None:
        return
    text = ""
    for index in range(len(source.train)):
        text += printable(source.train.name_below(root, index)) + "\n"
    write_atomically(folder / TRAIN_IMAGES, lambda file: file.write(text.encode()))
