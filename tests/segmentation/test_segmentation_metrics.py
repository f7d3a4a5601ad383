"""Figures against a slow count, and sliding windows against plain averaging."""

import numpy as np
import pytest
import torch

from moco.segmentation.metrics import (
    class_colours,
    comparison_plot,
    confusion_matrix,
    predicted_classes,
    segmentation_figures,
    sliding_logits,
    window_starts,
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
    figures = segmentation_figures(
        torch.from_numpy(slow_confusion(predicted, classes, 3, 255)), ["a", "b", "c"]
    )
    ious = []
    for number, name in enumerate("abc"):
        found, truth = (set(np.flatnonzero(numbers == number)) for numbers in (predicted, classes))
        ious.append(len(found & truth) / len(found | truth))
        assert figures[f"segment/iou/{name}"] == pytest.approx(ious[-1])
    assert figures["segment/miou"] == pytest.approx(sum(ious) / 3)
    assert figures["segment/pixel_accuracy"] == pytest.approx((predicted == classes).mean())


def test_a_class_that_is_neither_there_nor_predicted_does_not_count():
    matrix = torch.tensor([[6, 2, 0, 0], [0, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    figures = segmentation_figures(matrix, ["a", "b", "c", "d"])
    assert (figures["segment/iou/a"], figures["segment/iou/b"]) == (6 / 8, 4 / 6)
    assert figures["segment/iou/c"] is None
    assert figures["segment/miou"] == pytest.approx((6 / 8 + 4 / 6) / 2)
    matrix[0, 2] = 1  # predicted, though not there: it counts, and as zero
    figures = segmentation_figures(matrix, ["a", "b", "c", "d"])
    assert figures["segment/iou/c"] == 0.0
    assert figures["segment/miou"] == pytest.approx((6 / 9 + 4 / 6) / 3)


def test_pixels_without_any_class_give_zero():
    figures = segmentation_figures(torch.zeros(2, 2, dtype=torch.long), ["a", "b"])
    assert (figures["segment/miou"], figures["segment/pixel_accuracy"]) == (0.0, 0.0)


def test_windows_cover_the_length_and_end_with_it():
    assert window_starts(10, 10, 6) == [0]
    assert window_starts(7, 10, 6) == [0]
    assert window_starts(11, 10, 6) == [0, 1]
    assert window_starts(16, 10, 6) == [0, 6]
    assert window_starts(17, 10, 6) == [0, 6, 7]


def position_aware(images):
    """Logits that depend on where in its window a pixel is: (N, 2, H, W)."""
    height, width = images.shape[-2:]
    place = torch.arange(height)[:, None] * 10.0 + torch.arange(width)
    return torch.stack([images[:, 0] + place, images[:, 1] - place], dim=1)


def test_sliding_averages_all_windows_that_hold_a_pixel():
    images = torch.randn(2, 3, 11, 9)
    total, counts = torch.zeros(2, 2, 11, 9), torch.zeros(11, 9)
    for top in (0, 4, 5):
        for left in (0, 3):
            total[..., top : top + 6, left : left + 6] += position_aware(
                images[..., top : top + 6, left : left + 6]
            )
            counts[top : top + 6, left : left + 6] += 1
    torch.testing.assert_close(
        sliding_logits(position_aware, images, window=6, stride=4), total / counts
    )


@pytest.mark.parametrize("size", [(12, 12), (12, 7), (5, 5)])
def test_a_window_that_covers_the_image_is_the_whole_image(size):
    images = torch.randn(2, 3, *size)
    assert torch.equal(
        sliding_logits(position_aware, images, window=12, stride=8), position_aware(images)
    )
    assert torch.equal(
        predicted_classes(position_aware, images, "slide", 12),
        predicted_classes(position_aware, images, "whole", 12),
    )


def test_windows_overlap_by_a_third():
    sizes = []

    def predict(images):
        sizes.append(tuple(images.shape[-2:]))
        return images

    predicted_classes(predict, torch.zeros(1, 3, 20, 12), "slide", 12)
    assert sizes == [(12, 12), (12, 12)]  # rows 0 to 11 and 8 to 19


def test_images_show_image_truth_and_prediction():
    colours = class_colours(3)
    assert len({tuple(colour) for colour in colours.tolist()}) == 4
    classes = torch.tensor([[0, 1], [2, 255]])
    image = comparison_plot(torch.ones(3, 2, 2) * 0.5, classes, torch.tensor([[0, 1], [1, 1]]), 3)
    assert (image.shape, image.dtype) == ((3, 2, 10), torch.uint8)
    assert (image[:, :, :2] == 128).all()
    assert (image[:, :, 2:4] == 255).all()
    assert image[:, 1, 4].tolist() == colours[2].tolist()
    assert image[:, 1, 5].tolist() == colours[3].tolist()  # without a class
    assert image[:, 1, 8].tolist() == colours[1].tolist()


def test_large_images_are_thinned_out():
    image = comparison_plot(
        torch.ones(3, 50, 80), *torch.zeros(2, 50, 80, dtype=torch.long), 2, largest_side=40
    )
    assert image.shape == (3, 25, 3 * 40 + 4)
