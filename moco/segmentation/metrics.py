"""How right a segmentation is: the confusion matrix and the figures that follow from it."""

import math
from collections.abc import Sequence

from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix


def confusion_matrix(
    predicted: Tensor, classes: Tensor, num_classes: int, ignore_index: int
) -> Tensor:
    """Count the pixels of each class (row) that were predicted as each class (column).

    Args:
        predicted: (N, height, width) class numbers.
        classes: (N, height, width) class numbers, or `ignore_index` for pixels that do not count.

    Returns:
        (num_classes, num_classes) int64.
    """
    return multiclass_confusion_matrix(
        predicted, classes, num_classes, ignore_index=ignore_index, validate_args=False
    )


def segmentation_figures(confusion: Tensor, class_names: Sequence[str]) -> dict[str, float | None]:
    """Return the figures of a confusion matrix under their names in ``metrics.json``.

    ``segment/iou/NAME`` is the intersection over union of one class, or None if the class is
    neither in the masks nor predicted. ``segment/miou`` is the mean over the other classes.
    ``segment/pixel_accuracy`` is the fraction of pixels that are right. Both are None if no pixel
    was counted.

    Args:
        confusion: see `confusion_matrix`.
        class_names: one name for each class.
    """
    right = confusion.diagonal().double()
    # A row counts the true pixels of a class, a column the predicted ones. The right ones are in
    # both, so they are subtracted once.
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - right
    class_ious = right / union  # NaN for a class that is nowhere
    figures: dict[str, float | None] = {"segment/miou": None, "segment/pixel_accuracy": None}
    if confusion.sum() > 0:
        figures["segment/miou"] = float(class_ious.nanmean())
        figures["segment/pixel_accuracy"] = float(right.sum() / confusion.sum())
    for name, iou in zip(class_names, class_ious.tolist(), strict=True):
        figures[f"segment/iou/{name}"] = None if math.isnan(iou) else iou
    return figures
