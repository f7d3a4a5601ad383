"""The three changes of Swin V2 as switches of one network, in every combination."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import swin_transformer

from moco.config.train import BackboneConfig
from moco.errors import InputError
from moco.models.backbones import SWIN_V1, SWIN_V2, build_backbone, usual_name
from moco.models.swin.backbone import SWITCHES, Swin
from moco.models.swin.window_change import rewindow
from moco.training.optimizers import without_decay
from tests.models.test_window_attention import by_the_paper

COMBINATIONS = []
for choice in itertools.product(*SWITCHES.values()):
    COMBINATIONS.append(dict(zip(SWITCHES, choice, strict=True)))
NEW = ("pre-cosine-table", "res_post-dot-linear_cpb")


def slow_elsewhere():
    """The combinations, of which those with nothing new are slow tests."""
    cases = []
    for switches in COMBINATIONS:
        name = "-".join(switches.values())
        marks = [] if name in NEW else [pytest.mark.slow]
        cases.append(pytest.param(switches, id=name, marks=marks))
    return cases


each_combination = pytest.mark.parametrize(
    "switches", COMBINATIONS, ids=lambda x: "-".join(x.values())
)


def tiny(switches, **settings):
    """A small Swin in float64, no parameter of which is at a special value."""
    settings = {"window_size": 2, "patch_size": 2} | switches | settings
    made = Swin(8, (2, 1, 1, 1), (1, 2, 2, 4), **settings).double().eval()
    for name, parameter in made.named_parameters():
        nn.init.normal_(parameter, std=0.3)
        if "logit_scale" in name:
            nn.init.uniform_(parameter, 0, 2)
    return made


def layer_norm(x, layer):
    """Written out, for channels in the last place."""
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * layer.weight + layer.bias


def mlp(x, layers):
    """Two layers with the exact GELU between them."""
    hidden = x @ layers[0].weight.T + layers[0].bias
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return hidden @ layers[3].weight.T + layers[3].bias


def block_by_the_paper(block, x, norm):
    """arXiv 2103.14030, equation 3, and for ``res_post`` arXiv 2111.09883, figure 1."""
    size = x.shape[1:3]
    if norm == "pre":
        x = x + by_the_paper(block.attn, layer_norm(x, block.norm1), size)
        return x + mlp(layer_norm(x, block.norm2), block.mlp)
    x = x + layer_norm(by_the_paper(block.attn, x, size), block.norm1)
    return x + layer_norm(mlp(x, block.mlp), block.norm2)


def merging_by_the_paper(merging, x, norm):
    """Four neighbours become one cell. A missing one is zero."""
    _, height, width, _ = x.shape
    cells = []
    for row in range(0, height, 2):
        for column in range(0, width, 2):
            four = []
            for down, right in ((0, 0), (1, 0), (0, 1), (1, 1)):
                if row + down < height and column + right < width:
                    four.append(x[:, row + down, column + right])
                else:
                    four.append(torch.zeros_like(x[:, 0, 0]))
            cells.append(torch.cat(four, dim=-1))
    x = torch.stack(cells, dim=1).unflatten(1, (-(-height // 2), -(-width // 2)))
    if norm == "pre":
        return layer_norm(x, merging.norm) @ merging.reduction.weight.T
    return layer_norm(x @ merging.reduction.weight.T, merging.norm)


@each_combination
@torch.no_grad()
def test_the_first_stage_and_the_merging_are_the_papers(switches):
    backbone = tiny(switches)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    expected = x
    for block in backbone.features[1]:
        expected = block_by_the_paper(block, expected, switches["norm"])
    found = backbone.features[1](x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    merged = merging_by_the_paper(backbone.features[2], expected, switches["norm"])
    torch.testing.assert_close(backbone.features[2](found), merged, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("switches", slow_elsewhere())
def test_gradients_are_those_of_finite_differences(switches):
    """Padded, shifted and clipped windows. All parameters and the images, in a random direction."""
    backbone = tiny(switches)
    names = [name for name, _ in backbone.named_parameters()]
    shapes = [parameter.shape for parameter in backbone.parameters()]
    images = torch.randn(1, 3, 26, 18, dtype=torch.float64, requires_grad=True)  # 13 x 9 cells
    weights = torch.cat([parameter.detach().flatten() for parameter in backbone.parameters()])

    def feature(images, weights):
        parts = weights.split([shape.numel() for shape in shapes])
        parameters = {}
        for name, shape, part in zip(names, shapes, parts, strict=True):
            parameters[name] = part.view(shape)
        return torch.func.functional_call(backbone, parameters, images)

    assert torch.autograd.gradcheck(feature, (images, weights.requires_grad_()), fast_mode=True)
    backbone(images).square().sum().backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("switches", "block", "merging"),
    [
        (SWIN_V1, swin_transformer.SwinTransformerBlock, swin_transformer.PatchMerging),
        (SWIN_V2, swin_transformer.SwinTransformerBlockV2, swin_transformer.PatchMergingV2),
    ],
)
def test_both_versions_start_as_torchvisions(switches, block, merging):
    """Names, order (of which optimizer states depend) and, by the same seed, values."""
    torch.manual_seed(3)
    ours = Swin(24, (2, 1, 1, 1), (1, 2, 4, 8), **switches, window_size=4)
    torch.manual_seed(3)
    theirs = swin_transformer.SwinTransformer(
        [4, 4], 24, [2, 1, 1, 1], [1, 2, 4, 8], [4, 4], block=block, downsample_layer=merging
    )
    del theirs.head
    pairs = zip(ours.named_parameters(), theirs.named_parameters(), strict=True)
    for (name, own), (their_name, expected) in pairs:
        assert name == their_name
        if switches == SWIN_V2 and name.endswith(("norm1.weight", "norm2.weight")):
            assert not own.any()
        else:
            assert torch.equal(own, expected), name


@each_combination
def test_each_switch_has_its_parameters_and_its_start(switches):
    backbone = Swin(8, (2, 1, 1, 1), (1, 2, 2, 4), **switches, window_size=2)
    names = {name for name, _ in backbone.features[1][0].named_parameters()}
    assert ("attn.logit_scale" in names) == (switches["attention"] == "cosine")
    has_table = switches["position_bias"] == "table"
    assert ("attn.relative_position_bias_table" in names) == has_table
    assert ("attn.cpb_mlp.0.weight" in names) == (not has_table)
    channels = {"pre": 32, "res_post": 16}[switches["norm"]]
    assert backbone.features[2].norm.weight.shape == (channels,)
    x = torch.randn(1, 4, 4, 8)
    assert torch.equal(backbone.features[1](x), x) == (switches["norm"] == "res_post")
    spared = without_decay(backbone)
    for name in spared:
        assert backbone.get_parameter(name).ndim == 1 or "attn." in name
    position = [name for name in names if "cpb_mlp" in name or "bias_table" in name]
    assert position
    assert {f"features.1.0.{name}" for name in position} <= spared


@pytest.mark.parametrize("position_bias", SWITCHES["position_bias"])
@pytest.mark.parametrize("attention", SWITCHES["attention"])
@torch.no_grad()
def test_another_window_changes_the_scores_only_of_new_offsets(attention, position_bias):
    """A table is only resized: its edges go to the new edges."""
    switches = {"norm": "pre", "attention": attention, "position_bias": position_bias}
    layer = rewindow(tiny(switches, window_size=3), 3).features[1][0].attn
    before = layer.bias_table((3, 3)).view(5, 5, -1)
    layer.set_window((6, 6))
    after = layer.bias_table((6, 6)).view(11, 11, -1)
    if position_bias == "table":
        assert not torch.allclose(after[3:8, 3:8], before)
        torch.testing.assert_close(after[::10, ::10], before[::4, ::4], rtol=1e-5, atol=1e-6)
    else:
        torch.testing.assert_close(after[3:8, 3:8], before, rtol=1e-13, atol=0)
        assert layer.pretrained_window_size == (3, 3)


def test_both_versions_take_every_switch():
    for number, switches in enumerate(COMBINATIONS):
        name = ("swin_tiny_patch2", "swin_v2_tiny_patch2")[number % 2]
        with torch.device("meta"):
            assert build_backbone(name, **switches).switches == switches
    for name in ("swin_t", "swin_v2_t"):
        assert usual_name({"name": name, **SWIN_V1}) == "swin_t"
        assert usual_name({"name": name, **SWIN_V2}) == "swin_v2_t"
        assert usual_name({"name": name, **SWIN_V1, "norm": "res_post"}) == name
    assert usual_name({"name": "resnet18", "stem": "cifar"}) == "resnet18"


def test_a_swin_keeps_its_patches_when_its_switches_name_another_one():
    assert usual_name({"name": "swin_tiny_patch4", **SWIN_V2}) == "swin_v2_tiny_patch4"
    assert usual_name({"name": "swin_v2_tiny_patch2", **SWIN_V1}) == "swin_tiny_patch2"


def test_the_settings_have_the_choices_of_the_network():
    fields = BackboneConfig.__dataclass_fields__
    for key, choices in SWITCHES.items():
        assert fields[key].metadata["choices"] == choices


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "post"}, "backbone.norm: unknown norm 'post'"),
        ({"attention": "cosin"}, "backbone.attention: unknown attention 'cosin'; did you mean"),
        ({"position_bias": "log"}, "backbone.position_bias: unknown position bias 'log'"),
        (
            {"position_bias": "table", "pretrained_window_size": 4},
            "backbone.pretrained_window_size=4: position_bias=table has no coordinates to "
            "normalise; remove it, or set backbone.position_bias=log_cpb",
        ),
    ],
)
def test_a_switch_that_cannot_be_is_one_line(settings, message):
    with pytest.raises(InputError) as error:
        build_backbone("swin_v2_tiny_patch2", **settings)
    assert str(error.value).startswith(message)


def test_linear_coordinates_take_the_pretraining_window_and_image_size():
    backbone = build_backbone(
        "swin_tiny_patch2", position_bias="linear_cpb", window_size=8, pretrained_image_size=32
    )
    assert backbone.pretrained_window_size == (8, 8, 4, 2)


@pytest.mark.parametrize(
    "switches", [SWIN_V1 | {"attention": "cosine"}, SWIN_V2 | {"attention": "dot"}]
)
def test_checkpointing_changes_no_gradient_between_the_versions(switches):
    plain = Swin(8, (2, 1, 1, 1), (1, 2, 2, 4), **switches, window_size=2).train()
    images = torch.randn(2, 3, 40, 24)
    gradients = []
    for is_kept in (False, True):
        plain.gradient_checkpointing = is_kept
        plain.zero_grad()
        F.mse_loss(plain(images), torch.ones(2, 64)).backward()
        gradients.append([parameter.grad for parameter in plain.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
