"""Files that this project writes: whole checkpoints, and a backbone alone."""

import itertools
import json
import logging

import pytest
import torch

from moco import evaluate
from moco.config.pretrained import EvaluateConfig
from moco.config.train import TrainConfig
from moco.errors import InputError
from moco.methods.moco import MoCo
from moco.runs.checkpoint_files import read_checkpoint
from moco.weights.backbone_files import write_backbone, write_backbone_file
from moco.weights.init_from import start_from
from moco.weights.loading import load_pretrained
from tests.segmentation.test_segment import composed, pretraining_checkpoint
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
    write_backbone_file(
        folder / "backbone.pth", method, content["config"], {"epoch": 3, "step": 12}
    )
    return folder


def encoder_of(path, which="query"):
    return load_pretrained(str(path), which, {}).encoder


@torch.no_grad()
def same_features(one, other):
    images = torch.randn(2, 3, 40, 33)
    return torch.equal(one.backbone(images), other.backbone(images))


def test_the_backbone_alone_is_the_checkpoints(ours):
    assert same_features(encoder_of(ours / "backbone.pth"), encoder_of(ours / "last.ckpt"))
    slim = load_pretrained(str(ours / "backbone.pth"), "query", {"window_size": 8})
    assert slim.settings == {
        "name": "swin_v2_tiny_patch2",
        "window_size": 8,
        "pretrained_window_size": 4,
    }
    assert (slim.epoch, slim.step, slim.config["data"]["image_size"]) == (3, 12, 32)


def test_what_was_exported_comes_back_with_what_it_says_of_images(ours, tmp_path):
    pytest.importorskip("safetensors")
    encoder = encoder_of(ours / "last.ckpt", "key")
    about = {
        "image_size": 32,
        "mean": [0.4] * 3,
        "std": [0.3] * 3,
        "encoder": "key",
        "epoch": 3,
        "step": 12,
    }
    path = tmp_path / "key.safetensors"
    path.write_bytes(write_backbone(encoder.backbone, {"name": "swin_v2_tiny_patch2"}, about))
    exported = load_pretrained(str(path), "key", {})
    assert same_features(exported.encoder, encoder)
    assert exported.config == {
        "data": {"image_size": 32},
        "augmentation": {"mean": [0.4] * 3, "std": [0.3] * 3},
    }


def test_the_backbone_alone_needs_no_package_of_ours(ours):
    content = torch.load(ours / "backbone.pth", weights_only=True)
    assert set(content) == {
        "state_dict", "backbone", "encoder", "image_size", "mean", "std", "epoch", "step", "config"
    }  # fmt: skip
    assert all(tensor.device.type == "cpu" for tensor in content["state_dict"].values())
    whole, slim = ((ours / name).stat().st_size for name in ("last.ckpt", "backbone.pth"))
    assert slim < whole / 2


@pytest.mark.parametrize(
    ("name", "which", "given", "feature", "message"),
    [
        ("backbone.pth", "key", {}, "backbone", "holds the query encoder's backbone alone, and encoder=key needs the key's"),
        ("backbone.pth", "query", {}, "embedding", "holds a backbone alone, and feature=embedding needs the projector too"),
        ("backbone.pth", "query", {"name": "resnet18"}, None, "has another architecture: backbone.name: swin_v2_tiny_patch2 there, resnet18 here"),
        ("last.ckpt", "query", {"name": "resnet18"}, None, "has another architecture: backbone.name: swin_v2_tiny_patch2 there, resnet18 here"),
    ],
)  # fmt: skip
def test_what_a_file_of_ours_lacks_is_said(ours, name, which, given, feature, message):
    with pytest.raises(InputError) as error:
        load_pretrained(str(ours / name), which, given, feature)
    assert str(error.value) == f"checkpoint={ours / name}: {message}"


def test_a_backbone_file_that_was_edited_is_refused(ours, tmp_path):
    content = torch.load(ours / "backbone.pth", weights_only=True)
    path = tmp_path / "x.pth"

    def complaint(change):
        torch.save(content | change, path)
        with pytest.raises(InputError) as error:
            load_pretrained(str(path), "query", {})
        return str(error.value).removeprefix(f"checkpoint={path}: ")

    settings = content["backbone"]
    assert complaint({"backbone": settings | {"name": "resnet81"}}).startswith(
        "its settings are of no backbone (backbone.name: "
    )
    assert complaint({"backbone": {"stem": "cifar"}}).startswith(
        "its settings are of no backbone ("
    )
    assert complaint({"state_dict": {}}).startswith(
        "its weights do not fit the backbone swin_v2_tiny_patch2: "
    )
    for change in ({"state_dict": 3}, {"config": []}, {"mean": 0.5}, {"epoch": "last"}):
        ((name, _),) = change.items()
        assert complaint(change).startswith(f"not written by moco.train (its {name} is no ")


