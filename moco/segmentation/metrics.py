"""How right a segmentation is: what is counted of every batch, and the figures that follow."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

SCORES = ("miou", "dice", "pixel_accuracy", "class_accuracy")
"""The figures of all classes together, which stand behind ``segment/``."""
SCORES_OF_TWO_CLASSES = ("sensitivity", "specificity", "auc")
"""Further figures where there are two classes. Class 1 is the one that is looked for."""
SCORES_OF_A_CLASS = ("iou", "dice")
"""The figures of one class: ``segment/iou/NAME``."""

COMMONEST = "segment/miou_of_commonest_class"
"""The key of `miou_of_commonest_class`."""

NUM_BINS = 16_384
"""Bins of the log-odds of class 1."""
LARGEST_LOG_ODDS = 32.0
"""Log-odds beyond this share a bin: the probability is then within 1e-13 of 0 or 1."""


class SegmentationCounts:
    """Count how right predictions are, batch by batch, in memory that does not grow.

    Args:
        num_classes: how many classes there are.
        ignore_index: the number of pixels that do not count.
        device: where the counts are kept.
    """

    def __init__(
        self, num_classes: int, ignore_index: int, device: torch.device | str = "cpu"
    ) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        """See `confusion_matrix`."""
        self.odds: Tensor | None = None
        """See `log_odds_histogram`; None: there are more than two classes."""
        if num_classes == 2:
            self.odds = torch.zeros(2, NUM_BINS, dtype=torch.int64, device=device)

    def add(self, logits: Tensor, classes: Tensor) -> Tensor:
        """Count a batch, and return the predicted classes (N, height, width).

        Args:
            logits: (N, num_classes, height, width).
            classes: (N, height, width) class numbers, or `ignore_index`.
        """
        predicted = logits.argmax(dim=1)
        self.confusion += confusion_matrix(predicted, classes, self.num_classes, self.ignore_index)
        if self.odds is not None:
            self.odds += log_odds_histogram(logits, classes, self.ignore_index)
        return predicted

    def include(self, other: "SegmentationCounts") -> None:
        """Add what `other` has counted."""
        self.confusion += other.confusion
        if self.odds is not None and other.odds is not None:
            self.odds += other.odds

    def figures(self, class_names: Sequence[str]) -> dict[str, float | None]:
        """Return `segmentation_figures` of everything that was counted."""
        odds = None if self.odds is None else self.odds.cpu()
        return segmentation_figures(self.confusion.cpu(), class_names, odds)


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


def log_odds_histogram(logits: Tensor, classes: Tensor, ignore_index: int) -> Tensor:
    """Count the pixels of each of two classes by the log-odds of class 1.

    The log-odds are the difference of the two logits. They order the pixels as the probability of
    class 1 does, and still tell them apart where that probability is rounded to 0 or 1.

    Args:
        logits: (N, 2, height, width).
        classes: (N, height, width) 0, 1 or `ignore_index`.

    Returns:
        (2, `NUM_BINS`) int64: a row for each true class, from the lowest log-odds to the highest.
    """
    is_labelled = classes != ignore_index
    odds = (logits[:, 1].float() - logits[:, 0].float())[is_labelled]
    limit = LARGEST_LOG_ODDS
    odds = odds.nan_to_num(0.0, posinf=limit, neginf=-limit).clamp(-limit, limit)
    share = (odds + limit) / (2 * limit)  # 0..1
    bins = (share * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    places = classes[is_labelled].long() * NUM_BINS + bins
    return places.bincount(minlength=2 * NUM_BINS).view(2, NUM_BINS)


def area_under_roc(odds: Tensor) -> float | None:
    """Return the area under the ROC curve, or None if one of the two classes has no pixel.

    It is the probability that a random pixel of class 1 has a higher probability of class 1 than a
    random pixel of class 0 has; a tie counts half. Pixels of one bin count as tied, so the error is
    at most half the share of such pairs that fall into one bin. For 100,000 pixels with normally
    distributed log-odds of standard deviation 0.3 to 3 the error is below 1e-5.

    Args:
        odds: see `log_odds_histogram`.
    """
    negative, positive = odds.double()
    num_pairs = positive.sum() * negative.sum()
    if num_pairs == 0:
        return None
    below = negative.cumsum(dim=0) - negative
    return float((positive * (below + negative / 2)).sum() / num_pairs)


def segmentation_figures(
    confusion: Tensor, class_names: Sequence[str], odds: Tensor | None = None
) -> dict[str, float | None]:
    """Return the figures of a confusion matrix under their names in ``metrics.json``.

    With TP pixels of a class that are right, FN that are missed and FP that are wrongly given to
    it:

    - ``segment/iou/NAME``: TP / (TP + FP + FN), the intersection over union;
    - ``segment/dice/NAME``: 2 TP / (2 TP + FP + FN), which is also the F1 score;
    - ``segment/miou``, ``segment/dice``: their means over the classes;
    - ``segment/class_accuracy``: the mean over the classes of TP / (TP + FN);
    - ``segment/pixel_accuracy``: the fraction of pixels that are right;
    - with two classes ``segment/sensitivity`` is TP / (TP + FN) of class 1, and
      ``segment/specificity`` that of class 0. With `odds` there is ``segment/auc``, too.

    A class that is neither in the masks nor predicted has no figures (None), and the means leave it
    out. A class that is predicted and in no mask counts as 0. Where no pixel tells a figure, it is
    None. All this is as in torchmetrics (``average="macro"``), which has 0 in place of None.

    Args:
        confusion: see `confusion_matrix`.
        class_names: one name for each class.
        odds: see `log_odds_histogram`.
    """
    confusion = confusion.double()
    right = confusion.diagonal()
    true = confusion.sum(dim=1)
    predicted = confusion.sum(dim=0)
    union = true + predicted - right
    # NaN for a class that is nowhere.
    ious = right / union
    dices = 2 * right / (true + predicted)
    # A class that is predicted and in no mask would be 0 / 0.
    accuracies = (right / true.clamp(min=1)).where(union > 0, torch.nan)

    num_pixels = confusion.sum()
    scores = {
        "miou": ious.nanmean(),
        "dice": dices.nanmean(),
        "pixel_accuracy": right.sum() / num_pixels,
        "class_accuracy": accuracies.nanmean(),
    }
    figures = {f"segment/{name}": known(float(score)) for name, score in scores.items()}
    if len(class_names) == 2:
        specificity, sensitivity = (right / true).tolist()
        figures["segment/sensitivity"] = known(sensitivity)
        figures["segment/specificity"] = known(specificity)
        if odds is not None:
            figures["segment/auc"] = area_under_roc(odds)
    of_classes = zip(class_names, ious.tolist(), dices.tolist(), strict=True)
    for name, iou, dice in of_classes:
        figures[f"segment/iou/{name}"] = known(iou)
        figures[f"segment/dice/{name}"] = known(dice)
    return figures


def miou_of_commonest_class(confusion: Tensor) -> float | None:
    """Return the mIoU of a model that says the commonest class everywhere.

    It is what a model has to be better than. None if no pixel was counted.

    Args:
        confusion: see `confusion_matrix`.
    """
    true = confusion.sum(dim=1).double()
    if true.sum() == 0:
        return None
    share = true.max() / true.sum()  # the IoU of that class; the other classes have 0
    return float(share / (true > 0).sum())


def known(figure: float) -> float | None:
    """Return a figure, or None if it is 0 / 0."""
    return None if math.isnan(figure) else figure


def is_of_a_class(key: str) -> bool:
    """Return whether a key of `segmentation_figures` is of one class."""
    return key.startswith(tuple(f"segment/{name}/" for name in SCORES_OF_A_CLASS))
