"""Sliding windows against plain averaging."""

import pytest
import torch

from moco.segmentation.inference import predicted_classes, sliding_logits, window_starts


def position_aware(images):
    """Logits that depend on where in its window a pixel is: (N, 2, height, width)."""
    height, width = images.shape[-2:]
    place = torch.arange(height)[:, None] * 10.0 + torch.arange(width)
    return torch.stack([images[:, 0] + place, images[:, 1] - place], dim=1)


def test_windows_cover_the_length_and_end_with_it():
    assert window_starts(10, 10, 6) == [0]
    assert window_starts(7, 10, 6) == [0]
    assert window_starts(11, 10, 6) == [0, 1]
    assert window_starts(16, 10, 6) == [0, 6]
    assert window_starts(17, 10, 6) == [0, 6, 7]


def test_the_logits_are_the_mean_over_all_windows_that_hold_a_pixel():
    images = torch.randn(2, 3, 11, 9)
    total, counts = torch.zeros(2, 2, 11, 9), torch.zeros(11, 9)
    for top in (0, 4, 5):
        for left in (0, 3):
            window = images[..., top : top + 6, left : left + 6]
            total[..., top : top + 6, left : left + 6] += position_aware(window)
            counts[top : top + 6, left : left + 6] += 1
    logits = sliding_logits(position_aware, images, window=6, stride=4)
    torch.testing.assert_close(logits, total / counts)


@pytest.mark.parametrize("size", [(12, 12), (12, 7), (5, 5)])
def test_a_window_that_covers_the_image_is_the_whole_image(size):
    images = torch.randn(2, 3, *size)
    logits = sliding_logits(position_aware, images, window=12, stride=8)
    assert torch.equal(logits, position_aware(images))
    slide = predicted_classes(position_aware, images, "slide", 12)
    whole = predicted_classes(position_aware, images, "whole", 12)
    assert torch.equal(slide, whole)


def test_windows_overlap_by_a_third():
    sizes = []

    def predict(images):
        sizes.append(tuple(images.shape[-2:]))
        return images

    predicted_classes(predict, torch.zeros(1, 3, 20, 12), "slide", 12)
    assert sizes == [(12, 12), (12, 12)]  # rows 0 to 11 and 8 to 19
