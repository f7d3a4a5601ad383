"""Blended windows, against a slow sum over all of them."""

import numpy as np
import pytest
import torch

from moco.segmentation.blended_windows import blended_scores, panels, smooth_weights
from moco.segmentation.inference import sliding_logits, window_starts


def edge_aware(images):
    """Two logits a pixel that depend on the image, and on the place in the window."""
    rows = torch.arange(images.shape[2]).view(-1, 1)
    columns = torch.arange(images.shape[3])
    first = images.sum(dim=1) * (rows + 1)
    return torch.stack([first, images[:, 0] - columns], dim=1).float()


def joined(image, window, **options):
    """The scores of all parts, and how often each pixel was given out."""
    size = image.shape[1:]
    scores = torch.full((2, *size), torch.nan)
    counts = torch.zeros(size)

    def read(top, left, height, width):
        assert top + height <= size[0]
        assert left + width <= size[1]
        return image[:, top : top + height, left : left + width]

    for part in blended_scores(edge_aware, read, size, 2, window, **options):
        height, width = part.scores.shape[1:]
        place = (slice(part.top, part.top + height), slice(part.left, part.left + width))
        scores[(slice(None), *place)] = part.scores
        counts[place] += 1
    assert (counts == 1).all()
    return scores


def slow_mean(image, window, smooth):
    """The weighted mean over all windows, one by one, in double precision."""
    pixels = image.numpy()
    _, height, width = pixels.shape
    rows, columns = min(window, height), min(window, width)
    sums, weight_sums = np.zeros((2, height, width)), np.zeros((height, width))
    stride = max(1, window * 2 // 3)
    for top in window_starts(height, window, stride):
        for left in window_starts(width, window, stride):
            part = image[None, :, top : top + rows, left : left + columns]
            scores = edge_aware(part)[0].double().numpy()
            for row in range(rows):
                for column in range(columns):
                    weight = 1.0
                    if smooth:
                        weight = np.sin(np.pi * (row + 0.5) / rows) ** 2
                        weight *= np.sin(np.pi * (column + 0.5) / columns) ** 2
                    sums[:, top + row, left + column] += weight * scores[:, row, column]
                    weight_sums[top + row, left + column] += weight
    return sums / weight_sums


@pytest.mark.parametrize("size", [(17, 23), (6, 30), (5, 4), (1, 1), (31, 6)])
@pytest.mark.parametrize("smooth", [True, False])
def test_every_pixel_has_the_weighted_mean_over_its_windows(size, smooth):
    image = torch.rand(3, *size)
    expected = slow_mean(image, 6, smooth)
    for largest_sums, num_at_once in ((2**28, 1), (2**28, 3), (1, 2), (3 * 6 * 4 * 14, 4)):
        found = joined(image, 6, smooth=smooth, largest_sums=largest_sums, num_at_once=num_at_once)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_without_blending_it_is_the_mean_that_moco_segment_measures():
    image = torch.rand(3, 20, 33)
    expected = sliding_logits(edge_aware, image[None], window=9, stride=6)[0]
    torch.testing.assert_close(joined(image, 9, smooth=False), expected)


def test_panels_change_no_bit_and_bound_the_columns_in_memory():
    image = torch.rand(3, 20, 200)
    whole = joined(image, 6)
    divided = joined(image, 6, largest_sums=4 * 3 * 6 * 20)
    assert torch.equal(whole, divided)
    lefts = window_starts(200, 6, 4)
    for panel in panels(lefts, 6, 200, 20):
        assert panel.lefts[-1] + 6 - panel.lefts[0] <= 20
    assert max(len(panel.lefts) for panel in panels(lefts, 6, 200, 1)) == 2  # one more reaches in


def test_a_class_that_is_left_out_stays_left_out():
    def one_left_out(images):
        scores = edge_aware(images)
        scores[:, 1] = -torch.inf
        return scores

    image = torch.rand(3, 9, 9)
    parts = blended_scores(
        one_left_out, lambda top, left, h, w: image[:, top : top + h, left : left + w], (9, 9), 2, 4
    )
    for part in parts:
        assert part.scores[0].isfinite().all()
        assert (part.scores[1] == -torch.inf).all()


def test_the_weights_are_symmetric_fade_and_never_vanish():
    weights = smooth_weights(512)
    torch.testing.assert_close(weights, weights.flip(0))
    assert weights.min() > 0
    assert weights[0] < 1e-4
    assert weights[255] > 0.999
