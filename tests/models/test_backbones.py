import pytest
import torch
import torchvision
import yaml

from moco.config.parsing import CONFIG_DIR
from moco.errors import InputError
from moco.models.backbones import build_backbone

CONFIGS = sorted(CONFIG_DIR.glob("backbone/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_backbone_keeps_the_contract(path):
    backbone = build_backbone(**yaml.safe_load(path.read_text()))
    images = torch.randn(2, 3, 64, 48)
    features = backbone(images)
    assert features.shape == (2, backbone.feature_dim)
    assert torch.isfinite(features).all()
    features.sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())
    maps = backbone.eval().feature_maps(images)
    assert [map_.shape[1] for map_ in maps] == list(backbone.feature_map_dims)
    for map_, stride in zip(maps, backbone.feature_map_strides, strict=True):
        assert map_.shape[2:] == (-(-64 // stride), -(-48 // stride))
    feature, same_maps = backbone.feature_and_maps(images)
    torch.testing.assert_close(feature, backbone(images))
    torch.testing.assert_close(same_maps, maps)
    if not path.stem.startswith("vit"):
        torch.testing.assert_close(feature, maps[-1].mean(dim=(2, 3)))


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


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wide_resnet50_2"])
def test_resnet_is_torchvisions_without_its_classifier(name):
    theirs = torchvision.models.get_model(name, weights=None).eval()
    ours = build_backbone(name).eval()
    ours.load_state_dict(
        {key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    )
    theirs.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("name", ["resnet_tiny", "resnet50"])
def test_every_block_can_start_as_the_identity(name):
    block = build_backbone(name, zero_init_residual=True).layer1[
        -1
    ]  # ends in a ReLU, without a projection in resnet50
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
    assert (
        sum(parameter.numel() for parameter in build_backbone("resnet_tiny").parameters()) < 500_000
    )


def test_unknown_backbone_suggests_the_nearest():
    with pytest.raises(InputError, match="unknown backbone 'resnet5'; did you mean 'resnet50'"):
        build_backbone("resnet5")
