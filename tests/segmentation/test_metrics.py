"""Figures of a segmentation against a slow count and against torchmetrics."""

import warnings

import numpy as np
import pytest
import torch
from torchmetrics.functional import classification as theirs

from moco.segmentation.metrics import (
    NUM_BINS,
    SegmentationCounts,
    area_under_roc,
    confusion_matrix,
    log_odds_histogram,
    miou_of_commonest_class,
    segmentation_figures,
)


def slow_confusion(predicted, classes, num_classes, ignore_index):
    matrix = np.zeros((num_classes, num_classes), dtype=np.int64)
    for found, truth in zip(predicted.ravel(), classes.ravel(), strict=True):
        if truth != ignore_index:
            matrix[truth, found] += 1
    return matrix


@pytest.mark.parametrize("ignore_index", [255, 0, 2])
def test_the_confusion_matrix_counts_every_pixel_with_a_class(ignore_index, generator):
    predicted, classes = generator.integers(0, 5, (2, 3, 20, 20))
    classes[generator.random(classes.shape) < 0.2] = ignore_index
    matrix = confusion_matrix(
        torch.from_numpy(predicted), torch.from_numpy(classes), 5, ignore_index
    )
    assert np.array_equal(matrix.numpy(), slow_confusion(predicted, classes, 5, ignore_index))


def test_figures_equal_a_count_with_sets_of_pixels(generator):
    predicted, classes = generator.integers(0, 3, (2, 400))
    predicted[generator.random(400) < 0.5] = classes[0]
    confusion = torch.from_numpy(slow_confusion(predicted, classes, 3, 255))
    figures = segmentation_figures(confusion, ["a", "b", "c"])
    ious = []
    for number, name in enumerate("abc"):
        found = set(np.flatnonzero(predicted == number))
        truth = set(np.flatnonzero(classes == number))
        ious.append(len(found & truth) / len(found | truth))
        assert figures[f"segment/iou/{name}"] == pytest.approx(ious[-1])
    assert figures["segment/miou"] == pytest.approx(sum(ious) / 3)
    assert figures["segment/pixel_accuracy"] == pytest.approx((predicted == classes).mean())


