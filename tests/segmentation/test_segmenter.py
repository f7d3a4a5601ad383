"""The predictions of the Lightning module, and what its checkpoints hold."""

import torch

from moco.segmentation.segmenter import Segmenter

SETTINGS = {
    "backbone": {"name": "resnet_tiny", "stem": "cifar"},
    "decoder": {"name": "linear"},
    "optimizer": {},
    "num_classes": 3,
    "ignore_index": 0,
    "freeze_backbone": False,
    "image_size": 32,
    "class_names": ["a", "b", "c"],
    "mean": [0.5] * 3,
    "std": [1.0] * 3,
}


def test_the_loss_adds_nothing_to_a_checkpoints_tensors():
    """A checkpoint of an earlier version says nothing of a loss, and its tensors fit."""
    old = Segmenter(**SETTINGS)
    new = Segmenter(**SETTINGS, loss="focal", class_weights=[1.0, 2.0, 3.0])
    assert (old.loss.name, old.loss.class_weights) == ("ce", None)
    assert old.state_dict().keys() == new.state_dict().keys()
    assert new.hparams["class_weights"] == [1.0, 2.0, 3.0]


def test_a_class_that_is_left_out_is_never_predicted():
    segmenter = Segmenter(**SETTINGS)
    predicted = segmenter.logits(torch.randn(2, 3, 16, 16)).argmax(dim=1)
    assert not (predicted == 0).any()
