"""Backbones of timm and of the user: they keep the contract, train, and come back from files."""

import copy
import dataclasses
import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import moco
from moco.config.pretrained import data_settings
from moco.errors import InputError
from moco.methods.moco import MoCo
from moco.models.backbones import REGISTERED, build_backbone
from moco.models.encoder import disable_stochastic_depth
from moco.models.timm_backbone import TimmBackbone
from moco.weights.backbone_files import write_backbone_file
from moco.weights.exporting import export_content, loading_lines
from moco.weights.init_from import start_from
from tests.configs import composed
from tests.conftest import REPOSITORY
from tests.weights.test_export import write_checkpoint

timm = pytest.importorskip("timm")

FAMILIES = {
    "convnext_atto": 32,
    "convnextv2_atto": 32,
    "efficientnet_lite0": 32,
    "regnety_002": 32,
    "vit_tiny_patch16_224": 32,
    "deit3_small_patch16_224": 32,
    "swinv2_cr_tiny_ns_224": 64,
    "maxvit_rmlp_pico_rw_256": 64,
    "mobilenetv4_conv_small": 64,
    "resnetv2_50": 32,
    "hiera_tiny_224": 64,
    "resnet18": 32,
}
"""A small network of each family, and the side of its images, px."""
FAST = ("convnext_atto",)

MY_NETS = """
from torch import nn

class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.feature_dim = width
        self.net = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )

    def forward(self, images):
        return self.net(images)

def wrong_width(width=8):
    net = Net(width)
    net.feature_dim = width + 1
    return net

def not_finite(width=8):
    net = Net(width)
    net.net[0].bias.data.fill_(float("nan"))
    return net

class Maps(Net):
    feature_map_dims = [8]
    feature_map_strides = [4]

    def feature_maps(self, images):
        return [self.net[:3](images)]

def no_module():
    return "a net"

def fails():
    return nn.Linear(3, 3)
"""


@pytest.fixture
def my_nets(tmp_path, monkeypatch):
    """The module my_nets."""
    (tmp_path / "my_nets.py").write_text(MY_NETS)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_nets", None)


def families():
    cases = []
    for model, size in FAMILIES.items():
        marks = [] if model in FAST else [pytest.mark.slow]
        cases.append(pytest.param(model, size, id=model, marks=marks))
    return cases


def batch(size, num=8):
    views = torch.randn(2, num, 3, size, size).unbind()
    return SimpleNamespace(views=views)


@pytest.mark.parametrize(("model", "size"), families())
@pytest.mark.slow
def test_a_network_of_timm_keeps_the_contract_and_trains(model, size):
    backbone = build_backbone(f"timm:{model}", image_size=size)
    images = torch.randn(2, 3, size, size)
    plain = timm.create_model(model, num_classes=0, **({"img_size": size} if needs(model) else {}))
    plain.load_state_dict(backbone.net.state_dict(), strict=True)
    with torch.no_grad():
        feature, maps = backbone.eval().feature_and_maps(images)
        torch.testing.assert_close(feature, plain.eval()(images))
        torch.testing.assert_close(feature, backbone(images))
    assert feature.shape == (2, backbone.feature_dim)
    shapes = zip(maps, backbone.feature_map_dims, backbone.feature_map_strides, strict=True)
    for feature_map, dim, stride in shapes:
        assert feature_map.shape == (2, dim, size // stride, size // stride)

    for mode in ("plain", "shuffle", "split"):
        method = MoCo(
            {"name": "timm", "model": model, "image_size": size},
            queue_size=32,
            dense_weight=0.5,
            batch_norm_splits=2,
        )
        method.install_batch_norm(mode)
        optimizer = method.configure_optimizers()
        start = copy.deepcopy(method.query_encoder.state_dict())
        for _ in range(2):
            outputs = method.training_step(batch(size), 0)
            outputs["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert outputs["loss"].isfinite()
        assert method.query_encoder.state_dict().keys() == start.keys()
        moved = [
            name
            for name, parameter in method.query_encoder.named_parameters()
            if not torch.equal(parameter, start[name])
        ]
        assert moved


def needs(model):
    """Whether the network is built for images of one size."""
    return any(part in model for part in ("vit", "deit", "swin", "hiera"))


@pytest.mark.parametrize("mode", ["split", "sync"])
def test_batch_norm_modes_keep_the_activation_of_timms_layers(mode):
    backbone = build_backbone("timm:efficientnet_lite0")
    images = torch.randn(2, 3, 32, 32)
    expected = backbone.eval()(images)
    method = MoCo(backbone, queue_size=8)
    method.install_batch_norm(mode)
    assert torch.equal(method.query_encoder.backbone.eval()(images), expected)


def test_the_key_encoder_of_a_network_of_timm_drops_no_path():
    net = build_backbone("timm:convnext_atto", options={"drop_path_rate": 0.5})
    disable_stochastic_depth(net)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(net.train()(images), net.train()(images))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "timm"}, "backbone.model: missing; backbone=timm needs it"),
        (
            {"name": "timm:convnext_tinny"},
            "backbone.model=convnext_tinny: timm has no such network; did you mean 'convnext_tiny'?",
        ),
        (
            {"name": "timm:resnet18", "options": {"no_such": 1}},
            "backbone.options: timm's resnet18 refuses them",
        ),
        (
            {"name": "timm:resnet18", "options": {"checkpoint_path": "x"}},
            "backbone.options.checkpoint_path: timm would read a file",
        ),
        ({"name": "custom"}, "backbone.target: missing; backbone=custom needs it"),
        (
            {"name": "custom", "target": "my_nets:Net", "options": {"widht": 1}},
            "backbone.options.widht: my_nets:Net has no such option; did you mean 'width'?",
        ),
        (
            {"name": "custom", "target": "my_nets:wrong_width"},
            "backbone.target=my_nets:wrong_width: the backbone gives (2, 8) for two images; "
            "expected (2, feature_dim), which is (2, 9)",
        ),
        (
            {"name": "custom", "target": "my_nets:not_finite"},
            "backbone.target=my_nets:not_finite: the backbone gives numbers that are not finite",
        ),
        (
            {"name": "custom", "target": "my_nets:Maps"},
            "backbone.target=my_nets:Maps: the backbone's feature maps of images of 64 px have "
            "(rows, columns) [(32, 32)], which do not fit feature_map_strides=[4]",
        ),
        (
            {"name": "custom", "target": "my_nets:no_module"},
            "backbone.target=my_nets:no_module: expected a torch.nn.Module, got str",
        ),
        (
            {"name": "custom", "target": "my_nets:fails"},
            "backbone.target=my_nets:fails: the backbone's attribute feature_dim is None",
        ),
        (
            {"name": "resnet_tiny", "model": "x"},
            "backbone.model=x: resnet_tiny has no such setting",
        ),
    ],
)
def test_what_is_wrong_is_one_line(settings, message, my_nets):
    with pytest.raises(InputError) as raised:
        build_backbone(**settings)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_a_backbone_without_feature_maps_is_refused_where_they_are_needed(my_nets):
    with pytest.raises(InputError, match=r"method\.dense_weight=0\.5 needs feature maps, and Net"):
        MoCo({"name": "custom", "target": "my_nets:Net"}, dense_weight=0.5)


