"""Files that this project writes: whole checkpoints, and a backbone alone."""

import json
import logging

import pytest
import torch

from moco import evaluate
from moco.errors import InputError
from moco.methods.moco import MoCo
from moco.runs.checkpoint_files import read_checkpoint
from moco.weights.backbone_files import BACKBONE_PARTS, write_backbone_file
from moco.weights.exporting import export_content
from moco.weights.init_from import start_from
from moco.weights.load_encoder import load_pretrained
from tests.configs import composed
from tests.segmentation.test_segment import pretraining_checkpoint
from tests.weights.projects import refused
from tests.weights.test_init_from import method_of

SWIN = ("backbone=swin_v2_tiny_patch2", "data=digits")


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A folder with a whole checkpoint and its backbone alone; all weights are random."""
    folder = tmp_path_factory.mktemp("ours")
    path = pretraining_checkpoint(folder / "last.ckpt", *SWIN)
    content = read_checkpoint(path)
    method = MoCo(**content["hyper_parameters"])
    method.load_state_dict(content["state_dict"])
    figures = {"epoch": 3, "step": 12}
    write_backbone_file(folder / "backbone.pth", method, content["config"], figures)
    return folder


def encoder_of(path, which="query"):
    return load_pretrained(str(path), which, {}).encoder


@torch.no_grad()
def same_features(one, other):
    images = torch.randn(2, 3, 40, 33)
    return torch.equal(one.backbone(images), other.backbone(images))


def test_the_backbone_alone_is_the_checkpoints(ours):
    assert same_features(encoder_of(ours / "backbone.pth"), encoder_of(ours / "last.ckpt"))
    loaded = load_pretrained(str(ours / "backbone.pth"), "query", {"window_size": 8})
    assert loaded.settings == {
        "name": "swin_v2_tiny_patch2",
        "window_size": 8,
        "pretrained_window_size": 4,
    }
    assert (loaded.epoch, loaded.step) == (3, 12)
    assert loaded.config["data"]["image_size"] == 32


def test_what_was_exported_comes_back_with_what_it_says_about_images(ours, tmp_path):
    pytest.importorskip("safetensors")
    pretrained = load_pretrained(str(ours / "last.ckpt"), "key", {})
    backbone, settings = pretrained.encoder.backbone, pretrained.settings
    about = {
        "image_size": 32,
        "mean": [0.4] * 3,
        "std": [0.3] * 3,
        "encoder": "key",
        "epoch": 3,
        "step": 12,
    }
    path = tmp_path / "key.safetensors"
    path.write_bytes(export_content("safetensors", path, backbone, settings, about))
    exported = load_pretrained(str(path), "key", {})
    assert same_features(exported.encoder, pretrained.encoder)
    assert exported.config == {
        "data": {"image_size": 32},
        "augmentation": {"mean": [0.4] * 3, "std": [0.3] * 3},
    }


def test_the_backbone_alone_needs_no_package_of_ours(ours):
    content = torch.load(ours / "backbone.pth", weights_only=True)
    assert content.keys() == BACKBONE_PARTS.keys() | {"config"}
    assert all(tensor.device.type == "cpu" for tensor in content["state_dict"].values())
    size_of_checkpoint = (ours / "last.ckpt").stat().st_size
    assert (ours / "backbone.pth").stat().st_size < size_of_checkpoint / 2


ANOTHER = "has another architecture: backbone.name: swin_v2_tiny_patch2 there, resnet18 here"


@pytest.mark.parametrize(
    ("name", "which", "given", "feature", "message"),
    [
        (
            "backbone.pth",
            "key",
            {},
            "backbone",
            "holds the query encoder's backbone alone, and encoder=key needs the key's",
        ),
        (
            "backbone.pth",
            "query",
            {},
            "embedding",
            "holds a backbone alone, and feature=embedding needs the projector too",
        ),
        ("backbone.pth", "query", {"name": "resnet18"}, None, ANOTHER),
        ("last.ckpt", "query", {"name": "resnet18"}, None, ANOTHER),
    ],
)
def test_what_a_file_of_ours_lacks_is_named(ours, name, which, given, feature, message):
    with pytest.raises(InputError) as error:
        load_pretrained(str(ours / name), which, given, feature)
    assert str(error.value) == f"checkpoint={ours / name}: {message}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": {"name": "resnet81"}}, "its settings are of no backbone (backbone.name: "),
        ({"backbone": {"stem": "cifar"}}, "its settings are of no backbone ("),
        ({"state_dict": {}}, "its weights do not fit the backbone swin_v2_tiny_patch2: "),
        ({"state_dict": 3}, "not written by moco.train (its state_dict is no dict"),
        ({"config": []}, "not written by moco.train (its config is no dict"),
        ({"mean": 0.5}, "not written by moco.train (its mean is no list"),
        ({"epoch": "last"}, "not written by moco.train (its epoch is no int"),
    ],
)
def test_a_backbone_file_that_was_edited_is_refused(ours, change, message, tmp_path):
    content = torch.load(ours / "backbone.pth", weights_only=True)
    torch.save(content | change, tmp_path / "x.pth")
    assert refused(tmp_path / "x.pth").startswith(message)


def test_a_checkpoint_whose_hyperparameters_are_gone_is_refused(ours, tmp_path):
    content = torch.load(ours / "last.ckpt", weights_only=True) | {"hyper_parameters": {}}
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(InputError, match="its hyper_parameters have no backbone"):
        load_pretrained(str(tmp_path / "x.ckpt"), "query", {})


def test_a_default_may_be_given_for_a_file_that_does_not_mention_it(tmp_path):
    settings = ["backbone=resnet_tiny", "backbone.stem=null", "data=digits"]
    path = pretraining_checkpoint(tmp_path / "last.ckpt", *settings)
    loaded = load_pretrained(str(path), "query", {"stem": "imagenet"})
    assert loaded.settings["name"] == "resnet_tiny"
    message = refused(path, {"stem": "cifar"})
    assert message.endswith("backbone.stem: imagenet there, cifar here")


def test_the_feature_of_a_backbone_alone_is_measured_where_the_run_measured_embeddings(
    ours, tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    content = torch.load(ours / "backbone.pth", weights_only=True)
    content["config"]["evaluation"]["feature"] = "embedding"
    path = tmp_path / "x.pth"
    torch.save(content, path)
    loaded = load_pretrained(str(path), "query", {}, feature=None)
    assert loaded.feature == "backbone"
    assert "so the backbone's feature is measured" in caplog.text
    message = refused(path, feature="embedding")
    assert message == "holds a backbone alone, and feature=embedding needs the projector too"


def figures_of(folder, *overrides):
    given = [*overrides, "accelerator=cpu", "evaluation.num_neighbors=5", "evaluation.plots=false"]
    config = composed("evaluate", *given)
    evaluate.run(config, folder)
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.slow
def test_the_backbone_alone_measures_as_the_checkpoint(ours, tmp_path):
    figures = {}
    for name in ("last.ckpt", "backbone.pth"):
        checkpoint = f"checkpoint={ours / name}"
        figures[name] = figures_of(tmp_path / name, checkpoint, "data.image_size=16")
    whole, alone = figures["last.ckpt"], figures["backbone.pth"]

    # Figures of embeddings need the projector.
    missing = whole.keys() - alone.keys()
    in_grid = {key for key in missing if key.startswith("knn_grid/embedding/")}
    assert in_grid
    names = ("rank_me", "embedding_std", "uniformity", "alignment", "lidar")
    assert missing - in_grid == {f"label_free/{name}" for name in names}
    # The whole checkpoint was saved before its first epoch.
    differing = {key for key in alone if whole[key] != alone[key]}
    assert differing == {"checkpoint", "epoch", "step"}


def test_a_run_does_not_start_from_weights_of_other_windows(ours):
    overrides = ["+experiment=quickstart", *SWIN, "backbone.window_size=8"]
    config = composed("train", *overrides)
    with pytest.raises(InputError) as error:
        start_from(method_of(config), str(ours / "last.ckpt"))
    assert str(error.value) == (
        f"init_from={ours / 'last.ckpt'}: backbone.pretrained_window_size: (4, 4, 4, 4) there, "
        "(8, 8, 8, 8) here, which would change the features"
    )
    config.backbone.pretrained_window_size = 4
    method = method_of(config)
    start_from(method, str(ours / "backbone.pth"))
    assert same_features(method.eval().key_encoder, method.query_encoder)
