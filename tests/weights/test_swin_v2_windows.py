"""The pretraining windows of Swin V2 weights from timm and Microsoft.

Both clip a window to its map, and then normalise the position biases by the clipped window.
"""

import logging

import pytest
import torch

from moco.errors import InputError
from moco.weights.init_from import start_from
from moco.weights.load_encoder import load_pretrained
from tests.weights.projects import (
    SMALL_SWIN,
    microsoft_names,
    randomised,
    refused,
    torchvision_swin_v2,
)
from tests.weights.test_init_from import small_method


def timm_swin_v2(**settings):
    """Return a small Swin V2 of timm, whose every tensor changes the outputs."""
    classes = pytest.importorskip("timm.models.swin_transformer_v2")
    model = classes.SwinTransformerV2(**SMALL_SWIN, num_classes=0, **settings)
    return with_random_temperatures(model)


def with_random_temperatures(model):
    for name, tensor in model.state_dict().items():
        if "logit_scale" in name:
            tensor.uniform_(0, 6)
    return randomised(model)


@torch.no_grad()
def relative_error(encoder, model, size):
    """Return the largest difference of the features over the largest feature."""
    images = torch.randn(1, 3, size, size)
    expected = model(images)
    difference = encoder.encode(images) - expected
    return float(difference.abs().max() / expected.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "given", "pretrained"),
    [
        ("swinv2_tiny_window16_256", {"pretrained_image_size": 256}, [16, 16, 16, 8]),
        (
            "swinv2_base_window12to16_192to256",
            {"pretrained_window_size": 12, "pretrained_image_size": 192},
            [12, 12, 12, 6],
        ),
    ],
)
def test_timms_own_models_load_right(name, given, pretrained, tmp_path):
    timm = pytest.importorskip("timm")
    model = with_random_temperatures(timm.create_model(name, pretrained=False, num_classes=0))
    path = tmp_path / "x.pth"
    torch.save(model.state_dict(), path)
    loaded = load_pretrained(str(path), "query", {"window_size": 16} | given)
    assert loaded.settings["pretrained_window_size"] == pretrained
    assert relative_error(loaded.encoder, model, 256) < 1e-4


@pytest.mark.slow
def test_clipped_pretraining_windows_follow_from_an_image_size_or_are_given(tmp_path):
    """The maps have 16, 8, 4 and 2 cells."""
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
    unclipped = load_pretrained(str(path), "query", {"window_size": 8})
    assert relative_error(unclipped.encoder, model, 32) > 1e-3


def test_the_windows_of_a_file_without_tables_have_to_be_given(tmp_path):
    path = tmp_path / "x.pth"
    model = timm_swin_v2(img_size=64, window_size=4)
    torch.save(model.state_dict(), path)
    for given in ({}, {"name": "swin_v2_tiny_patch2"}):
        message = "does not say which windows it was pretrained with; give backbone.window_size"
        assert refused(path, given).startswith(message)
    loaded = load_pretrained(str(path), "query", {"window_size": 4})
    assert relative_error(loaded.encoder, model, 64) < 1e-4

    widened = timm_swin_v2(img_size=128, window_size=8, pretrained_window_sizes=[4] * 4)
    widened.load_state_dict(model.state_dict())
    given = {"pretrained_window_size": 4, "window_size": 8}
    loaded = load_pretrained(str(path), "query", given)
    assert relative_error(loaded.encoder, widened, 128) < 1e-4


def test_windows_that_may_have_been_clipped_have_to_be_explained(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "x.pth"
    torch.save(timm_swin_v2(img_size=32, window_size=8).state_dict(), path)
    for given in ({"window_size": 16}, {"window_size": 8, "pretrained_window_size": 16}):
        assert refused(path, given) == (
            "does not say on which images its windows of 16 cells were pretrained, and windows are "
            "clipped to smaller maps; give backbone.pretrained_image_size, which is 256 for timm's "
            "swinv2_..._window16_256, and 192 with backbone.pretrained_window_size=12 for "
            "swinv2_..._window12to16_192to256"
        )
    load_pretrained(str(path), "query", {"window_size": 8})
    assert (
        "assuming that pretraining windows of 8 cells fitted all maps; "
        "if the images were smaller give backbone.pretrained_image_size"
    ) in caplog.text


@pytest.mark.slow
def test_microsofts_tables_tell_the_pretraining_windows_of_each_stage(tmp_path):
    """The maps have 32, 16, 8 and 4 cells."""
    model = timm_swin_v2(img_size=64, window_size=8, pretrained_window_sizes=(6, 6, 6, 3))
    state = microsoft_names(model)
    for name, layer in model.named_modules():
        if name.endswith(".attn"):
            state[f"{name}.relative_coords_table"] = layer.relative_coords_table
    path = tmp_path / "x.pth"
    torch.save({"model": state}, path)
    loaded = load_pretrained(str(path), "query", {})
    assert loaded.settings["window_size"] == [8, 8, 8, 4]
    assert loaded.settings["pretrained_window_size"] == [6, 6, 6, 3]
    assert relative_error(loaded.encoder, model, 64) < 1e-4
    message = refused(path, {"pretrained_window_size": 6})
    assert message.startswith("the weights were pretrained with windows of [6, 6, 6, 3] cells")
    assert message.endswith("set pretrained_window_size=[6,6,6,3]")


@pytest.fixture
def clipped(tmp_path):
    """A model whose windows were clipped to maps of 16, 8, 4 and 2 cells, and its file."""
    model = timm_swin_v2(img_size=32, window_size=8)
    path = tmp_path / "x.pth"
    torch.save(model.state_dict(), path)
    return model, path


def started(path, **settings):
    """Return the query encoder of a run that starts from a file."""
    method = small_method(backbone={"name": "swin_v2_tiny_patch2", **settings})
    start_from(method, str(path))
    return method.eval().query_encoder


def test_a_run_starts_from_clipped_windows(clipped):
    model, path = clipped
    encoder = started(path, window_size=8, pretrained_image_size=32)
    assert relative_error(encoder, model, 32) < 1e-4
    with pytest.raises(InputError, match="does not say on which images its windows of 16 cells"):
        started(path, window_size=16)


def test_a_swin_takes_another_window_after_loading(tmp_path):
    state, _, _ = torchvision_swin_v2()
    torch.save(state, tmp_path / "x.pth")
    pretrained = load_pretrained(str(tmp_path / "x.pth"), "query", {"window_size": 8})
    assert pretrained.settings["window_size"] == 8
    assert pretrained.settings["pretrained_window_size"] == 4
