"""Swin as a backbone: torchvision's numbers where torchvision is right, any size, and the change of window."""

import io
import itertools

import pytest
import torch
from torch import nn
from torchvision.models import get_model, swin_transformer

from moco.errors import InputError
from moco.models.backbones import SWIN_V1, SWIN_V2, build_backbone
from moco.models.swin.backbone import Swin, clipped_windows, windows_of
from moco.models.swin.window_change import rewindow, suggest_window
from moco.weights.architecture import settings_of
from moco.weights.library_names import to_our_names, to_torchvision
from tests.conftest import thinned


def small(version=2, **settings):
    """A Swin of 4 px patches, its norms' scales away from zero and its biases far from flat."""
    settings = {1: SWIN_V1, 2: SWIN_V2}[version] | {"window_size": 4} | settings
    made = Swin(24, (2, 2, 2, 2), (1, 2, 4, 8), **settings).eval()
    for name, parameter in made.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 0.5, 0.2)
        if "cpb_mlp" in name or "bias_table" in name:
            nn.init.normal_(parameter, std=0.5)
    return made


def torchvisions(window, version=2):
    """torchvision's model of the same shape."""
    settings = (
        {
            "block": swin_transformer.SwinTransformerBlockV2,
            "downsample_layer": swin_transformer.PatchMergingV2,
        }
        if version == 2
        else {}
    )
    made = swin_transformer.SwinTransformer(
        [4, 4],
        24,
        [2, 2, 2, 2],
        [1, 2, 4, 8],
        [window, window],
        stochastic_depth_prob=0,
        **settings,
    )
    made.head = nn.Identity()
    return made.eval()


@pytest.mark.parametrize(("name", "window"), thinned([("swin_v2_t", 8), ("swin_t", 7)], every=2))
def test_outputs_are_torchvisions_where_nothing_is_padded(name, window):
    theirs = get_model(name, weights=None).eval()
    for module in theirs.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1, 0.3)
    ours = build_backbone(name, window_size=window).eval()
    ours.load_state_dict(to_our_names(theirs.state_dict(), ours))
    theirs.head = nn.Identity()
    images = torch.randn(1, 3, 32 * window, 32 * window)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("version", [1, 2])
def test_gradients_are_torchvisions(version):
    theirs, ours = torchvisions(2, version), small(version, window_size=2)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    images = torch.randn(2, 3, 64, 64)
    for model in (theirs, ours):
        model(images).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("window", [3, 4, 7])
@pytest.mark.parametrize("version", [1, 2])
@torch.no_grad()
def test_torchvisions_features_depend_on_padding(version, window):
    ours, theirs = small(version, window_size=window), torchvisions(window, version)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    images = torch.randn(1, 3, 77, 61)  # 20 x 16 patches, then 10 x 8, 5 x 4, 3 x 2
    whole = images[..., :76, :60]  # torchvision drops the rest
    first_stage = theirs.features[:2]
    zeros = torch.zeros(1, 3, 128, 104)
    zeros[..., :76, :60] = whole
    error = (first_stage(zeros)[:, :19, :15] - first_stage(whole)).abs().max()
    assert error > 1e-3


