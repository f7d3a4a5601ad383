"""Decoders on every kind of backbone, the alignment of cells and pixels, and the layers' learning rates."""

import math

import pytest
import torch
import torch.nn.functional as F

from moco.errors import InputError
from moco.evaluation.features import evaluating
from moco.models.backbones import build_backbone
from moco.segmentation.decoders import (
    DECODERS,
    PYRAMID_DECODERS,
    LinearDecoder,
    SegmentationModel,
    build_decoder,
    completed,
    depths_from_the_top,
    enlarged,
    pyramid_of,
)
from moco.training.fine_tuning import build_layered_optimizer, fine_tuning_lr_at

BACKBONES = {
    "resnet": {"name": "resnet_tiny", "stem": "imagenet"},
    "resnet of stride 1": {"name": "resnet_tiny", "stem": "cifar"},
    "swin": {"name": "swin_tiny_patch2", "window_size": 4},
    "swin v2": {"name": "swin_v2_tiny_patch2", "window_size": 4},
    "vit": {"name": "vit_tiny_patch4"},
    "swin v2, floor": {"name": "swin_v2_tiny_patch2", "window_size": 4, "partial_patches": "drop"},
}


def model_of(backbone, decoder, freeze_backbone=False, num_classes=3):
    if decoder in PYRAMID_DECODERS:
        pytest.importorskip("segmentation_models_pytorch")
    net = build_backbone(**BACKBONES[backbone])
    channels = 128 if decoder in PYRAMID_DECODERS else None
    return SegmentationModel(
        net, build_decoder(decoder, net, num_classes, channels), freeze_backbone
    )


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_decoder_fits_every_backbone_at_any_size(backbone, decoder):
    model = model_of(backbone, decoder)
    logits = model(torch.randn(2, 3, 37, 50))
    assert logits.shape == (2, 3, 37, 50)
    assert logits.isfinite().all()
    logits.square().mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert model.eval()(torch.randn(1, 3, 16, 33)).shape == (1, 3, 16, 33)


def test_a_cell_stays_over_its_pixels_where_the_image_ends_inside_one():
    logits = torch.randn(1, 2, 5, 5)
    whole = F.interpolate(logits, size=(20, 20), mode="bilinear", align_corners=False)
    assert torch.equal(enlarged(logits, 4, (17, 20)), whole[:, :, :17])
    assert torch.equal(enlarged(logits, 1, (5, 4)), logits[..., :4])
    longer = enlarged(logits, 4, (20, 23))
    assert torch.equal(longer[..., :20], whole)
    assert torch.equal(longer[..., 20:], whole[..., -1:].expand(-1, -1, -1, 3))


def test_maps_are_completed_to_exact_doubles_for_the_fpn():
    maps = [torch.randn(1, 1, side, side + 1) for side in (9, 5, 3, 2)]
    doubled = completed(maps)
    assert [tuple(x.shape[-2:]) for x in doubled] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    for x, y in zip(maps, doubled, strict=True):
        height, width = x.shape[-2:]
        assert torch.equal(y[..., :height, :width], x)


def test_the_linear_decoder_is_linear_in_the_joined_features():
    decoder = LinearDecoder((2, 3, 4, 5), num_classes=3, strides=(4, 8, 16, 32)).eval()
    maps = [torch.randn(2, dim, side, side) for dim, side in ((2, 8), (3, 4), (4, 2), (5, 1))]
    finest = [F.interpolate(x, size=(8, 8), mode="bilinear", align_corners=False) for x in maps]
    joined = torch.cat(finest, dim=1) / math.sqrt(1 + 1e-5)  # BatchNorm as it starts
    weight = torch.cat([layer[1].weight for layer in decoder.layers], dim=1)
    bias = sum(layer[1].bias for layer in decoder.layers)
    torch.testing.assert_close(decoder(maps), F.conv2d(joined, weight, bias))


def test_the_linear_decoder_takes_maps_of_one_stride_as_they_are():
    decoder = LinearDecoder((2, 2, 2, 2), num_classes=3, strides=(16, 16, 16, 16)).eval()
    maps = [torch.randn(1, 2, 3, 5) for _ in range(4)]
    expected = sum(layer(x) for layer, x in zip(decoder.layers, maps, strict=True))
    torch.testing.assert_close(decoder(maps), expected)
    assert decoder.stride == 16


