"""ViT as a backbone: another library's numbers, positions from their formula, any size, and what MoCo v3 adds."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moco.errors import InputError
from moco.models.backbones import build_backbone
from moco.models.encoder import Encoder
from moco.models.heads import DenseProjector
from moco.models.swin.window_change import rewindow
from moco.models.vit import (
    VisionTransformer,
    grid_side,
    learned_grid_side,
    resized_positions,
    sine_cosine_positions,
)
from moco.weights.library_names import to_timm

CPU = torch.device("cpu")


def small(**settings):
    """Patches of 4 px, width 32, four blocks of 4 heads; no tensor is at a start where it would not matter."""
    made = VisionTransformer(4, 32, 4, **({"num_heads": 4} | settings)).eval()
    for name, parameter in made.named_parameters():
        if parameter.ndim == 1 or name == "class_token":
            nn.init.normal_(parameter, 0.5, 0.3)
    return made


def timms(backbone, side):
    """timm's model of the same shape and weights, for images of one size."""
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    made = vision_transformer.VisionTransformer(
        side, backbone.patch_size, embed_dim=32, depth=4, num_heads=4, num_classes=0
    )
    made.load_state_dict(to_timm(backbone, side))
    return made.eval()


def test_outputs_and_gradients_are_timms():
    ours = small()
    theirs = timms(ours, 24)
    images = torch.randn(2, 3, 24, 24)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)
    for model in (ours, theirs):
        model(images).square().sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in to_timm_names(ours).items():
        torch.testing.assert_close(
            parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-4, msg=name
        )


def to_timm_names(backbone):
    from moco.weights.library_names import timm_name

    return {timm_name(name): parameter for name, parameter in backbone.named_parameters()}


def test_maps_are_the_patches_after_each_quarter_of_the_blocks():
    ours = VisionTransformer(4, 32, 12, num_heads=4).eval()
    outputs = []
    for number, block in enumerate(ours.blocks(), start=1):
        if number in (3, 6, 9, 12):
            block.register_forward_hook(lambda _, __, output: outputs.append(output))
    with torch.no_grad():
        feature, maps = ours.feature_and_maps(torch.randn(2, 3, 12, 8))
    outputs[-1] = ours.encoder["ln"](outputs[-1])
    for map_, output in zip(maps, outputs, strict=True):
        assert map_.shape == (2, 32, 3, 2)
        for row in range(3):
            for column in range(2):
                assert torch.equal(map_[:, :, row, column], output[:, 1 + 2 * row + column])
    assert torch.equal(feature, outputs[-1][:, 0])


