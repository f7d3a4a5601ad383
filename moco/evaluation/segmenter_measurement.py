"""A fine-tuned segmenter on images with masks, as ``evaluation=segmentation`` measures it."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from moco.data.augment.views import Normalized
from moco.data.files.written_files import SOFTWARE
from moco.data.sources.pixel_values import PixelValues
from moco.data.sources.source import classes_in_words
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
from moco.segmentation.metrics import (
    COMMONEST,
    SCORES_OF_A_CLASS,
    SegmentationCounts,
    is_of_a_class,
    miou_of_commonest_class,
)
from moco.segmentation.segmentation_data import check_readable
from moco.segmentation.segmenter import Segmenter

log = logging.getLogger(__name__)

NUM_PLOTTED = 6
"""Images in the plot of predictions."""
LONGEST_TITLE = 60
"""Letters of the name of an image above its plot."""


@dataclass(frozen=True)
class SegmentedImages:
    """The held-out images of a dataset and a model that segments them."""

    segmenter: Segmenter
    """In eval mode, on `device`."""
    source: SegmentationSource
    """Prepared."""
    device: torch.device
    inference: str
    """``whole`` or ``slide``, see `predicted_logits`."""
    image_size: int
    """Side of sliding windows, px."""
    batch_size: int
    """Images of one size at once."""
    num_workers: int
    """Loader processes."""

    @property
    def values(self) -> PixelValues:
        """How the pixels of the images are made."""
        values = self.source.validation.images.values
        assert values is not None  # `SegmentationSource.prepare` sets them
        return values

    def batches(
        self, indices: Sequence[int] | None = None
    ) -> Iterator[tuple[MaskBatch, Tensor, Tensor]]:
        """Yield batches with their logits and classes on the device.

        Args:
            indices: which images; None: all.

        Raises:
            InputError: an image cannot be read.
        """
        look = self.segmenter.hparams
        images, values = self.source.validation, self.values
        loader = whole_image_loader(
            images,
            Normalized(look["mean"], look["std"], values.bands, values.is_float),
            self.batch_size,
            self.num_workers,
            self.device,
            indices=indices,
        )
        for batch in loader:
            check_readable(batch)
            pixels, classes = batch.images.to(self.device), batch.classes.to(self.device)
            logits = predicted_logits(
                self.segmenter.logits, pixels, self.inference, self.image_size
            )
            yield batch, logits, classes

    def new_counts(self) -> SegmentationCounts:
        """Return counts of nothing yet."""
        source = self.source
        return SegmentationCounts(len(source.class_names), source.ignore_index, self.device)


def measure_segmenter(
    segmenter: Segmenter,
    source: SegmentationSource,
    device: torch.device,
    *,
    root: Any = None,
    plots: bool = False,
    **settings: Any,
) -> Findings:
    """Segment the held-out images in eval mode and float32, as the run itself measures them.

    Args:
        segmenter: the model.
        source: the images, prepared.
        device: it computes there.
        root: the dataset's folder, which the table of images leaves out of their names.
        plots: also draw the confusion matrix, and some images from the worst to the best.
        settings: the other fields of `SegmentedImages`.

    Raises:
        InputError: an image cannot be read.
    """
    segmenter.to(device).eval()
    segmented = SegmentedImages(segmenter, source, device, **settings)
    started = time.monotonic()
    num_images = len(source.validation)
    total = segmented.new_counts()
    of_images = ImageFigures()
    batches = segmented.batches()
    for batch, logits, classes in counted(batches, "segmenting", num_images, size=num_images_of):
        for row, number in enumerate(batch.indices.tolist()):
            counts = segmented.new_counts()
            counts.add(logits[row : row + 1], classes[row : row + 1])
            total.include(counts)
            name = source.validation.name_below(root, number)
            figures = counts.figures(source.class_names)
            of_images.add(number, name, int(counts.confusion.sum()), figures)
    log.info("%d images segmented in %.1f s", num_images, time.monotonic() - started)

    commonest = miou_of_commonest_class(total.confusion)
    findings = findings_of(segmented, total.figures(source.class_names), commonest)
    findings.files[PER_IMAGE] = of_images.write
    if plots:
        names = shown_names(source.class_names)
        confusion = confused_pixels(names, total.confusion)
        mark = {"Software": SOFTWARE}  # so that it is no image of a dataset
        findings.plots["confusion.png"] = partial(confusion.savefig, format="png", metadata=mark)
        comparisons = plots_of_some(segmented, of_images, names)
        if comparisons:
            findings.plots["predictions.png"] = partial(write_stacked, comparisons)
    return findings


def findings_of(
    segmented: SegmentedImages, figures: Mapping[str, float | None], commonest: float | None
) -> Findings:
    """Return what is printed and written of the figures of all images.

    Args:
        figures: of `segmentation_figures`.
        commonest: see `miou_of_commonest_class`.
    """
    scores: dict[str, float | None] = {}
    of_classes: dict[str, float | None] = {}
    for name, figure in figures.items():
        part = of_classes if is_of_a_class(name) else scores
        part[name] = figure
    source, inference = segmented.source, segmented.inference
    num_images = len(source.validation)
    scores[COMMONEST] = commonest
    protocol = {
        "segment/inference": inference,
        "segment/image_size": segmented.image_size,
        "segment/num_images": num_images,
        "segment/num_classes": len(source.class_names),
        "segment/decoder": segmented.segmenter.hparams["decoder"]["name"],
    }
    miou = scores["segment/miou"]
    headline = "no mIoU: no held-out pixel has a class"
    if miou is not None:
        assert commonest is not None  # a pixel has been counted
        headline = (
            f"mIoU {100 * miou:.1f} % of {num_images:,} images (inference={inference}); "
            f"the commonest class everywhere has {100 * commonest:.1f} %"
        )
    table = table_of_classes(source.class_names, of_classes)
    title = "Segmentation by a fine-tuned model"
    return Findings(title, scores, protocol, of_classes, [table], headline)


def plots_of_some(
    segmented: SegmentedImages, of_images: ImageFigures, names: Sequence[str]
) -> list[np.ndarray]:
    """Return plots of some images with mask and prediction, from the worst to the best.

    The images are segmented again, because the predictions of all would not fit into memory.

    Args:
        segmented: the images.
        of_images: their figures.
        names: of the classes, as plots show them.
    """
    look = segmented.segmenter.hparams
    chosen = of_images.from_worst_to_best("segment/miou", NUM_PLOTTED)
    drawn: dict[int, np.ndarray] = {}
    for batch, logits, classes in segmented.batches(chosen):
        for row, number in enumerate(batch.indices.tolist()):
            name, _, figures = of_images.rows[number]
            shown = legible(printable(name), LONGEST_TITLE) or str(number)
            drawn[number] = compared_masks(
                batch.images[row],
                classes[row],
                logits[row].argmax(dim=0),
                names,
                look["mean"],
                look["std"],
                segmented.values,
                # The figure comes first: a narrow plot cuts the end of a long name.
                f"mIoU {figures['segment/miou']:.3f}  {shown}",
            )
    return [drawn[number] for number in chosen]


def table_of_classes(class_names: Sequence[str], figures: Mapping[str, float | None]) -> Table:
    """Return the table of the figures of each class.

    Args:
        class_names: of the dataset.
        figures: see `moco.segmentation.metrics.segmentation_figures`.
    """
    rows = []
    for name, in_words in zip(class_names, classes_in_words(class_names), strict=True):
        row = [in_words]
        for kind in SCORES_OF_A_CLASS:
            figure = figures[f"segment/{kind}/{name}"]
            row.append("not there" if figure is None else f"{figure:.4f}")
        rows.append(row)
    title = "Intersection over union (IoU) and Dice (F1)"
    return table_of(title, ("class", "IoU", "Dice"), rows)


def num_images_of(segmented: tuple[MaskBatch, Tensor, Tensor]) -> int:
    """Return how many images a batch of `SegmentedImages` holds."""
    return len(segmented[0].images)


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
