"""Features of a loader's images: order, unreadable images, precision, and a module's mode."""

import numpy as np
import pytest
import torch
from torch import nn

from moco.evaluation.features import EmbeddingStopped, embed, evaluating


def test_evaluating_restores_every_layers_mode():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())
    net[1].eval()
    with evaluating(net):
        assert not net.training
        assert not net[0].training
    assert (net.training, net[0].training, net[1].training) == (True, True, False)


class Batch:
    def __init__(self, start, unreadable):
        self.images = torch.arange(start, start + 2.0).view(2, 1, 1, 1)
        self.labels = torch.tensor([start, start + 1])
        self.unreadable = torch.tensor(unreadable)


def test_embed_keeps_order_and_leaves_unreadable_rows_out():
    loader = [Batch(0, [False, True]), Batch(2, [False, False])]
    features, labels, rows = embed(lambda images: images.flatten(1) * 2, loader, "cpu")
    assert features.ravel().tolist() == [0.0, 4.0, 6.0]
    assert (labels.tolist(), rows.tolist(), features.dtype) == ([0, 2, 3], [0, 2, 3], np.float32)


def test_embed_stops_when_told_to():
    with pytest.raises(EmbeddingStopped):
        embed(lambda images: images, [Batch(0, [False, False])], "cpu", should_stop=lambda: True)


def test_embed_computes_in_the_precision_that_it_is_told():
    batch = Batch(0, [False, False])
    batch.images = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    exact, _, _ = embed(lambda images: images @ weight, [batch], "cpu", precision="32-true")
    mixed, _, _ = embed(lambda images: images @ weight, [batch], "cpu", precision="bf16-mixed")
    assert np.array_equal(exact, (batch.images @ weight).numpy())
    assert np.array_equal(mixed, (batch.images.bfloat16() @ weight.bfloat16()).float().numpy())
    assert not np.array_equal(exact, mixed)
    assert mixed.dtype == np.float32
