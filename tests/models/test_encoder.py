"""The encoder: how several views go through its parts."""

import pytest
import torch
from torch import nn

from moco.models.encoder import Encoder
from moco.models.heads import build_head

WITH = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
WITHOUT = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(
    ("backbone", "has_norm_in_head", "is_called_whole"),
    [(WITH, False, True), (WITH, True, True), (WITHOUT, False, True), (WITHOUT, True, False)],
    ids=[
        "ResNet, plain head",
        "ResNet, head with BatchNorm",
        "Swin, plain head",
        "Swin, head with BatchNorm",
    ],
)
def test_views_are_embedded_as_the_batch_norm_of_each_part_asks_for(
    backbone, has_norm_in_head, is_called_whole
):
    projector = build_head(8, 4, num_layers=2, hidden_batch_norm=has_norm_in_head)
    encoder = Encoder(backbone, projector)
    assert encoder.is_called_whole is is_called_whole
    views = [torch.randn(6, 3, 8, 8), 5 + torch.randn(6, 3, 8, 8)]
    found = [view.embedding for view in encoder.embed(views)]
    # Each view by itself, whatever went through together.
    for view, embedding in zip(views, found, strict=True):
        torch.testing.assert_close(embedding, projector(backbone(view)))


def test_the_whole_is_compiled_if_its_parts_take_the_views_alike(monkeypatch):
    compiled = []

    def recorded(module, dynamic, options):
        compiled.append((module, options))

    monkeypatch.setattr(nn.Module, "compile", recorded)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic, options: function)
    whole = Encoder(WITH, build_head(8, 4, num_layers=1))
    whole.compile_training({"max_autotune": False})
    assert compiled == [(whole, {"max_autotune": False})]
    compiled.clear()
    parts = Encoder(WITHOUT, build_head(8, 4, num_layers=2, hidden_batch_norm=True))
    parts.compile_training({})
    assert [part for part, _ in compiled] == [parts.backbone, parts.projector]