def test_a_checkpoint_whose_hyperparameters_are_gone_is_refused(ours, tmp_path):
    content = torch.load(ours / "last.ckpt", weights_only=True) | {"hyper_parameters": {}}
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(InputError, match="its hyper_parameters have no backbone"):
        load_pretrained(str(tmp_path / "x.ckpt"), "query", {})


def test_a_default_may_be_said_of_a_file_that_does_not_mention_it(tmp_path):
    path = pretraining_checkpoint(
        tmp_path / "last.ckpt", "backbone=resnet_tiny", "backbone.stem=null", "data=digits"
    )
    assert (
        load_pretrained(str(path), "query", {"stem": "imagenet"}).settings["name"] == "resnet_tiny"
    )
    with pytest.raises(InputError, match=r"backbone\.stem: imagenet there, cifar here"):
        load_pretrained(str(path), "query", {"stem": "cifar"})


def test_of_a_backbone_alone_its_feature_is_measured_where_the_run_measured_embeddings(
    ours, tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    content = torch.load(ours / "backbone.pth", weights_only=True)
    content["config"]["evaluation"]["feature"] = "embedding"
    torch.save(content, tmp_path / "x.pth")
    figures = figures_of(tmp_path / "run", f"checkpoint={tmp_path / 'x.pth'}", "data.image_size=16")
    assert figures["knn/feature"] == "backbone"
    assert any("so the backbone's feature is measured" in message for message in caplog.messages)
    with pytest.raises(
        InputError, match="holds a backbone alone, and feature=embedding needs the projector too"
    ):
        figures_of(
            tmp_path / "other", f"checkpoint={tmp_path / 'x.pth'}", "evaluation.feature=embedding"
        )


def figures_of(folder, *overrides):
    given = [*overrides, "accelerator=cpu", "evaluation.num_neighbors=5", "evaluation.plots=false"]
    config = composed("evaluate", EvaluateConfig, *given)
    evaluate.run(config, folder)
    return json.loads((folder / "metrics.json").read_text())


def test_the_backbone_alone_measures_as_the_checkpoint(ours, tmp_path):
    whole, slim = (
        figures_of(tmp_path / name, f"checkpoint={ours / name}", "data.image_size=16")
        for name in ("last.ckpt", "backbone.pth")
    )
    protocols = {
        (5, whole["knn/temperature"]),
        *itertools.product((1, 10, 20, 100, 200), (0.07, 0.1, 0.2)),
    }
    of_embeddings = set()
    for k, t in protocols:
        tops = ("top1", "top5") if k >= 5 else ("top1",)
        of_embeddings |= {f"knn_grid/embedding/k{k}/t{t:g}/{top}" for top in tops}
    of_embeddings |= {
        f"label_free/{name}"
        for name in ("rank_me", "embedding_std", "uniformity", "alignment", "lidar")
    }
    assert whole.keys() - slim.keys() == of_embeddings  # which take the projector
    differing = {key for key in slim if whole[key] != slim[key]}
    assert differing == {
        "checkpoint",
        "epoch",
        "step",
    }  # the whole one was saved before its first epoch


def test_a_run_does_not_start_from_weights_of_other_windows(ours):
    config = composed(
        "train", TrainConfig, "+experiment=quickstart", *SWIN, "backbone.window_size=8"
    )
    with pytest.raises(InputError) as error:
        start_from(method_of(config), str(ours / "last.ckpt"))
    assert str(error.value) == (
        f"init_from={ours / 'last.ckpt'}: backbone.pretrained_window_size: (4, 4, 4, 4) there, (8, 8, 8, 8) here, which would "
        "change the features"
    )
    config.backbone.pretrained_window_size = 4
    method = method_of(config)
    start_from(method, str(ours / "backbone.pth"))
    assert same_features(method.eval().key_encoder, method.query_encoder)