def position_by_hand(row, column, channel, dim):
    """MoCo v3's formula for one number: quarters of the channels are sin row, cos row, sin column, cos column."""
    quarter, place = divmod(channel, dim // 4)
    angle = (row, row, column, column)[quarter] / 10_000 ** (place / (dim // 4))
    return (math.sin, math.cos, math.sin, math.cos)[quarter](angle)


def test_fixed_positions_follow_their_formula():
    positions = sine_cosine_positions((3, 5), 24, CPU)
    assert positions.shape == (1, 16, 24)
    assert positions[0, 0].abs().max() == 0  # the class token's
    expected = [
        [position_by_hand(row, column, channel, 24) for channel in range(24)]
        for row in range(3)
        for column in range(5)
    ]  # fmt: skip
    torch.testing.assert_close(positions[0, 1:], torch.tensor(expected), rtol=0, atol=1e-6)


def test_fixed_positions_are_no_weights_and_stay_where_they_are_in_a_larger_image():
    assert not [name for name in small().state_dict() if "pos" in name]
    near, far = (
        sine_cosine_positions((side, side), 32, CPU)[0, 1:].view(side, side, 32) for side in (4, 9)
    )
    assert torch.equal(near, far[:4, :4])


def test_positions_that_were_first_made_in_inference_serve_training():
    backbone = small()
    images = torch.randn(1, 3, 20, 28)
    with torch.inference_mode():
        backbone(images)
    backbone(images).sum().backward()
    assert backbone.class_token.grad is not None


def test_saved_positions_tell_whether_they_are_learned():
    fixed = sine_cosine_positions((14, 14), 64, CPU)
    assert learned_grid_side(fixed) is None
    assert learned_grid_side(fixed + 1e-3) == 14
    assert grid_side(torch.zeros(1, 10, 4)) == 3
    for shape in ((1, 9, 4), (1, 1, 4), (10, 4), (2, 10, 4)):
        with pytest.raises(InputError) as error:
            grid_side(torch.zeros(shape))
        assert str(error.value) == (
            f"the weights' positions are of shape {shape}; expected one position for the class "
            "token and those of a square grid of patches"
        )


@pytest.mark.parametrize("grid", [(7, 7), (14, 14), (10, 20)])
def test_learned_positions_are_resized_as_timms(grid):
    timm_layers = pytest.importorskip("timm.layers")
    positions = torch.randn(1, 101, 8)
    torch.testing.assert_close(
        resized_positions(positions, grid), timm_layers.resample_abs_pos_embed(positions, grid)
    )
    assert torch.equal(resized_positions(positions, (10, 10)), positions)


def test_learned_positions_are_trained_at_any_size():
    backbone = small(learned_positions=5)
    assert backbone.encoder.pos_embedding.shape == (1, 26, 32)
    for side in (20, 28):
        backbone.zero_grad()
        backbone(torch.randn(1, 3, side, 20)).square().sum().backward()
        assert (backbone.encoder.pos_embedding.grad.abs().sum(dim=2) > 0).all()


def test_the_start_is_moco_v3s():
    torch.manual_seed(1)
    backbone = build_backbone("vit_tiny_patch4")

    def is_uniform(tensor, fan_in, fan_out):
        bound = math.sqrt(6 / (fan_in + fan_out))
        return tensor.abs().max() <= bound and tensor.std().item() == pytest.approx(
            bound / math.sqrt(3), rel=0.05
        )

    for block in backbone.blocks():
        assert all(
            is_uniform(matrix, 64, 64) for matrix in block.self_attention.in_proj_weight.chunk(3)
        )
        assert is_uniform(block.self_attention.out_proj.weight, 64, 64)
        assert is_uniform(block.mlp[0].weight, 64, 256)
        assert is_uniform(block.mlp[3].weight, 256, 64)
    assert is_uniform(backbone.conv_proj.weight, 3 * 4 * 4, 64)
    assert backbone.class_token.std().item() == pytest.approx(1e-6, rel=0.4)
    for name, parameter in backbone.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().max() == 0, name
        if name.endswith(("ln.weight", "ln_1.weight", "ln_2.weight")):
            assert (parameter == 1).all(), name


@pytest.mark.parametrize("side", [1, 3, 4, 5, 33])
def test_any_size_goes(side):
    backbone = small()
    images = torch.randn(1, 3, side, 9, requires_grad=True)
    for map_ in backbone.feature_maps(images):
        assert map_.shape[2:] == (-(-side // 4), 3)
    backbone(images).sum().backward()
    assert images.grad.isfinite().all()
    assert images.grad[..., -1, -1].abs().sum() > 0  # the last pixel counts


def test_an_incomplete_patch_is_filled_up_with_zeros_or_left_out():
    images = torch.randn(1, 3, 11, 14)
    complete, drop = small(), small(partial_patches="drop")
    assert torch.equal(complete(images), complete(F.pad(images, (0, 2, 0, 1))))
    assert torch.equal(drop(images), drop(images[..., :8, :12]))
    with pytest.raises(InputError) as error:
        drop(images[..., :3])
    assert (
        str(error.value)
        == "backbone.partial_patches=drop: an image of 11 x 3 px has no whole patch of 4 px"
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"window_size": 7}, "backbone.window_size=7: vit_small has no such setting (it has num_heads, learned_positions, "
         "stochastic_depth, gradient_checkpointing, freeze_patch_embed, partial_patches, in_channels)"),
        ({"zero_init_residual": True}, "backbone.zero_init_residual=True: vit_small has no such setting (it has num_heads, "
         "learned_positions, stochastic_depth, gradient_checkpointing, freeze_patch_embed, partial_patches, in_channels)"),
        ({"num_heads": 7}, "backbone.num_heads=7: expected a divisor of the width, 384"),
    ],
)  # fmt: skip
def test_settings_that_it_cannot_have_are_one_line(settings, expected):
    with torch.device("meta"), pytest.raises(InputError) as error:
        build_backbone("vit_small", **settings)
    assert str(error.value) == expected


def test_it_has_no_windows_to_change():
    with pytest.raises(
        InputError, match=r"^backbone.window_size=18: this backbone has no attention windows$"
    ):
        rewindow(small(), 18)


def test_a_frozen_patch_projection_is_the_only_frozen_part():
    backbone = small(freeze_patch_embed=True)
    frozen = [
        name for name, parameter in backbone.named_parameters() if not parameter.requires_grad
    ]
    assert frozen == ["conv_proj.weight", "conv_proj.bias"]
    backbone(torch.randn(1, 3, 8, 8)).sum().backward()
    assert backbone.class_token.grad is not None


def test_stochastic_depth_rises_to_its_setting_and_is_off_in_eval_mode():
    backbone = small(stochastic_depth=0.6)
    assert [block.stochastic_depth.p for block in backbone.blocks()] == pytest.approx(
        [0, 0.2, 0.4, 0.6]
    )
    images = torch.randn(4, 3, 16, 16)
    assert torch.equal(backbone(images), backbone(images))
    backbone.train()
    assert not torch.equal(backbone(images), backbone(images))


@pytest.mark.parametrize(
    ("precision", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)]
)
@pytest.mark.parametrize("is_training", [False, True])
def test_it_runs_in_half_precision(is_training, precision, tolerance):
    backbone = small().train(is_training)
    images = torch.randn(2, 3, 16, 16)
    with torch.set_grad_enabled(is_training):
        expected = backbone(images)
        with torch.autocast("cpu", dtype=precision):
            found, maps = backbone.feature_and_maps(images)
    assert (found.float() - expected).abs().max() < tolerance * expected.abs().max()
    assert all(map_.isfinite().all() for map_ in maps)
    if is_training:
        found.float().square().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in backbone.parameters())


def test_the_dense_term_takes_its_cells_from_the_patches_and_the_feature_from_the_class_token():
    backbone = small()
    encoder = Encoder(backbone, nn.Linear(32, 8), DenseProjector(32, 8, grid=3)).eval()
    images = torch.randn(2, 3, 24, 24)
    [(embedding, cells)] = encoder.embed([images])
    torch.testing.assert_close(embedding, encoder(images))
    last = F.adaptive_avg_pool2d(backbone.feature_maps(images)[-1], 3).flatten(2).transpose(1, 2)
    torch.testing.assert_close(cells.features, last)
