"""The loss and the predictions of the Lightning module."""

import pytest
import torch

from moco.segmentation.segmenter import Segmenter, pixel_cross_entropy


def test_the_loss_is_the_mean_over_pixels_that_have_a_class():
    logits = torch.randn(2, 3, 4, 4)
    classes = torch.randint(0, 3, (2, 4, 4))
    classes[0, :2] = 255
    is_labelled = classes != 255
    rows = logits.permute(0, 2, 3, 1)[is_labelled].double()
    logits_of_truth = rows[torch.arange(len(rows)), classes[is_labelled]]
    expected = -(logits_of_truth - rows.exp().sum(dim=1).log()).mean()
    loss = pixel_cross_entropy(logits, classes, 255)
    assert float(loss) == pytest.approx(float(expected), abs=1e-6)


def test_the_loss_is_zero_if_no_pixel_has_a_class():
    classes = torch.full((2, 4, 4), 255)
    assert float(pixel_cross_entropy(torch.randn(2, 3, 4, 4), classes, 255)) == 0.0


def test_a_class_that_is_left_out_is_never_predicted():
    segmenter = Segmenter(
        backbone={"name": "resnet_tiny", "stem": "cifar"},
        decoder={"name": "linear"},
        optimizer={},
        num_classes=3,
        ignore_index=0,
        freeze_backbone=False,
        image_size=32,
        class_names=["a", "b", "c"],
        mean=[0.5] * 3,
        std=[1.0] * 3,
    )
    predicted = segmenter.logits(torch.randn(2, 3, 16, 16)).argmax(dim=1)
    assert not (predicted == 0).any()