def test_a_registered_backbone_is_known_by_its_name(my_nets, monkeypatch):
    import my_nets as nets

    monkeypatch.setattr("moco.models.backbones.REGISTERED", REGISTERED.copy())
    moco.register_backbone("my_net", nets.Net)
    assert moco.build_backbone("my_net", options={"width": 4}).feature_dim == 4
    with pytest.raises(InputError, match="did you mean 'width'"):
        moco.build_backbone("my_net", options={"wdth": 4})
    with pytest.raises(InputError, match="this project has a backbone of that name"):
        moco.register_backbone("resnet18", nets.Net)


def test_a_checkpoint_names_a_function_that_is_imported_only_if_the_user_names_it(
    my_nets, runner, tmp_path
):
    path = tmp_path / "last.ckpt"
    write_checkpoint(runner, path, "backbone=custom", "backbone.target=my_nets:Net")
    with pytest.raises(InputError) as raised:
        moco.load_encoder(path)
    assert str(raised.value) == (
        f"checkpoint={path}: names the function backbone.target=my_nets:Net, which is imported "
        "only if you name it, too: add backbone.target=my_nets:Net, or trust_targets=true if you "
        "trust the file"
    )
    for allowed in ({"target": "my_nets:Net"}, {"trust_targets": True}):
        encoder = moco.load_encoder(path, **allowed)
        assert encoder.encode(torch.randn(2, 3, 32, 32)).shape == (2, 8)


@pytest.mark.parametrize(
    ("program", "overrides"),
    [
        ("evaluate", ["data=digits"]),
        ("embed", ["data=digits", "output={}/x.npz"]),
        ("export", ["format=timm", "output={}/x.pth"]),
        ("segment", ["data.root={}"]),
    ],
)
def test_a_target_in_a_file_runs_nothing(program, overrides, runner, tmp_path):
    path = tmp_path / "last.ckpt"
    write_checkpoint(runner, path)
    checkpoint = torch.load(path, weights_only=True)
    command = f"touch {tmp_path}/run"
    checkpoint["hyper_parameters"]["backbone"] = {
        "name": "custom", "target": "os:system", "options": {"command": command},
    }  # fmt: skip
    torch.save(checkpoint, path)
    for name in ("images", "masks"):  # moco.segment looks for its folders before the file
        (tmp_path / name).mkdir()
    overrides = [override.format(tmp_path) for override in overrides]
    config = composed(program, f"checkpoint={path}", *overrides)
    with pytest.raises(InputError, match=r"imported only if you name it, too.*trust_targets=true"):
        importlib.import_module(f"moco.{program}").run(config, tmp_path / "folder")
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("kind", ["backbone.pth", "init_from"])
def test_a_backbone_file_and_init_from_import_nothing(kind, runner, tmp_path):
    config = runner.config()
    method = runner.method(config)
    path = tmp_path / "backbone.pth"
    figures = {"epoch": 1, "step": 1}
    write_backbone_file(path, method, dataclasses.asdict(config), figures)
    content = torch.load(path, weights_only=True)
    command = f"touch {tmp_path}/run"
    content["backbone"] = {"name": "custom", "target": "os:system", "options": {"command": command}}
    torch.save(content, path)
    if kind == "init_from":
        start_from(method, str(path))  # which takes tensors alone
    else:
        with pytest.raises(InputError, match="imported only if you name it, too"):
            moco.load_encoder(path)
    assert not (tmp_path / "run").exists()