def test_maps_of_one_stride_become_a_pyramid_of_the_same_places():
    height, width = 6, 8
    rows = (
        torch.arange(height).view(1, 1, -1, 1).expand(1, 1, height, width) + 0.5
    )  # centres, in cells
    pyramid = pyramid_of([rows] * 4)
    assert [tuple(x.shape[2:]) for x in pyramid] == [(24, 32), (12, 16), (6, 8), (3, 4)]
    for x, cells in zip(pyramid, (1 / 4, 1 / 2, 1, 2), strict=True):
        centres = (torch.arange(x.shape[2]) + 0.5) * cells
        inner = (centres > 0.5) & (centres < height - 0.5)  # the rims repeat the outermost cell
        torch.testing.assert_close(x[0, 0, inner, 0], centres[inner])
    assert [tuple(x.shape[2:]) for x in pyramid_of([torch.ones(1, 1, 5, 1)] * 4)] == [
        (20, 4),
        (10, 2),
        (5, 1),
        (3, 1),
    ]
    assert (
        pyramid_of([torch.ones(1, 1, 5, 1)] * 4)[-1] == 1
    ).all()  # half a cell is averaged over what there is


@pytest.mark.parametrize("is_told_to_train", [False, True])
def test_a_frozen_backbone_gets_no_gradient_and_stays_in_eval_mode(is_told_to_train):
    model = model_of("resnet", "linear", freeze_backbone=True)
    if is_told_to_train:  # Lightning does not
        model.train()
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    model(torch.randn(2, 3, 32, 32)).mean().backward()
    assert not any(layer.training for layer in model.backbone.modules())
    assert all(layer.training for layer in model.decoder.modules())
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert all(parameter.grad is not None for parameter in model.decoder.parameters())
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in model.backbone.state_dict().items()
    )


def test_a_frozen_backbone_drops_no_blocks():
    net = build_backbone("swin_tiny_patch2", window_size=4, stochastic_depth=0.9)
    model = SegmentationModel(
        net, build_decoder("linear", net, num_classes=3), freeze_backbone=True
    )
    images = torch.randn(2, 3, 32, 32)
    with evaluating(model):
        expected = model.backbone.feature_maps(images)
    for one, other in zip(model.backbone.feature_maps(images), expected, strict=True):
        assert torch.equal(one, other)