def test_a_class_that_is_neither_in_the_masks_nor_predicted_does_not_count():
    confusion = torch.tensor([[6, 2, 0, 0], [0, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    figures = segmentation_figures(confusion, ["a", "b", "c", "d"])
    assert (figures["segment/iou/a"], figures["segment/iou/b"]) == (6 / 8, 4 / 6)
    assert figures["segment/iou/c"] is None
    assert figures["segment/miou"] == pytest.approx((6 / 8 + 4 / 6) / 2)


def test_a_class_that_is_predicted_but_not_in_the_masks_counts_as_zero():
    confusion = torch.tensor([[6, 2, 1, 0], [0, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    figures = segmentation_figures(confusion, ["a", "b", "c", "d"])
    assert figures["segment/iou/c"] == 0.0
    assert figures["segment/miou"] == pytest.approx((6 / 9 + 4 / 6) / 3)


def test_masks_without_any_class_give_no_figure():
    figures = segmentation_figures(torch.zeros(2, 2, dtype=torch.long), ["a", "b"])
    assert set(figures.values()) == {None}


IGNORED = 255
# Of each case: the number of classes, those that the masks hold, those that are predicted, and
# the share of pixels without a class.
CASES = {
    "all classes": (4, [0, 1, 2, 3], [0, 1, 2, 3], 0.2),
    "a class that is nowhere": (4, [0, 1, 3], [0, 1, 3], 0.2),
    "a class that is predicted alone": (4, [0, 1], [0, 1, 2], 0.2),
    "a class that is in masks alone": (4, [0, 1, 2], [0, 1], 0.0),
    "two classes": (2, [0, 1], [0, 1], 0.2),
    "two classes, one in the masks": (2, [0], [0, 1], 0.2),
    "nothing but pixels without a class": (2, [0], [0, 1], 1.0),
}


def slow_figures(predicted, classes, num_classes):
    """Every figure from sets of pixels; None where it is 0 / 0."""
    labelled = set(np.flatnonzero(classes != IGNORED).tolist())
    ious, dices, accuracies = {}, {}, {}
    right = 0
    for number in range(num_classes):
        found = set(np.flatnonzero(predicted == number).tolist()) & labelled
        truth = set(np.flatnonzero(classes == number).tolist())
        right += len(found & truth)
        ious[number] = dices[number] = None
        if found | truth:
            ious[number] = len(found & truth) / len(found | truth)
            dices[number] = 2 * len(found & truth) / (len(found) + len(truth))
            accuracies[number] = len(found & truth) / len(truth) if truth else 0.0
    figures = {f"iou/{number}": iou for number, iou in ious.items()}
    figures |= {f"dice/{number}": dice for number, dice in dices.items()}
    for name, values in (("miou", ious), ("dice", dices), ("class_accuracy", accuracies)):
        there = [value for value in values.values() if value is not None]
        figures[name] = np.mean(there) if there else None
    figures["pixel_accuracy"] = right / len(labelled) if labelled else None
    if num_classes == 2:
        # A class that no mask holds has no recall.
        for name, number in (("sensitivity", 1), ("specificity", 0)):
            figures[name] = accuracies[number] if (classes == number).any() else None
    return figures


def torchmetrics_figures(logits, classes, num_classes):
    """The same by torchmetrics. Where a figure is 0 / 0 it says 0."""
    settings = {"num_classes": num_classes, "ignore_index": IGNORED}
    arguments = logits.argmax(dim=1), classes
    figures = {
        "miou": theirs.multiclass_jaccard_index(*arguments, **settings),
        "dice": theirs.multiclass_f1_score(*arguments, **settings),
        "pixel_accuracy": theirs.multiclass_accuracy(*arguments, **settings, average="micro"),
        "class_accuracy": theirs.multiclass_accuracy(*arguments, **settings),
    }
    ious = theirs.multiclass_jaccard_index(*arguments, **settings, average="none")
    dices = theirs.multiclass_f1_score(*arguments, **settings, average="none")
    for number in range(num_classes):
        figures[f"iou/{number}"], figures[f"dice/{number}"] = ious[number], dices[number]
    if num_classes == 2:
        probability = logits.softmax(dim=1)[:, 1]
        if (classes == IGNORED).all():
            probability, classes = torch.zeros(1), torch.zeros(1, dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of masks with one class
            figures["auc"] = theirs.binary_auroc(probability, classes, ignore_index=IGNORED)
        figures["sensitivity"] = theirs.binary_recall(*arguments, ignore_index=IGNORED)
        figures["specificity"] = theirs.binary_specificity(*arguments, ignore_index=IGNORED)
    return {name: float(figure) for name, figure in figures.items()}


@pytest.mark.parametrize("case", CASES)
def test_figures_agree_with_torchmetrics_and_a_slow_count(case, generator):
    num_classes, in_masks, in_predictions, ignored = CASES[case]
    classes = generator.choice(in_masks, (3, 20, 20))
    logits = generator.normal(size=(3, num_classes, 20, 20)).astype(np.float32)
    for number in set(range(num_classes)) - set(in_predictions):
        logits[:, number] = -100
    right = np.arange(num_classes).reshape(1, -1, 1, 1) == classes[:, None]
    logits += right  # so that more is right than by chance
    classes[generator.random(classes.shape) < ignored] = IGNORED
    counts = SegmentationCounts(num_classes, IGNORED)
    for image in range(3):
        rows = slice(image, image + 1)
        counts.add(torch.from_numpy(logits[rows]), torch.from_numpy(classes[rows]))
    names = list(map(str, range(num_classes)))
    figures = {}
    for key, figure in counts.figures(names).items():
        figures[key.removeprefix("segment/")] = figure

    slow = slow_figures(logits.argmax(axis=1).ravel(), classes.ravel(), num_classes)
    assert figures.keys() - {"auc"} == slow.keys()
    for name, expected in slow.items():
        assert figures[name] == pytest.approx(expected, abs=1e-9), name
    their = torchmetrics_figures(torch.from_numpy(logits), torch.from_numpy(classes), num_classes)
    assert figures.keys() == their.keys()
    for name, expected in their.items():
        if figures[name] is None:
            assert expected == 0 or np.isnan(expected), name
        else:
            assert figures[name] == pytest.approx(expected, abs=1e-4), name


def test_the_area_under_the_curve_is_exact_to_five_digits(generator):
    """Also where the probabilities of float32 are rounded to 1."""
    truth = torch.from_numpy(generator.integers(0, 2, (1, 100, 1000)))
    for spread, offset in ((1.0, 0.0), (3.0, 12.0), (0.3, 0.0)):
        odds = spread * torch.from_numpy(generator.normal(size=truth.shape)) + spread * truth
        logits = torch.stack([torch.zeros_like(odds), odds + offset], dim=1)
        histogram = log_odds_histogram(logits, truth, IGNORED)
        assert histogram.shape == (2, NUM_BINS)
        # Ranks of the odds, as probabilities that double precision tells apart.
        exact = float(theirs.binary_auroc(torch.sigmoid(odds / 4), truth))
        assert area_under_roc(histogram) == pytest.approx(exact, abs=1e-5)


def test_scores_that_are_not_finite_are_counted():
    """The logit of a class that is left out is minus infinity; a diverged run has NaN."""
    nan, infinite = float("nan"), float("inf")
    logits = torch.tensor([[0.0, 0.0, -infinite, nan], [1.0, -1.0, 0.0, 0.0]]).view(1, 2, 1, 4)
    classes = torch.tensor([[[1, 0, 1, 0]]])
    histogram = log_odds_histogram(logits, classes, IGNORED)
    assert histogram.sum(dim=1).tolist() == [2, 2]
    # Of the four pairs all are in order.
    assert area_under_roc(histogram) == 1.0


def test_the_commonest_class_everywhere_has_the_miou_of_such_a_model():
    classes = torch.randint(0, 3, (2, 20, 20)).clamp(max=1) * 2  # class 1 is nowhere
    classes[0, :3] = 255
    confusion = confusion_matrix(torch.full_like(classes, 2), classes, 3, 255)
    expected = segmentation_figures(confusion, ["a", "b", "c"])["segment/miou"]
    any_model = confusion_matrix(torch.randint(0, 3, classes.shape), classes, 3, 255)
    assert miou_of_commonest_class(any_model) == pytest.approx(expected)
    assert miou_of_commonest_class(torch.zeros(3, 3)) is None