def test_a_trusted_function_that_makes_no_backbone_runs_and_is_refused(runner, tmp_path):
    path = tmp_path / "last.ckpt"
    write_checkpoint(runner, path)
    checkpoint = torch.load(path, weights_only=True)
    command = f"touch {tmp_path}/run"
    checkpoint["hyper_parameters"]["backbone"] = {
        "name": "custom", "target": "os:system", "options": {"command": command},
    }  # fmt: skip
    torch.save(checkpoint, path)
    with pytest.raises(InputError, match=r"os:system: expected a torch\.nn\.Module, got int"):
        moco.load_encoder(path, trust_targets=True)
    assert (tmp_path / "run").exists()


def test_a_function_in_a_checkpoint_makes_images_only_if_the_user_allows_it():
    config = composed("embed", "checkpoint=x.ckpt", "output=x.npz")
    of_run = {"name": "custom", "target": "my_data:build", "options": {"num": 4}, "root": None}
    with pytest.raises(InputError, match=r"^checkpoint=x\.ckpt: .*data\.target=my_data:build, or "):
        data_settings(config, of_run)
    config.trust_targets = True
    data = data_settings(config, of_run)
    assert (data["target"], data["options"]) == ("my_data:build", {"num": 4})


@pytest.mark.slow
@pytest.mark.parametrize(("model", "size"), FAMILIES.items())
def test_a_file_of_timm_gives_timms_features(model, size, tmp_path):
    settings = {"name": "timm", "model": model, "image_size": size}
    options = {"img_size": size} if needs(model) else {}
    net = timm.create_model(model, num_classes=5, **options).eval()
    path = tmp_path / "net.pth"
    torch.save(net.state_dict(), path)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = net.forward_head(net.forward_features(images), pre_logits=True)
        found = moco.load_encoder(path, **settings).encode(images)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_a_module_comes_back_into_a_module_or_from_a_function(my_nets, tmp_path):
    import my_nets as nets

    torch.manual_seed(0)
    method = MoCo(nets.Net(4), queue_size=8)
    assert method.hparams["backbone"] == {"name": "given", "target": "my_nets:Net"}
    twin = MoCo(**{**method.hparams, "backbone": nets.Net(4)})
    twin.load_state_dict(method.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(twin.eval().query_encoder(images), method.eval().query_encoder(images))
    with pytest.raises(InputError, match="given as a module, a my_nets:Net; give one again"):
        MoCo(**method.hparams)
    torch.save(build_backbone("resnet18").state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(InputError, match="is of another project; backbone=module takes weights"):
        moco.load_encoder(tmp_path / "resnet18.pth", backbone=nets.Net(4))


@pytest.mark.parametrize(("model", "size"), families())
@pytest.mark.slow
def test_a_network_of_timm_is_exported_and_comes_back(model, size, runner, tmp_path):
    path, exported = tmp_path / "last.ckpt", tmp_path / "net.pth"
    image_size = f"backbone.image_size={size}"
    write_checkpoint(runner, path, "backbone=timm", f"backbone.model={model}", image_size)
    backbone = moco.load_encoder(path).backbone
    settings = {"name": "timm", "model": model, "image_size": size}
    exported.write_bytes(export_content("timm", exported, backbone, settings, {}))
    lines = loading_lines("timm", exported, backbone, settings, size)
    assert lines[-1].endswith("strict=True)")
    names = {}
    exec("\n".join(lines), names)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        feature = backbone(images)
        torch.testing.assert_close(names["model"].eval()(images), feature)
        assert torch.equal(moco.load_encoder(exported, **settings).encode(images), feature)


def test_public_names_are_there_and_nothing_else_is():
    for name in moco.MODULES:
        assert getattr(moco, name).__name__ == name
    assert {"MoCo", "build_backbone", "__version__"} <= set(dir(moco))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        moco.nothing  # noqa: B018


def test_timm_backbone_takes_other_channels():
    backbone = TimmBackbone(model="convnext_atto", in_channels=7)
    assert backbone(torch.randn(1, 7, 32, 32)).shape == (1, backbone.feature_dim)
    assert isinstance(backbone, nn.Module)


def test_the_documented_lines_work():
    text = (REPOSITORY / "docs" / "backbones.md").read_text()
    blocks = text.split("```python\n")[1:]
    names = {}
    for block in blocks:
        exec(block.split("```")[0], names)
    assert names["Net"](4)(torch.randn(2, 3, 8, 8)).shape == (2, 4)
    assert names["loss"].isfinite()
