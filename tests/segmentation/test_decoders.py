"""Decoders on every kind of backbone, and where their cells lie on the image."""

import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F

from moco.errors import InputError
from moco.evaluation.features import evaluating
from moco.extras import install_command
from moco.models.backbones import build_backbone
from moco.models.pyramid import PYRAMID_DECODERS
from moco.segmentation.decoders import (
    DECODERS,
    LinearDecoder,
    SegmentationModel,
    build_decoder,
    choose_decoder,
    enlarge_logits,
)
from tests.conftest import thinned

BACKBONES = {
    "resnet": {"name": "resnet_tiny", "stem": "imagenet"},
    "resnet of stride 1": {"name": "resnet_tiny", "stem": "cifar"},
    "swin v2": {"name": "swin_v2_tiny_patch2", "window_size": 4},
    "vit": {"name": "vit_tiny_patch4"},
    "swin v2, partial patches dropped": {
        "name": "swin_v2_tiny_patch2",
        "window_size": 4,
        "partial_patches": "drop",
    },
}


def model_of(backbone, decoder, freeze_backbone=False):
    channels = None
    if decoder in PYRAMID_DECODERS:
        pytest.importorskip("segmentation_models_pytorch")
        channels = 128
    net = build_backbone(**BACKBONES[backbone])
    head = build_decoder(decoder, net, num_classes=3, channels=channels)
    return SegmentationModel(net, head, freeze_backbone)


@pytest.mark.parametrize(
    ("backbone", "decoder"), thinned(itertools.product(BACKBONES, DECODERS), every=4)
)
def test_every_decoder_fits_every_backbone_at_any_size(backbone, decoder):
    model = model_of(backbone, decoder)
    logits = model(torch.randn(2, 3, 37, 50))
    assert logits.shape == (2, 3, 37, 50)
    assert logits.isfinite().all()
    logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    assert model.eval()(torch.randn(1, 3, 16, 33)).shape == (1, 3, 16, 33)


def test_a_cell_stays_over_its_pixels_where_the_image_ends_inside_it():
    logits = torch.randn(1, 2, 5, 5)
    whole = F.interpolate(logits, size=(20, 20), mode="bilinear", align_corners=False)
    assert torch.equal(enlarge_logits(logits, 4, 17, 20), whole[:, :, :17])
    assert torch.equal(enlarge_logits(logits, 1, 5, 4), logits[..., :4])


def test_pixels_beyond_the_last_cell_get_the_nearest_logits():
    logits = torch.randn(1, 2, 5, 5)
    whole = F.interpolate(logits, size=(20, 20), mode="bilinear", align_corners=False)
    longer = enlarge_logits(logits, 4, 20, 23)
    assert torch.equal(longer[..., :20], whole)
    assert torch.equal(longer[..., 20:], whole[..., -1:].expand(-1, -1, -1, 3))


def test_the_linear_decoder_is_linear_in_the_joined_features():
    decoder = LinearDecoder((2, 3, 4, 5), num_classes=3, strides=(4, 8, 16, 32)).eval()
    maps = [torch.randn(2, dim, side, side) for dim, side in ((2, 8), (3, 4), (4, 2), (5, 1))]
    finest = [F.interpolate(x, size=(8, 8), mode="bilinear", align_corners=False) for x in maps]
    joined = torch.cat(finest, dim=1) / math.sqrt(1 + 1e-5)  # what a new BatchNorm makes of it
    weight = torch.cat([layer[1].weight for layer in decoder.layers], dim=1)
    bias = sum(layer[1].bias for layer in decoder.layers)
    torch.testing.assert_close(decoder(maps), F.conv2d(joined, weight, bias))


def test_the_linear_decoder_takes_maps_of_one_stride_as_they_are():
    decoder = LinearDecoder((2, 2, 2, 2), num_classes=3, strides=(16, 16, 16, 16)).eval()
    maps = [torch.randn(1, 2, 3, 5) for _ in range(4)]
    expected = sum(layer(x) for layer, x in zip(decoder.layers, maps, strict=True))
    torch.testing.assert_close(decoder(maps), expected)
    assert decoder.stride == 16


@pytest.mark.parametrize("is_train_called", [False, True])
def test_a_frozen_backbone_gets_no_gradient_and_stays_in_eval_mode(is_train_called):
    model = model_of("resnet", "linear", freeze_backbone=True)
    if is_train_called:  # Lightning does not call it
        model.train()
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    model(torch.randn(2, 3, 32, 32)).mean().backward()
    assert not any(layer.training for layer in model.backbone.modules())
    assert all(layer.training for layer in model.decoder.modules())
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert all(parameter.grad is not None for parameter in model.decoder.parameters())
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_frozen_backbone_has_no_stochastic_depth():
    net = build_backbone("swin_tiny_patch2", window_size=4, stochastic_depth=0.9)
    decoder = build_decoder("linear", net, num_classes=3)
    model = SegmentationModel(net, decoder, freeze_backbone=True)
    images = torch.randn(2, 3, 32, 32)
    maps = model.backbone.feature_maps(images)
    with evaluating(model):
        expected = model.backbone.feature_maps(images)
    for one, other in zip(maps, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "freeze_backbone", "expected"),
    [("auto", True, "linear"), ("linear", False, "linear"), ("fcn", True, "fcn")],
)
def test_auto_is_the_linear_decoder_on_a_frozen_backbone(name, freeze_backbone, expected):
    assert choose_decoder(name, freeze_backbone) == expected


def hide_segmentation_models(monkeypatch):
    """Make segmentation_models_pytorch look as if it were not installed."""
    for name in list(sys.modules):
        if name.startswith("segmentation_models_pytorch"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)


def test_a_missing_library_is_named_with_what_to_do(monkeypatch):
    hide_segmentation_models(monkeypatch)
    with pytest.raises(InputError) as error:
        choose_decoder("auto", freeze_backbone=False)
    assert str(error.value) == (
        "decoder=upernet: segmentation_models_pytorch is not installed: "
        f"{install_command('segment')}; decoder=fcn, deeplabv3 and linear do not need it"
    )


@pytest.mark.parametrize(
    ("decoder", "channels", "expected"),
    [
        ("fcn", 64, "decoder.channels=64: the decoder fcn has no such setting"),
        ("fpn", 64, "decoder.channels=64: the FPN needs a multiple of 64, at least 128"),
        ("fpn", 150, "decoder.channels=150: the FPN needs a multiple of 64, at least 128"),
    ],
)
def test_widths_that_a_decoder_cannot_have_are_named(decoder, channels, expected):
    if decoder in PYRAMID_DECODERS:
        pytest.importorskip("segmentation_models_pytorch")
    with pytest.raises(InputError) as error:
        build_decoder(decoder, build_backbone("resnet_tiny"), 3, channels)
    assert str(error.value) == expected
