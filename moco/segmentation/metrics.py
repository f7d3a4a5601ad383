"""How right a segmentation is: the confusion matrix and the figures that follow from it."""

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
    ``segment/pixel_accuracy`` is the fraction of pixels that are right.

    Args:
        confusion: see `confusion_matrix`.
        class_names: one name for each class.
    """
    right = confusion.diagonal()
    # A row counts the true pixels of a class, a column the predicted ones. The right ones are in
    # both, so they are subtracted once.
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - right
    class_ious: dict[str, float | None] = {}
    known_ious = []
    for number, name in enumerate(class_names):
        iou = None
        if union[number] > 0:
            iou = float(right[number].double() / union[number].double())
            known_ious.append(iou)
        class_ious[f"segment/iou/{name}"] = iou
    num_pixels = confusion.sum().clamp(min=1)
    figures: dict[str, float | None] = {
        "segment/miou": sum(known_ious) / max(len(known_ious), 1),
        "segment/pixel_accuracy": float(right.double().sum() / num_pixels),
    }
    return figures | class_ious
