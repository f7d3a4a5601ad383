"""The pretraining windows of Swin V2 weights from timm and Microsoft."""

import logging

import pytest
import torch

from moco.errors import InputError
from moco.weights.architecture import windows_in_name
from moco.weights.init_from import start_from
from moco.weights.loading import load_pretrained
from tests.weights.projects import (
    microsoft_names,
    randomised,
    refused,
    torchvision_swin_v2,
)
from tests.weights.test_init_from import method

SMALL_V2 = {
    "patch_size": 2,
    "embed_dim": 32,
    "depths": (2,) * 4,
    "num_heads": (1, 2, 4, 8),
    "num_classes": 0,
}


def timm_swin_v2(**settings):
    """A small one whose position biases, norms and temperatures are away from their start."""
    classes = pytest.importorskip("timm.models.swin_transformer_v2")
    model = classes.SwinTransformerV2(**SMALL_V2, **settings)
    return away_from_the_start(model)


def away_from_the_start(model):
    for name, tensor in model.state_dict().items():
        if "logit_scale" in name:
            tensor.uniform_(0, 6)
    return randomised(model)


@torch.no_grad()
def relative_error(encoder, model, size):
    images = torch.randn(1, 3, size, size)
    expected = model(images)
    return float((encoder.encode(images) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("name", "size", "pretrained"),
    [
        ("swinv2_tiny_window16_256", 256, [16, 16, 16, 8]),
        ("swinv2_base_window12to16_192to256", 256, [12, 12, 12, 6]),
    ],
)
def test_timms_windows_that_are_larger_than_a_map_load_right_by_their_name(
    name, size, pretrained, tmp_path, caplog
):
    """timm and Microsoft clip a window to its map, and then normalise the position biases by it."""
    caplog.set_level(logging.INFO)
    timm = pytest.importorskip("timm")
    model = away_from_the_start(timm.create_model(name, pretrained=False, num_classes=0))
    path = tmp_path / f"{name}.pth"
    torch.save(model.state_dict(), path)
    loaded = load_pretrained(str(path), "query", {})
    assert loaded.settings["window_size"] == 16
    assert loaded.settings["pretrained_window_size"] == pretrained
    assert (
        f"by its name, it has windows of 16 and was pretrained with windows of {pretrained}"
        in caplog.text
    )
    assert relative_error(loaded.encoder, model, size) < 1e-4
    # The control: what was advised before.
    whole = load_pretrained(str(path), "query", {"pretrained_window_size": [max(pretrained)] * 4})
    assert relative_error(whole.encoder, model, size) > 1e-3


def test_clipped_pretraining_windows_are_made_of_an_image_size_or_given(tmp_path):
    """In maps of 16, 8, 4 and 2 cells."""
    path = tmp_path / "x.pth"
    model = timm_swin_v2(img_size=32, window_size=8)
    torch.save(model.state_dict(), path)
    for given in (
        {"window_size": 8, "pretrained_image_size": 32},
        {"window_size": 8, "pretrained_window_size": [8, 8, 4, 2]},
        {"window_size": [8, 8, 4, 2]},
    ):
        loaded = load_pretrained(str(path), "query", given)
        assert loaded.settings["pretrained_window_size"] == [8, 8, 4, 2]
        assert relative_error(loaded.encoder, model, 32) < 1e-4
    assert (
        relative_error(load_pretrained(str(path), "query", {"window_size": 8}).encoder, model, 32)
        > 1e-3
    )


def test_windows_that_may_have_been_clipped_have_to_be_explained(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "x.pth"
    torch.save(timm_swin_v2(img_size=32, window_size=8).state_dict(), path)
    for given in ({"window_size": 16}, {"window_size": 8, "pretrained_window_size": 16}):
        assert refused(path, given) == (
            "does not say on which images its windows of 16 cells were pretrained, and windows are clipped to smaller maps; "
            "give backbone.pretrained_image_size, which is 256 for timm's swinv2_..._window16_256, and 192 with "
            "backbone.pretrained_window_size=12 for swinv2_..._window12to16_192to256"
        )
    load_pretrained(str(path), "query", {"window_size": 8})
    assert (
        "assuming that pretraining windows of 8 cells fitted all maps; if the images were smaller give "
        "backbone.pretrained_image_size"
    ) in caplog.text


def test_microsofts_tables_tell_the_pretraining_windows_of_each_stage(tmp_path):
    model = timm_swin_v2(
        img_size=64, window_size=8, pretrained_window_sizes=(6, 6, 6, 3)
    )  # maps of 32, 16, 8 and 4 cells
    state = microsoft_names(model)
    for name, layer in model.named_modules():
        if name.endswith(".attn"):
            state[f"{name}.relative_coords_table"] = layer.relative_coords_table
    path = tmp_path / "swinv2_tiny_window16_256.pth"  # the tables count more than a name
    torch.save({"model": state}, path)
    loaded = load_pretrained(str(path), "query", {})
    assert loaded.settings["window_size"] == [8, 8, 8, 4]
    assert loaded.settings["pretrained_window_size"] == [6, 6, 6, 3]
    assert relative_error(loaded.encoder, model, 64) < 1e-4
    assert refused(path, {"pretrained_window_size": 6}) == (
        "the weights were pretrained with windows of [6, 6, 6, 3] cells in the four stages, and "
        "pretrained_window_size=[6, 6, 6, 6] would stretch their position biases; set pretrained_window_size=[6,6,6,3]"
    )


def test_the_name_of_a_file_tells_its_windows():
    clipped = {"window_size": 16, "pretrained_window_size": [12, 12, 12, 6]}
    assert windows_in_name("swinv2_base_patch4_window12to16_192to256_22kto1k_ft.pth") == clipped
    assert windows_in_name("swinv2_small_window16_256.safetensors")["pretrained_window_size"] == [
        16,
        16,
        16,
        8,
    ]
    assert windows_in_name("swinv2_tiny_window8_256.pth") == {
        "window_size": 8,
        "pretrained_window_size": [8] * 4,
    }
    assert windows_in_name("swinv2_tiny_window16_512.pth")["pretrained_window_size"] == [16] * 4
    for name in (
        "swinv2_tiny_window8_0.pth",
        "swinv2_tiny_window0_256.pth",
        "swinv2_tiny_window100_256.pth",
    ):
        assert windows_in_name(name) == {}
    for name in ("swin_tiny_patch4_window7_224.pth", "swinv2_cr_tiny_ns_224.pth", "last.ckpt"):
        assert windows_in_name(name) == {}


def test_a_run_starts_from_clipped_windows_or_is_told_which(tmp_path):
    model = timm_swin_v2(img_size=32, window_size=8)

    def start(file_name, **settings):
        path = tmp_path / file_name
        torch.save(model.state_dict(), path)
        new = method(backbone={"name": "swin_v2_tiny_patch2", **settings})
        start_from(new, str(path))
        return new.eval().query_encoder

    assert relative_error(start("x.pth", window_size=8, pretrained_image_size=32), model, 32) < 1e-4
    named = "swinv2_tiny_window16_256.pth"
    for settings in ({}, {"window_size": 16}):
        with pytest.raises(InputError) as error:
            start(named, **settings)
        own = [settings.get("window_size", 4)] * 4
        assert str(error.value) == (
            f"init_from={tmp_path / named}: by its name it was pretrained with windows of [16, 16, 16, 8] cells, and this "
            f"backbone has {own}; set backbone.window_size=16 backbone.pretrained_window_size=[16,16,16,8]"
        )
    start(named, window_size=16, pretrained_window_size=[16, 16, 16, 8])
    # The image size that is given counts more than the one in the name; its maps are 32, 16, 8 and 4 cells.
    given = {"name": "swin_v2_tiny_patch2", "window_size": 16, "pretrained_image_size": 64}
    loaded = load_pretrained(str(tmp_path / named), "query", given)
    assert loaded.settings["pretrained_window_size"] == [16, 16, 8, 4]
    assert relative_error(start(named, window_size=8, pretrained_image_size=32), model, 32) < 1e-4
    with pytest.raises(
        InputError, match="does not say on which images its windows of 16 cells were pretrained"
    ):
        start("x.pth", window_size=16)


def test_a_swin_takes_another_window_after_loading(tmp_path):
    state, _, _ = torchvision_swin_v2()
    torch.save(state, tmp_path / "x.pth")
    pretrained = load_pretrained(str(tmp_path / "x.pth"), "query", {"window_size": 8})
    assert pretrained.settings["window_size"] == 8
    assert pretrained.settings["pretrained_window_size"] == 4
