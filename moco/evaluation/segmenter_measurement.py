"""A fine-tuned segmenter on images with masks, as ``evaluation=segmentation`` measures it."""

import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from moco.data.augment.views import Normalized
from moco.data.files.written_files import SOFTWARE
from moco.errors import InputError, printable
from moco.evaluation.image_figures import PER_IMAGE, ImageFigures
from moco.evaluation.reports.plots import legible
from moco.evaluation.reports.segmentation_plots import (
    compared_masks,
    confused_pixels,
    shown_names,
    write_stacked,
)
from moco.evaluation.subject import Findings, table_of
from moco.phases import counted
from moco.segmentation.inference import predicted_logits
from moco.segmentation.mask_batches import MaskBatch, whole_image_loader
from moco.segmentation.mask_sources import SegmentationSource
from moco.segmentation.metrics import SCORES_OF_A_CLASS, SegmentationCounts, is_of_a_class
from moco.segmentation.segmentation_data import check_readable
from moco.segmentation.segmenter import Segmenter

log = logging.getLogger(__name__)

NUM_PLOTTED = 6
"""Images in the plot of predictions."""
LONGEST_TITLE = 60
"""Letters of the name of an image above its plot."""


def measure_segmenter(
    segmenter: Segmenter,
    source: SegmentationSource,
    device: torch.device,
    *,
    inference: str,
    image_size: int,
    batch_size: int,
    num_workers: int,
    root: Any = None,
    plots: bool = False,
) -> Findings:
    """Segment the held-out images in eval mode and float32, as the run itself measures them.

    Args:
        segmenter: the model.
        source: the images, prepared.
        device: it computes there.
        inference: ``whole`` or ``slide``, see `predicted_logits`.
        image_size: side of sliding windows, px.
        batch_size: images of one size at once.
        num_workers: loader processes.
        root: the dataset's folder, which the table of images leaves out of their names.
        plots: also draw the confusion matrix, and some images from the worst to the best.

    Raises:
        InputError: an image cannot be read.
    """
    started = time.monotonic()
    values = source.validation.images.values
    assert values is not None  # `SegmentationSource.prepare` sets them
    look = segmenter.hparams
    normalize = Normalized(look["mean"], look["std"], values.bands, values.is_float)
    images = source.validation
    load = partial(whole_image_loader, images, normalize, batch_size, num_workers, device)
    segmenter.to(device).eval()

    def segmented(batch: MaskBatch) -> tuple[Tensor, Tensor]:
        """Return the logits and the true classes of a batch."""
        check_readable(batch)
        pixels, classes = batch.images.to(device), batch.classes.to(device)
        return predicted_logits(segmenter.logits, pixels, inference, image_size), classes

    num_classes = segmenter.num_classes
    total = SegmentationCounts(num_classes, source.ignore_index, device)
    of_images = ImageFigures()
    for batch in counted(load(), "segmenting", len(images), size=num_images_of):
        logits, classes = segmented(batch)
        for row, number in enumerate(batch.indices.tolist()):
            counts = SegmentationCounts(num_classes, source.ignore_index, device)
            counts.add(logits[row : row + 1], classes[row : row + 1])
            total.include(counts)
            num_pixels = int(counts.confusion.sum())
            figures = counts.figures(source.class_names)
            of_images.add(number, images.name_below(root, number), num_pixels, figures)
    log.info("%d images segmented in %.1f s", len(images), time.monotonic() - started)

    scores: dict[str, float | None] = {}
    of_classes: dict[str, float | None] = {}
    for name, figure in total.figures(source.class_names).items():
        part = of_classes if is_of_a_class(name) else scores
        part[name] = figure
    protocol = {
        "segment/inference": inference,
        "segment/image_size": image_size,
        "segment/num_images": len(images),
        "segment/num_classes": num_classes,
        "segment/decoder": look["decoder"]["name"],
    }
    miou = scores["segment/miou"]
    headline = "no mIoU: no held-out pixel has a class"
    if miou is not None:
        headline = f"mIoU {100 * miou:.1f} % of {len(images):,} images (inference={inference})"
    findings = Findings(
        "segmentation by a fine-tuned model",
        scores,
        protocol,
        of_classes,
        [table_of_classes(source.class_names, of_classes)],
        headline,
    )
    findings.files[PER_IMAGE] = of_images.write
    if not plots:
        return findings

    names = shown_names(source.class_names)
    confusion = confused_pixels(names, total.confusion)
    mark = {"Software": SOFTWARE}  # so that it is no image of a dataset
    findings.plots["confusion.png"] = partial(confusion.savefig, format="png", metadata=mark)
    chosen = of_images.from_worst_to_best("segment/miou", NUM_PLOTTED)
    drawn: dict[int, np.ndarray] = {}
    for batch in load(indices=chosen):
        logits, classes = segmented(batch)
        for row, number in enumerate(batch.indices.tolist()):
            name, _, figures = of_images.rows[number]
            title = f"{legible(printable(name), LONGEST_TITLE) or number}: "
            drawn[number] = compared_masks(
                batch.images[row],
                classes[row],
                logits[row].argmax(dim=0),
                names,
                look["mean"],
                look["std"],
                values,
                title + f"mIoU {figures['segment/miou']:.3f}",
            )
    if drawn:
        in_order = [drawn[number] for number in chosen]
        findings.plots["predictions.png"] = partial(write_stacked, in_order)
    return findings


def table_of_classes(class_names: Sequence[str], figures: Mapping[str, float | None]) -> Table:
    """Return the table of the figures of each class.

    Args:
        class_names: of the dataset.
        figures: see `moco.segmentation.metrics.segmentation_figures`.
    """
    rows = []
    for name in class_names:
        row = [name]
        for kind in SCORES_OF_A_CLASS:
            figure = figures[f"segment/{kind}/{name}"]
            row.append("not there" if figure is None else f"{figure:.4f}")
        rows.append(row)
    title = "each class: intersection over union, Dice (F1)"
    return table_of(title, ("class", "IoU", "Dice"), rows)


def num_images_of(batch: MaskBatch) -> int:
    """Return how many images of a batch could be read."""
    return len(batch.images)


def check_same_classes(there: Sequence[str], here: Sequence[str], origin: str) -> None:
    """Raise InputError if a dataset names other classes than a model learned.

    Args:
        there: the model's, in the order of their numbers.
        here: the dataset's; none: it does not name them.
        origin: where the dataset's names are from.
    """
    for number, (learned, named) in enumerate(zip(there, here, strict=False)):
        if learned != named:
            raise InputError(
                f"{origin}: class {number} is {named}, but the model learned it as {learned}"
            )
    if here and len(here) != len(there):
        raise InputError(f"{origin}: {len(here)} classes, but the model learned {len(there)}")


def rebuilt_segmenter(hyper_parameters: dict[str, Any], state: dict[str, Any]) -> Segmenter:
    """Return the model of a checkpoint of moco.segment.

    Raises:
        InputError: its weights do not fit its own hyperparameters.
    """
    try:
        segmenter = Segmenter(**hyper_parameters)
        segmenter.load_state_dict(state)
    except (TypeError, RuntimeError, KeyError) as error:
        raise InputError(f"its weights do not fit its own hyperparameters ({error})") from error
    return segmenter
