"""The plot of an image, its mask and a prediction."""

import torch

from moco.segmentation.comparison_plot import class_colours, comparison_plot


def test_image_truth_and_prediction_are_side_by_side():
    colours = class_colours(3)
    assert len({tuple(colour) for colour in colours.tolist()}) == 4
    image = torch.ones(3, 2, 2) * 0.5
    classes = torch.tensor([[0, 1], [2, 255]])
    predicted = torch.tensor([[0, 1], [1, 1]])
    plot = comparison_plot(image, classes, predicted, 3)
    assert (plot.shape, plot.dtype) == ((3, 2, 10), torch.uint8)
    assert (plot[:, :, :2] == 128).all()
    assert (plot[:, :, 2:4] == 255).all()
    assert plot[:, 1, 4].tolist() == colours[2].tolist()
    assert plot[:, 1, 5].tolist() == colours[3].tolist()  # no class
    assert plot[:, 1, 8].tolist() == colours[1].tolist()


def test_a_large_image_is_shown_with_every_second_pixel(monkeypatch):
    monkeypatch.setattr("moco.segmentation.comparison_plot.MAX_SIDE", 40)
    classes = torch.zeros(50, 80, dtype=torch.long)
    plot = comparison_plot(torch.ones(3, 50, 80), classes, classes, 2)
    assert plot.shape == (3, 25, 3 * 40 + 4)
