"""Files of weights and the three switches of a Swin: what is recognised, exported and refused."""

from functools import partial

import pytest
import torch
from torch import nn
from torchvision.models import swin_transformer

from moco.errors import InputError
from moco.models.backbones import SWIN_V1, SWIN_V2, build_backbone
from moco.models.swin.backbone import Swin
from moco.weights.exporting import export_content, loading_lines
from moco.weights.init_from import start_from
from moco.weights.library_names import (
    counterpart,
    kind_of_coordinates,
    pretrained_windows,
    saved_coordinates,
    switches_seen,
    to_timm,
    to_torchvision,
)
from moco.weights.load_encoder import load_pretrained
from tests.conftest import thinned
from tests.segmentation.test_segment import pretraining_checkpoint
from tests.weights.projects import randomised, refused, torchvision_swin, torchvision_swin_v2
from tests.weights.test_init_from import small_method

MIXED = {
    "pre, cosines, log": SWIN_V2 | {"norm": "pre"},
    "res_post, dots, table": SWIN_V1 | {"norm": "res_post"},
    "res_post, cosines, linear": SWIN_V2 | {"position_bias": "linear_cpb"},
}
"""What torchvision's classes have beside the two versions, with one switch changed."""


def torchvisions(switches):
    """torchvision's small Swin, put together of the parts of both versions."""
    blocks = {
        "pre": (swin_transformer.SwinTransformerBlock, swin_transformer.PatchMerging),
        "res_post": (swin_transformer.SwinTransformerBlockV2, swin_transformer.PatchMergingV2),
    }
    attentions = {
        "dot": swin_transformer.ShiftedWindowAttention,
        "cosine": swin_transformer.ShiftedWindowAttentionV2,
    }
    block, merging = blocks[switches["norm"]]
    model = swin_transformer.SwinTransformer(
        [2, 2],
        32,
        [2, 2, 2, 2],
        [1, 2, 4, 8],
        [4, 4],
        block=partial(block, attn_layer=attentions[switches["attention"]]),
        downsample_layer=merging,
    )
    model.head = nn.Identity()
    return model.eval()


def random_swin(switches, **settings):
    backbone = randomised(build_backbone("swin_tiny_patch2", **switches, **settings))
    for module in backbone.modules():
        if getattr(module, "attention", None) == "cosine":
            module.qkv.bias.data.chunk(3)[1].zero_()  # keys have none
    return backbone.eval()


@pytest.mark.parametrize("switches", thinned(MIXED.values(), every=3), ids=MIXED)
@torch.no_grad()
def test_torchvisions_classes_take_and_give_mixed_swins(switches, tmp_path):
    """64 px, so that nothing is padded: maps of 32, 16, 8 and 4 cells."""
    backbone = random_swin(switches)
    images = torch.randn(2, 3, 64, 64)
    expected = backbone(images)
    model = torchvisions(switches)
    model.load_state_dict(to_torchvision(backbone), strict=True)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)

    path = tmp_path / "x.pth"
    torch.save(model.state_dict(), path)
    loaded = load_pretrained(str(path), "query", {})
    assert loaded.encoder.backbone.switches == switches
    assert torch.equal(loaded.encoder.eval().encode(images), expected)


@pytest.mark.slow
@torch.no_grad()
def test_the_printed_lines_build_torchvisions_swin_of_mixed_switches(tmp_path):
    backbone = build_backbone("swin_t", norm="res_post", window_size=2).eval()
    settings = {"name": "swin_t", "norm": "res_post", "window_size": 2}
    path = tmp_path / "x.pth"
    path.write_bytes(export_content("torchvision", path, backbone, settings, {"image_size": 64}))
    lines = loading_lines("torchvision", path, backbone, settings, 64)
    assert lines[1] == "from functools import partial"
    names = {}
    exec("\n".join(lines), names)
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(names["model"].eval()(images), backbone(images))


@pytest.mark.parametrize(
    ("switches", "library", "listed"),
    [
        (SWIN_V1 | {"attention": "cosine"}, "torchvision", "(dot products have a table there"),
        (SWIN_V2 | {"attention": "dot"}, "torchvision", "(dot products have a table there"),
        (SWIN_V1 | {"norm": "res_post"}, "timm", ", only Swin V1 and Swin V2;"),
        (SWIN_V2 | {"position_bias": "linear_cpb"}, "timm", ", only Swin V1 and Swin V2;"),
    ],
)
def test_a_library_without_such_a_swin_is_named(switches, library, listed):
    with torch.device("meta"):
        backbone = build_backbone("swin_t", **switches)
    shown = ", ".join(f"{key}={value}" for key, value in switches.items())
    for write in (
        lambda: counterpart({"name": "swin_t", **switches}, library),
        lambda: {"timm": to_timm, "torchvision": to_torchvision}[library](backbone),
    ):
        with pytest.raises(InputError) as error:
            write()
        message = str(error.value)
        assert message.startswith(f"format={library}: {library} has no Swin with {shown}")
        assert listed in message
        assert message.endswith("format=safetensors keeps the names of this project")


