"""The encoder: what it makes of several views."""

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
    for view, embedding in zip(
        views, found, strict=True
    ):  # each view by itself, whatever went through together
        torch.testing.assert_close(embedding, projector(backbone(view)))


def test_what_is_compiled_is_the_whole_where_its_parts_take_the_views_alike(monkeypatch):
    compiled = []
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **options: compiled.append((self, options["options"]))
    )
    whole = Encoder(WITH, build_head(8, 4, num_layers=1))
    whole.compile_training({"max_autotune": False})
    assert compiled == [(whole, {"max_autotune": False})]
    compiled.clear()
    parts = Encoder(WITHOUT, build_head(8, 4, num_layers=2, hidden_batch_norm=True))
    parts.compile_training({})
    assert [part for part, _ in compiled] == [parts.backbone, parts.projector]
