"""The pretraining windows of Swin V2 weights from timm and Microsoft.

Both clip a window to its map, and then normalise the position biases by the clipped window.
"""

import logging

import pytest
import torch

from moco.errors import InputError
from moco.weights.architecture import windows_in_name
from moco.weights.init_from import start_from
from moco.weights.loading import load_pretrained
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


NAMES = [
    ("swinv2_tiny_window16_256", [16, 16, 16, 8]),
    ("swinv2_base_window12to16_192to256", [12, 12, 12, 6]),
]


def check_file(path, model, size, pretrained):
    """Check that a file's name gives the right windows, and that unclipped ones are wrong."""
    torch.save(model.state_dict(), path)
    loaded = load_pretrained(str(path), "query", {})
    assert loaded.settings["window_size"] == 16
    assert loaded.settings["pretrained_window_size"] == pretrained
    assert relative_error(loaded.encoder, model, size) < 1e-4
    whole = load_pretrained(str(path), "query", {"pretrained_window_size": [max(pretrained)] * 4})
    assert relative_error(whole.encoder, model, size) > 2e-4


@pytest.mark.parametrize(("name", "pretrained"), NAMES)
def test_windows_that_are_larger_than_a_map_load_right_by_the_files_name(
    name, pretrained, tmp_path, caplog
):
    """With patches of 2 px, maps of 128 px are as large as those of timm's models for 256 px."""
    caplog.set_level(logging.INFO)
    model = timm_swin_v2(img_size=128, window_size=16, pretrained_window_sizes=pretrained)
    check_file(tmp_path / f"{name}.pth", model, 128, pretrained)
    message = f"by its name, it has windows of 16 and was pretrained with windows of {pretrained}"
    assert message in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pretrained"), NAMES)
def test_timms_own_models_load_right_by_their_names(name, pretrained, tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, pretrained=False, num_classes=0)
    check_file(tmp_path / f"{name}.pth", with_random_temperatures(model), 256, pretrained)


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


def test_microsofts_tables_tell_the_pretraining_windows_of_each_stage(tmp_path):
    """The maps have 32, 16, 8 and 4 cells. Tables count more than the name of a file."""
    model = timm_swin_v2(img_size=64, window_size=8, pretrained_window_sizes=(6, 6, 6, 3))
    state = microsoft_names(model)
    for name, layer in model.named_modules():
        if name.endswith(".attn"):
            state[f"{name}.relative_coords_table"] = layer.relative_coords_table
    path = tmp_path / "swinv2_tiny_window16_256.pth"
    torch.save({"model": state}, path)
    loaded = load_pretrained(str(path), "query", {})
    assert loaded.settings["window_size"] == [8, 8, 8, 4]
    assert loaded.settings["pretrained_window_size"] == [6, 6, 6, 3]
    assert relative_error(loaded.encoder, model, 64) < 1e-4
    message = refused(path, {"pretrained_window_size": 6})
    assert message.startswith("the weights were pretrained with windows of [6, 6, 6, 3] cells")
    assert message.endswith("set pretrained_window_size=[6,6,6,3]")


@pytest.mark.parametrize(
    ("name", "window", "pretrained"),
    [
        ("swinv2_base_patch4_window12to16_192to256_22kto1k_ft.pth", 16, [12, 12, 12, 6]),
        ("swinv2_small_window16_256.safetensors", 16, [16, 16, 16, 8]),
        ("swinv2_tiny_window8_256.pth", 8, [8, 8, 8, 8]),
        ("swinv2_tiny_window16_512.pth", 16, [16, 16, 16, 16]),
    ],
)
def test_the_name_of_a_file_tells_its_windows(name, window, pretrained):
    expected = {"window_size": window, "pretrained_window_size": pretrained}
    assert windows_in_name(name) == expected


@pytest.mark.parametrize(
    "name",
    [
        "swinv2_tiny_window8_0.pth",
        "swinv2_tiny_window0_256.pth",
        "swinv2_tiny_window100_256.pth",
        "swin_tiny_patch4_window7_224.pth",
        "swinv2_cr_tiny_ns_224.pth",
        "last.ckpt",
    ],
)
def test_other_names_tell_nothing(name):
    assert windows_in_name(name) == {}


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


@pytest.mark.parametrize("settings", [{}, {"window_size": 16}])
def test_a_run_is_told_which_windows_the_name_of_the_file_says(clipped, settings):
    _, path = clipped
    path = path.rename(path.with_name("swinv2_tiny_window16_256.pth"))
    with pytest.raises(InputError) as error:
        started(path, **settings)
    own = [settings.get("window_size", 4)] * 4
    assert str(error.value) == (
        f"init_from={path}: by its name it was pretrained with windows of [16, 16, 16, 8] cells, "
        f"and this backbone has {own}; "
        "set backbone.window_size=16 backbone.pretrained_window_size=[16,16,16,8]"
    )


def test_what_is_given_counts_more_than_the_name_of_the_file(clipped):
    """With 64 px, the maps have 32, 16, 8 and 4 cells."""
    model, path = clipped
    path = path.rename(path.with_name("swinv2_tiny_window16_256.pth"))
    given = {"name": "swin_v2_tiny_patch2", "window_size": 16, "pretrained_image_size": 64}
    loaded = load_pretrained(str(path), "query", given)
    assert loaded.settings["pretrained_window_size"] == [16, 16, 8, 4]
    encoder = started(path, window_size=8, pretrained_image_size=32)
    assert relative_error(encoder, model, 32) < 1e-4


def test_a_swin_takes_another_window_after_loading(tmp_path):
    state, _, _ = torchvision_swin_v2()
    torch.save(state, tmp_path / "x.pth")
    pretrained = load_pretrained(str(tmp_path / "x.pth"), "query", {"window_size": 8})
    assert pretrained.settings["window_size"] == 8
    assert pretrained.settings["pretrained_window_size"] == 4