def test_a_swin_with_all_changes_is_exported_as_version_2():
    settings = {"name": "swin_s", **SWIN_V2}
    assert counterpart(settings, "timm") == "swinv2_small_window8_256"
    assert counterpart(settings, "torchvision") == "swin_v2_s"
    weights = to_timm(Swin(8, (1, 1, 1, 1), (1, 1, 1, 1), **SWIN_V2))
    assert "layers.0.blocks.0.attn.q_bias" in weights


@pytest.mark.parametrize("kind", ["linear_cpb", "log_cpb"])
def test_the_coordinates_tell_their_scale_and_their_window(kind):
    for pretrained in range(2, 65):
        for window in (2, 3, pretrained):
            if (kind, window, pretrained) == ("linear_cpb", 2, 4):
                continue  # the coordinates of log_cpb with a pretraining window of 9
            tables = [saved_coordinates((window, window), (pretrained, pretrained), kind)]
            assert kind_of_coordinates(tables) == kind
            assert pretrained_windows(tables, [1]) == [pretrained]
    assert kind_of_coordinates([saved_coordinates((1, 1), (1, 1), kind)]) is None


def test_switches_show_in_the_names_and_shapes_of_every_library():
    for switches in (SWIN_V1, SWIN_V2):
        backbone = build_backbone("swin_tiny_patch2", **switches)
        shown = dict(switches)
        assert switches_seen(to_torchvision(backbone)) == shown
        if switches == SWIN_V2:
            del shown["position_bias"]  # timm saves no coordinates
        assert switches_seen(to_timm(backbone)) == shown
    assert switches_seen(build_backbone("resnet_tiny").state_dict()) == {}


V2_THERE = "norm=res_post, attention=cosine, position_bias=log_cpb"
V1_HERE = "norm=pre, attention=dot, position_bias=table"


def test_weights_of_another_version_than_the_given_one_are_named(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(torchvision_swin_v2()[0], path)
    assert refused(path, {"name": "swin_tiny_patch2"}) == (
        f"its weights are of a Swin with {V2_THERE}, and the backbone has {V1_HERE}; "
        "set backbone.norm=res_post backbone.attention=cosine backbone.position_bias=log_cpb"
    )
    assert refused(path, {"name": "swin_v2_tiny_patch2", "position_bias": "linear_cpb"}) == (
        "its weights are of a Swin with position_bias=log_cpb, and the backbone has "
        "position_bias=linear_cpb; set backbone.position_bias=log_cpb"
    )
    torch.save(torchvision_swin()[0], path)
    assert refused(path, {"norm": "res_post"}) == (
        "its weights are of a Swin with norm=pre, and the backbone has norm=res_post; "
        "set backbone.norm=pre"
    )


def started(path, **settings):
    method = small_method(backbone={"name": "swin_v2_tiny_patch2", **settings})
    start_from(method, str(path))


@pytest.fixture(scope="module")
def linear_checkpoint(tmp_path_factory):
    overrides = ("backbone=swin_v2_tiny_patch2", "backbone.position_bias=linear_cpb", "data=digits")
    return pretraining_checkpoint(tmp_path_factory.mktemp("ours") / "last.ckpt", *overrides)


@pytest.mark.slow
def test_a_run_does_not_start_from_weights_of_other_switches(linear_checkpoint, tmp_path):
    theirs = tmp_path / "theirs.pth"
    torch.save(torchvision_swin_v2()[0], theirs)
    for path, settings, there, here in (
        (theirs, {"attention": "dot"}, "attention=cosine", "attention=dot"),
        (linear_checkpoint, {}, "position_bias=linear_cpb", "position_bias=log_cpb"),
    ):
        with pytest.raises(InputError) as error:
            started(path, **settings)
        assert str(error.value) == (
            f"init_from={path}: its weights are of a Swin with {there}, and the backbone has "
            f"{here}; set backbone.{there}"
        )
    started(theirs)
    started(linear_checkpoint, position_bias="linear_cpb")


def test_a_checkpoint_of_ours_says_its_switches(linear_checkpoint):
    loaded = load_pretrained(str(linear_checkpoint), "query", {"window_size": 8})
    assert loaded.settings["position_bias"] == "linear_cpb"
    assert loaded.settings["pretrained_window_size"] == 4
    assert loaded.encoder.backbone.switches == SWIN_V2 | {"position_bias": "linear_cpb"}
    assert refused(linear_checkpoint, {"norm": "pre"}) == (
        "has another architecture: backbone.norm: res_post there, pre here"
    )
