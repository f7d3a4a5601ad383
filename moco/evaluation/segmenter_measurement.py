"""A fine-tuned segmenter on images with masks, as ``evaluation=segmentation`` measures it."""

import logging
import time
from collections.abc import Sequence

import torch

from moco.data.augment.views import Normalized
from moco.errors import InputError
from moco.evaluation.subject import Findings, table_of
from moco.phases import counted
from moco.segmentation.inference import predicted_classes
from moco.segmentation.mask_batches import MaskBatch, whole_image_loader
from moco.segmentation.mask_sources import SegmentationSource
from moco.segmentation.metrics import confusion_matrix, segmentation_figures
from moco.segmentation.segmentation_data import check_readable
from moco.segmentation.segmenter import Segmenter

log = logging.getLogger(__name__)


def measure_segmenter(
    segmenter: Segmenter,
    source: SegmentationSource,
    device: torch.device,
    *,
    inference: str,
    image_size: int,
    batch_size: int,
    num_workers: int,
) -> Findings:
    """Segment the held-out images in eval mode and float32, as the run itself measures them.

    Args:
        segmenter: the model.
        source: the images, prepared.
        device: it computes there.
        inference: ``whole`` or ``slide``, see `predicted_classes`.
        image_size: side of sliding windows, px.
        batch_size: images of one size at once.
        num_workers: loader processes.

    Raises:
        InputError: an image cannot be read.
    """
    started = time.monotonic()
    values = source.validation.images.values
    assert values is not None  # `SegmentationSource.prepare` sets them
    look = segmenter.hparams
    normalize = Normalized(look["mean"], look["std"], values.bands, values.is_float)
    images = source.validation
    loader = whole_image_loader(images, normalize, batch_size, num_workers, device)
    num_classes = segmenter.num_classes
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    segmenter.to(device).eval()
    for batch in counted(loader, "segmenting", len(images), size=num_images_of):
        check_readable(batch)
        pixels, classes = batch.images.to(device), batch.classes.to(device)
        predicted = predicted_classes(segmenter.logits, pixels, inference, image_size)
        confusion += confusion_matrix(predicted, classes, num_classes, source.ignore_index)
    log.info("%d images segmented in %.1f s", len(images), time.monotonic() - started)

    scores: dict[str, float | None] = {}
    ious: dict[str, float | None] = {}
    for name, figure in segmentation_figures(confusion.cpu(), source.class_names).items():
        part = ious if name.startswith("segment/iou/") else scores
        part[name] = figure
    rows = []
    for class_name, iou in zip(source.class_names, ious.values(), strict=True):
        rows.append((class_name, "not there" if iou is None else f"{iou:.4f}"))
    protocol = {
        "segment/inference": inference,
        "segment/image_size": image_size,
        "segment/num_images": len(images),
        "segment/num_classes": num_classes,
        "segment/decoder": look["decoder"]["name"],
    }
    table = table_of("intersection over union", ("class", "IoU"), rows)
    miou = scores["segment/miou"]
    headline = "no mIoU: no held-out pixel has a class"
    if miou is not None:
        headline = f"mIoU {100 * miou:.1f} % of {len(images):,} images (inference={inference})"
    title = "segmentation by a fine-tuned model"
    return Findings(title, scores, protocol, ious, [table], headline)


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