def test_a_missing_library_is_named_with_the_way_out(monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.startswith("segmentation_models_pytorch")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(InputError) as error:
        build_decoder("upernet", build_backbone("resnet_tiny"), 3)
    assert str(error.value) == (
        "decoder=upernet: segmentation_models_pytorch is not installed: pip install moco-ssl[segment]; decoder=fcn, "
        "deeplabv3 and linear come without it"
    )


@pytest.mark.parametrize(
    ("decoder", "channels", "expected"),
    [
        ("fcn", 64, "decoder.channels=64: the decoder fcn has no such setting"),
        ("fpn", 64, "decoder.channels=64: the FPN needs a multiple of 64 from 128 on"),
        ("fpn", 150, "decoder.channels=150: the FPN needs a multiple of 64 from 128 on"),
    ],
)
def test_widths_that_a_decoder_cannot_have_are_named(decoder, channels, expected):
    if decoder in PYRAMID_DECODERS:
        pytest.importorskip("segmentation_models_pytorch")
    with pytest.raises(InputError) as error:
        build_decoder(decoder, build_backbone("resnet_tiny"), 3, channels)
    assert str(error.value) == expected


def depths_by_name(backbone):
    depths = depths_from_the_top(backbone)
    return {name: depths[parameter] for name, parameter in backbone.named_parameters()}


def test_depths_of_swin_count_blocks_from_the_top():
    backbone = build_backbone(
        "swin_v2_tiny_patch2", window_size=4
    )  # two blocks in each of four stages
    depths = depths_by_name(backbone)
    assert depths["features.0.0.weight"] == 9
    assert (depths["features.1.0.mlp.0.weight"], depths["features.1.1.norm1.bias"]) == (8, 7)
    assert (depths["features.2.reduction.weight"], depths["features.3.0.attn.qkv.weight"]) == (6, 6)
    assert (depths["features.7.1.attn.logit_scale"], depths["norm.weight"]) == (1, 1)
    assert set(depths.values()) == set(range(1, 10))


def test_depths_of_resnet_count_stages_from_the_top():
    depths = depths_by_name(build_backbone("resnet_tiny"))
    assert (depths["conv1.weight"], depths["bn1.bias"]) == (5, 5)
    assert [depths[f"layer{stage}.0.conv1.weight"] for stage in (1, 2, 3, 4)] == [4, 3, 2, 1]


def test_depths_of_vit_count_blocks_from_the_top():
    depths = depths_by_name(build_backbone("vit_tiny_patch4", learned_positions=8))  # four blocks
    bottom = ("conv_proj.weight", "class_token", "encoder.pos_embedding")
    assert {depths[name] for name in bottom} == {5}
    blocks = [depths[f"encoder.layers.encoder_layer_{number}.ln_1.weight"] for number in range(4)]
    assert (blocks, depths["encoder.ln.weight"]) == ([4, 3, 2, 1], 1)
    assert depths_by_name(build_backbone("vit_tiny_patch4"))["class_token"] == 5


def test_layers_without_order_are_named():
    with pytest.raises(
        InputError, match=r"optimizer.layer_decay: the layers of Linear are not known; set it to 1"
    ):
        depths_from_the_top(torch.nn.Linear(1, 1))


def test_every_parameter_has_its_layers_rate_and_weight_decay_spares_what_it_should():
    model = model_of("swin v2", "linear")
    optimizer = build_layered_optimizer(
        model, depths_from_the_top(model.backbone), lr=0.1, weight_decay=0.5, layer_decay=0.8
    )
    settings = {
        parameter: group for group in optimizer.param_groups for parameter in group["params"]
    }
    names = dict(model.named_parameters())
    assert (
        len(settings) == len(names) == sum(len(group["params"]) for group in optimizer.param_groups)
    )

    def of(name):
        group = settings[names[name]]
        return group["lr"], group["weight_decay"]

    assert of("decoder.layers.0.1.weight") == (0.1, 0.5)
    assert of("decoder.layers.0.1.bias") == (0.1, 0.0)
    assert of("backbone.norm.weight") == (pytest.approx(0.1 * 0.8), 0.0)
    assert of("backbone.features.7.1.mlp.0.weight") == (pytest.approx(0.1 * 0.8), 0.5)
    assert of("backbone.features.7.1.attn.logit_scale") == (pytest.approx(0.1 * 0.8), 0.0)
    assert of("backbone.features.7.1.attn.cpb_mlp.0.weight") == (pytest.approx(0.1 * 0.8), 0.0)
    assert of("backbone.features.0.0.weight") == (pytest.approx(0.1 * 0.8**9), 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_frozen_parameters_are_not_in_the_optimizer():
    model = model_of("resnet", "linear", freeze_backbone=True)
    optimizer = build_layered_optimizer(model, {}, lr=0.1, weight_decay=0.5, layer_decay=1.0)
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    assert held == set(model.decoder.parameters())


def test_the_rate_follows_its_formulas():
    settings = {"lr": 0.2, "schedule": "poly", "warmup_steps": 10, "power": 0.9}
    assert [fine_tuning_lr_at(step, 110, **settings) for step in (0, 5, 10)] == [0.0, 0.1, 0.2]
    assert fine_tuning_lr_at(60, 110, **settings) == pytest.approx(0.2 * 0.5**0.9)
    assert fine_tuning_lr_at(110, 110, **settings) == 0.0
    cosine = settings | {"schedule": "cosine"}
    assert fine_tuning_lr_at(35, 110, **cosine) == pytest.approx(
        0.2 * (1 + math.cos(math.pi / 4)) / 2
    )
    by_length = settings | {"warmup_steps": None}
    assert fine_tuning_lr_at(1, 40, **by_length) == pytest.approx(0.1)  # a twentieth: two steps
    assert fine_tuning_lr_at(750, 10**6, **by_length) == pytest.approx(0.1)  # at most 1,500
    assert fine_tuning_lr_at(0, 10, **by_length) == 0.2
