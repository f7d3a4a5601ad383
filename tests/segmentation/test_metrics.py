"""Figures of a segmentation against a slow count."""

import numpy as np
import pytest
import torch

from moco.segmentation.metrics import confusion_matrix, segmentation_figures


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
