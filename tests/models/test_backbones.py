"""Every backbone keeps the contract of moco.models.backbones; ResNet is torchvision's."""

import copy
import unittest.mock

import pytest
import torch
import torchvision
import yaml

from moco.config.parsing import CONFIG_DIR
from moco.errors import InputError
from moco.models.backbones import build_backbone
from tests.conftest import thinned

# Which network these are, tests/models/test_own_backbones.py says.
OPEN = ("timm", "custom")
CONFIGS = [path for path in sorted(CONFIG_DIR.glob("backbone/*.yaml")) if path.stem not in OPEN]
SMALLEST = ("resnet_tiny", "resnet18", "swin_tiny_patch2", "swin_v2_tiny_patch2", "vit_tiny_patch4")
"""One of each family, for passes that compute; the others are slow."""


def of_config(path):
    return build_backbone(**yaml.safe_load(path.read_text()))


def computed():
    """The configs, of which the large ones are slow."""
    cases = []
    for path in CONFIGS:
        marks = [] if path.stem in SMALLEST else [pytest.mark.slow]
        cases.append(pytest.param(path, id=path.stem, marks=marks))
    return cases


@pytest.mark.parametrize("path", thinned(CONFIGS, every=2), ids=lambda path: path.stem)
@torch.no_grad()
def test_every_backbone_has_the_shapes_of_the_contract(path):
    """The weights hold anything: to initialise them takes longest."""
    with torch.device("meta"):
        backbone = of_config(path)
    backbone.to_empty(device="cpu")
    feature, maps = backbone.feature_and_maps(torch.zeros(2, 3, 64, 48))
    assert feature.shape == (2, backbone.feature_dim)
    assert len(maps) == 4
    expected = zip(maps, backbone.feature_map_dims, backbone.feature_map_strides, strict=True)
    for feature_map, dim, stride in expected:
        assert feature_map.shape == (2, dim, -(-64 // stride), -(-48 // stride))


@pytest.mark.parametrize("path", computed())
def test_every_backbone_computes_by_the_contract(path):
    backbone = of_config(path)
    images = torch.randn(2, 3, 64, 48)
    features = backbone(images)
    assert torch.isfinite(features).all()
    features.sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())
    backbone.eval()
    feature, maps = backbone.feature_and_maps(images)
    torch.testing.assert_close(feature, backbone(images))
    torch.testing.assert_close(maps, backbone.feature_maps(images))
    if not path.stem.startswith("vit"):
        torch.testing.assert_close(feature, maps[-1].mean(dim=(2, 3)))


@pytest.mark.parametrize("name", ["swin_tiny_patch2", "swin_v2_tiny_patch2", "vit_tiny_patch4"])
def test_gradient_checkpointing_changes_no_gradient(name):
    plain = build_backbone(name, stochastic_depth=0.5).train()
    kept = copy.deepcopy(plain)
    kept.gradient_checkpointing = True
    images = torch.randn(2, 3, 20, 20)
    for model in (plain, kept):
        torch.manual_seed(1)
        model(images).square().sum().backward()
    for one, other in zip(plain.parameters(), kept.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    with (
        torch.no_grad(),
        unittest.mock.patch("moco.models.contract.checkpoint", side_effect=AssertionError),
    ):
        kept(images)  # nothing to keep, so nothing to compute again


def test_the_sweep_finds_the_backbones():
    assert {
        "resnet18",
        "resnet50",
        "resnet18_cifar",
        "resnet_tiny",
        "wide_resnet50_2",
        "swin_t",
        "vit_small",
    } <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        pytest.param("resnet50", marks=pytest.mark.slow),
        pytest.param("wide_resnet50_2", marks=pytest.mark.slow),
    ],
)
def test_resnet_is_torchvisions_without_its_classifier(name):
    theirs = torchvision.models.get_model(name, weights=None).eval()
    ours = build_backbone(name).eval()
    theirs.fc = torch.nn.Identity()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("name", ["resnet_tiny", "resnet50"])
def test_every_block_can_start_as_the_identity(name):
    # The last block of a stage has no projection. It ends in a ReLU.
    block = build_backbone(name, zero_init_residual=True).layer1[-1]
    x = torch.rand(2, block.conv1.in_channels, 8, 8)
    assert torch.equal(block(x), x)
    default = build_backbone(name).layer1[-1]
    assert not torch.equal(default(x), x)


def test_cifar_stem_keeps_the_resolution():
    maps = build_backbone("resnet18", stem="cifar").feature_maps(torch.randn(2, 3, 32, 32))
    assert [tuple(map_.shape[1:]) for map_ in maps] == [
        (64, 32, 32),
        (128, 16, 16),
        (256, 8, 8),
        (512, 4, 4),
    ]


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (33, 40)])
def test_solo_learns_stem_has_its_padding_and_maps_of_the_image(size):
    theirs = torchvision.models.resnet18().eval()
    theirs.conv1 = torch.nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
    theirs.maxpool = theirs.fc = torch.nn.Identity()
    ours = build_backbone("resnet18", stem="solo_cifar").eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, *size)
    feature, maps = ours.feature_and_maps(images)
    assert torch.equal(feature, theirs(images))
    assert torch.equal(ours(images), feature)
    for map_, stride in zip(maps, ours.feature_map_strides, strict=True):
        assert map_.shape[2:] == (-(-size[0] // stride), -(-size[1] // stride))
    whole = theirs.layer1(theirs.relu(theirs.bn1(theirs.conv1(images))))
    assert torch.equal(maps[0], whole[:, :, 1:-1, 1:-1])  # a cell for each pixel


def test_an_unknown_stem_is_named():
    with pytest.raises(InputError, match="unknown stem 'solo'"):
        build_backbone("resnet18", stem="solo")


def test_tiny_resnet_has_under_half_a_million_parameters():
    parameters = build_backbone("resnet_tiny").parameters()
    assert sum(parameter.numel() for parameter in parameters) < 500_000


def test_unknown_backbone_suggests_the_nearest():
    with pytest.raises(InputError, match="unknown backbone 'resnet5'; did you mean 'resnet50'"):
        build_backbone("resnet5")