@pytest.mark.parametrize(
    ("version", "side"), thinned(itertools.product([1, 2], [1, 3, 4, 5, 31, 33]), every=5)
)
def test_any_size_goes(version, side):
    backbone = small(version, window_size=7)
    images = torch.randn(1, 3, side, 9, requires_grad=True)
    maps = backbone.feature_maps(images)
    for found, stride in zip(maps, backbone.feature_map_strides, strict=True):
        assert found.shape[2:] == (-(-side // stride), -(-9 // stride))
    torch.testing.assert_close(maps[-1].mean((2, 3)), backbone(images))
    backbone(images).sum().backward()
    assert images.grad.isfinite().all()
    assert images.grad[..., -1, -1].abs().sum() > 0  # the last pixel counts


def test_565_px_are_142_patches_completed_or_141_as_in_torchvision():
    images = torch.randn(1, 3, 69, 69)
    complete, dropped = (
        small(partial_patches=how).feature_maps(images) for how in ("complete", "drop")
    )
    assert [one.shape[-1] for one in complete] == [18, 9, 5, 3]
    assert [one.shape[-1] for one in dropped] == [17, 9, 5, 3]
    with torch.device("meta"):
        backbone = build_backbone("swin_v2_t", window_size=7)
    assert backbone.feature_map_strides == (4, 8, 16, 32)
    suggestion = suggest_window(565, 7)
    assert suggestion.maps == [142, 71, 36, 18]
    theirs, ours = torchvisions(4), small(partial_patches="drop")
    theirs.load_state_dict(ours.state_dict(), strict=False)
    whole = torch.randn(1, 3, 35, 35)  # 8 patches: no padding, up to the clipped windows
    with torch.no_grad():
        assert torch.allclose(ours.features[0](whole), theirs.features[0](whole))
        torch.testing.assert_close(
            ours.feature_maps(whole)[0],
            theirs.features[:2](whole).permute(0, 3, 1, 2),
            rtol=1e-5,
            atol=1e-5,
        )


def biases(backbone, window):
    """Of every layer, by offset: (2 window - 1, 2 window - 1, h)."""
    with torch.no_grad():
        return [
            block.attn.bias_table((window, window)).view(2 * window - 1, 2 * window - 1, -1)
            for stage in backbone.stages()
            for block in stage
        ]


@pytest.mark.parametrize(
    ("window", "position_bias"),
    [(18, "log_cpb"), (12, "log_cpb"), (4, "log_cpb"), (3, "log_cpb"), (18, "linear_cpb"), (4, "linear_cpb")],
)  # fmt: skip
def test_the_bias_of_every_shared_offset_is_the_same_at_another_window(window, position_bias):
    backbone = small(window_size=7, position_bias=position_bias)
    before = biases(backbone, 7)
    after = biases(rewindow(backbone, window), window)
    shared = min(7, window)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[7 - shared : 6 + shared, 7 - shared : 6 + shared],
                           other[window - shared : window - 1 + shared, window - shared : window - 1 + shared])  # fmt: skip


def test_torchvisions_own_way_to_another_window_stretches_the_bias():
    """What the table in the documentation compares with; were it mended there, this would tell."""
    wide, narrow = torchvisions(18), torchvisions(7)
    ours = small(window_size=7)
    for model, buffers in ((wide, wide), (narrow, narrow)):
        kept = {name: value for name, value in buffers.state_dict().items() if "relative" in name}
        model.load_state_dict(ours.state_dict() | kept)
    with torch.no_grad():
        tables = [
            16
            * torch.sigmoid(
                model.features[1][0].attn.cpb_mlp(model.features[1][0].attn.relative_coords_table)
            )[0]
            for model in (narrow, wide)
        ]
    assert (tables[0] - tables[1][11:24, 11:24]).abs().max() > 0.05


@pytest.mark.parametrize("version", [1, 2])
@torch.no_grad()
def test_the_same_window_gives_the_same_bits(version):
    backbone, images = small(version), torch.randn(1, 3, 50, 41)
    before = backbone(images)
    assert torch.equal(rewindow(backbone, 4)(images), before)
    if version == 2:  # there and back again
        assert not torch.equal(rewindow(backbone, 6)(images), before)
        assert torch.equal(rewindow(backbone, 4)(images), before)


@pytest.mark.parametrize("window", [2, 6])
@torch.no_grad()
def test_weights_load_at_another_window(window):
    backbone = small(2)
    file = io.BytesIO()
    torch.save(backbone.state_dict(), file)
    file.seek(0)
    other = small(2, window_size=window, pretrained_window_size=4)
    other.load_state_dict(torch.load(file))
    images = torch.randn(1, 3, 48, 48)
    assert torch.equal(other(images), rewindow(backbone, window)(images))


def test_each_stage_can_have_a_window_of_its_own():
    backbone = small(window_size=[8, 8, 4, 2], pretrained_window_size=[4, 4, 4, 2])
    layers = [block.attn for stage in backbone.stages() for block in stage]
    assert [layer.window_size[0] for layer in layers] == [8, 8, 8, 8, 4, 4, 2, 2]
    assert [layer.pretrained_window_size[0] for layer in layers] == [4, 4, 4, 4, 4, 4, 2, 2]
    assert [layer.shifted for layer in layers] == [False, True] * 4
    rewindow(backbone, 6)
    assert backbone.window_size == (6, 6, 6, 6)
    assert backbone.pretrained_window_size == (4, 4, 4, 2)


def test_torchvision_weights_of_another_window_are_not_stretched_in_silence():
    theirs = torchvisions(8).state_dict()
    with pytest.raises(
        InputError,
        match="pretrained with windows of 8 cells, and pretrained_window_size=7 would stretch",
    ):
        to_our_names(theirs, small(window_size=7))
    to_our_names(theirs, small(window_size=7, pretrained_window_size=8))
    widened = to_torchvision(rewindow(small(window_size=4), 8))
    with pytest.raises(
        InputError,
        match="pretrained with windows of 4 cells, and pretrained_window_size=8 would",
    ):
        to_our_names(widened, small(window_size=8))
    to_our_names(widened, small(window_size=8, pretrained_window_size=4))


@pytest.mark.parametrize(
    ("image_size", "pretrained", "window", "padded"),
    [
        (565, 7, 18, (144, 72, 36, 18)),
        (224, 7, 7, (56, 28, 14, 7)),
        (256, 8, 8, (64, 32, 16, 8)),
        (512, 8, 16, (128, 64, 32, 16)),
        (1024, 7, 32, (256, 128, 64, 32)),
        (112, 7, 4, (28, 16, 8, 4)),
    ],
)
def test_the_suggested_window_sees_as_much_and_pads_little(image_size, pretrained, window, padded):
    suggestion = suggest_window(image_size, pretrained)
    assert (suggestion.window_size, suggestion.padded) == (window, list(padded))


def test_the_suggestion_says_why():
    assert str(suggest_window(565, 7)) == (
        "window 18 for 565 px: the four maps are padded 142 to 144, 71 to 72, 36, 18 (2.7% more cells)"
    )


@pytest.mark.parametrize("window", [0, -1, 2.5, "7", True, 65, [7, 7], [7, 7, 7, 0], None])
def test_a_window_that_is_none_is_refused(window):
    with pytest.raises(
        InputError, match=r"window_size=.*expected a whole number of cells from 1 to 64"
    ):
        rewindow(small(), window)


@pytest.mark.parametrize("window", [0, [], 7.5])
def test_a_pretraining_window_that_is_none_is_refused(window):
    with pytest.raises(
        InputError, match=r"pretrained_window_size=.*expected a whole number of cells from 1 to 64"
    ):
        small(pretrained_window_size=window)


@pytest.mark.parametrize(
    ("image_size", "window_size", "clipped"),
    [
        (256, 16, (16, 16, 16, 8)),  # swinv2_tiny_window16_256
        (
            192,
            12,
            (12, 12, 12, 6),
        ),  # swinv2_base_window12to16_192to256: PRETRAINED_WINDOW_SIZES there
        (256, 8, (8, 8, 8, 8)),
        (224, 7, (7, 7, 7, 7)),
        (250, [8, 64, 8, 9], (8, 32, 8, 8)),
    ],
)
def test_windows_are_clipped_to_the_maps_of_an_image_size(image_size, window_size, clipped):
    assert clipped_windows(image_size, window_size) == clipped
    settings = {
        "name": "swin_v2_t",
        "window_size": window_size,
        "pretrained_image_size": image_size,
    }
    with torch.device("meta"):
        backbone = build_backbone(**settings)
        again = build_backbone(**settings_of(backbone, settings))
    assert backbone.pretrained_window_size == again.pretrained_window_size == clipped
    assert backbone.window_size == again.window_size == windows_of("window_size", window_size)


def test_the_patch_counts_for_clipped_windows():
    assert clipped_windows(32, 4, patch_size=2) == (4, 4, 4, 2)
    assert small(window_size=16, pretrained_image_size=64, patch_size=2).pretrained_window_size == (
        16,
        16,
        8,
        4,
    )
    with pytest.raises(InputError, match=r"backbone.pretrained_image_size=64: position_bias=table"):
        small(version=1, pretrained_image_size=64)


def test_an_image_without_a_whole_patch_is_refused():
    with pytest.raises(InputError, match="an image of 3 x 8 px has no whole patch of 4 px"):
        small(partial_patches="drop")(torch.randn(1, 3, 3, 8))


def test_settings_of_another_architecture_are_refused():
    with pytest.raises(
        InputError, match=r"backbone.window_size=7: resnet18 has no such setting \(it has stem"
    ):
        build_backbone("resnet18", window_size=7)
    with pytest.raises(InputError, match="this backbone has no attention windows"):
        rewindow(build_backbone("resnet_tiny"), 7)
    with pytest.raises(InputError) as error:
        build_backbone("swin_t", pretrained_window_size=7)
    assert str(error.value) == (
        "backbone.pretrained_window_size=7: position_bias=table has no coordinates to normalise; "
        "remove it, or set backbone.position_bias=log_cpb"
    )


def test_new_blocks_of_v2_are_the_identity():
    backbone = Swin(24, (2, 2, 2, 2), (1, 2, 4, 8), window_size=4)
    x = torch.randn(1, 8, 8, 24)
    assert torch.equal(backbone.features[1](x), x)


def test_stochastic_depth_rises_to_its_setting_and_is_off_in_eval_mode():
    backbone = small(stochastic_depth=0.2)
    rates = [block.stochastic_depth.p for stage in backbone.stages() for block in stage]
    assert rates == pytest.approx([0.2 * place / 7 for place in range(8)])
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone(images), backbone(images))
    backbone.train()
    assert not torch.equal(backbone(images), backbone(images))


def test_a_frozen_patch_projection_is_the_only_frozen_part():
    backbone = small(freeze_patch_embed=True)
    frozen = [
        name for name, parameter in backbone.named_parameters() if not parameter.requires_grad
    ]
    assert frozen == ["features.0.0.weight", "features.0.0.bias"]


def test_what_decay_would_harm_is_named():
    names = {name.split(".attn.")[1] for version in (1, 2) for name, parameter in small(version).named_parameters()
             if any(word in name for word in Swin.no_weight_decay_keywords)}  # fmt: skip
    assert names == {
        "relative_position_bias_table", "logit_scale", "cpb_mlp.0.weight", "cpb_mlp.0.bias", "cpb_mlp.2.weight"
    }  # fmt: skip
