"""Files of weights, ours and others', through the programs: measured, embedded, exported, trained further."""

import copy
import dataclasses
import itertools
import json
import logging

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from moco import embed, evaluate, export, train
from moco.cli import build_pretraining, build_segmentation
from moco.config.pretrained import EmbedConfig, EvaluateConfig, ExportConfig
from moco.config.segment import SegmentConfig
from moco.config.train import TrainConfig
from moco.errors import InputError
from moco.methods.moco import MoCo
from moco.models.backbones import build_backbone
from moco.runs.checkpoint_files import read_checkpoint
from moco.weights.init_from import start_from
from moco.weights.library_names import write_backbone
from moco.weights.pretrained import load_pretrained
from moco.weights.weight_files import write_backbone_file
from tests.segmentation.test_segment import composed, pretraining_checkpoint
from tests.weights.test_foreign import moco_v2, prefixed, randomised

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


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """MoCo v2's ResNet-18 as the official code saves it, and torchvision's model of it."""
    path = tmp_path_factory.mktemp("official") / "moco_v2.pth.tar"
    torch.manual_seed(0)
    content, query, _ = moco_v2()
    torch.save(content, path, _use_new_zipfile_serialization=False)
    query.fc = torch.nn.Identity()
    return path, query


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
        ("backbone.pth", "key", {}, "backbone", "the query encoder's backbone alone, and encoder=key asks for the key's"),
        ("backbone.pth", "query", {}, "embedding", "a backbone alone, and feature=embedding needs the projector too"),
        ("backbone.pth", "query", {"name": "resnet18"}, None, "of another architecture: backbone.name: swin_v2_tiny_patch2 there, resnet18 here"),
        ("last.ckpt", "query", {"name": "resnet18"}, None, "of another architecture: backbone.name: swin_v2_tiny_patch2 there, resnet18 here"),
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
    assert any("so its own feature is measured" in message for message in caplog.messages)
    with pytest.raises(
        InputError, match="a backbone alone, and feature=embedding needs the projector too"
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


def test_other_projects_weights_are_embedded_with_imagenets_normalisation(
    official, image_tree, tmp_path
):
    path, model = official
    given = [f"checkpoint={path}", f"output={tmp_path / 'x.npz'}", "accelerator=cpu"]
    with pytest.raises(InputError) as error:
        embed.run(composed("embed", EmbedConfig, *given), tmp_path / "run")
    assert str(error.value) == f"data: missing; {path} does not say it, give data=NAME"
    given += ["data=images", f"data.root={image_tree}", "data.image_size=16"]
    for extra, mean, std in (
        ([], [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        (
            ["augmentation.mean=[0.5,0.5,0.5]", "augmentation.std=[0.25,0.25,0.25]"],
            [0.5] * 3,
            [0.25] * 3,
        ),
    ):
        embed.run(composed("embed", EmbedConfig, *given, *extra), tmp_path / "run")
        with np.load(tmp_path / "x.npz") as file:
            features, names = file["features"], file["names"]
        pixels = (
            np.stack([np.asarray(Image.open(name))[:, 2:18] for name in names[:3]]) / 255
        )  # of 20 x 16, the middle
        images = torch.from_numpy((pixels - mean) / std).permute(0, 3, 1, 2).float()
        with torch.no_grad():
            expected = model(images).numpy()
        np.testing.assert_allclose(
            features[:3], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max()
        )


def test_other_projects_weights_begin_a_segmentation(official):
    path, model = official
    given = [f"checkpoint={path}", "data.root=nowhere"]
    with pytest.raises(InputError) as error:
        build_segmentation.find_backbone(composed("segment", SegmentConfig, *given))
    assert (
        str(error.value) == f"image_size: missing; {path} does not say it, give image_size=PIXELS"
    )
    start = build_segmentation.find_backbone(
        composed("segment", SegmentConfig, *given, "image_size=64")
    )
    assert (start.settings["name"], start.image_size, start.mean[0]) == ("resnet18", 64, 0.485)
    weights = model.state_dict()
    assert all(
        torch.equal(tensor, weights[name]) for name, tensor in start.backbone.state_dict().items()
    )


def test_other_projects_weights_are_exported_to_a_third(official, tmp_path, capsys):
    path, model = official
    output = tmp_path / "x.pth"
    given = [f"checkpoint={path}", "format=torchvision", f"output={output}"]
    with pytest.raises(InputError, match="image_size: missing"):
        export.run(composed("export", ExportConfig, *given), tmp_path / "run")
    export.run(
        composed("export", ExportConfig, *given, "image_size=224", "backbone=resnet18"),
        tmp_path / "run",
    )
    assert "query, epoch 200, step 0" in capsys.readouterr().out
    exported = torchvision.models.resnet18()
    exported.fc = torch.nn.Identity()
    exported.load_state_dict(torch.load(output, weights_only=True), strict=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(exported.eval()(images), model(images))


def test_another_projects_swin_v2_is_exported_in_the_window_that_it_does_not_tell(tmp_path, capsys):
    timm = pytest.importorskip("timm")
    path, output = tmp_path / "timm.pth", tmp_path / "x.pth"
    torch.save(timm.create_model("swinv2_tiny_window8_256", num_classes=0).state_dict(), path)
    given = [f"checkpoint={path}", "format=torchvision", f"output={output}", "image_size=256"]
    with pytest.raises(InputError, match=r"give backbone\.window_size"):
        export.run(composed("export", ExportConfig, *given), tmp_path / "run")
    export.run(composed("export", ExportConfig, *given, "backbone.window_size=8"), tmp_path / "run")
    assert output.is_file()


def method_of(config):
    return build_pretraining.build_method(dataclasses.asdict(config))


def test_a_run_starts_from_a_checkpoint_of_ours_with_all_of_it(tmp_path):
    moby = [
        "backbone=resnet_tiny",
        "method=moby",
        "method.queue_size=48",
        "method.embedding_dim=16",
    ]
    path = pretraining_checkpoint(tmp_path / "last.ckpt", *moby, "method.predictor.hidden_dim=32")
    state = read_checkpoint(path)["state_dict"]
    config = composed(
        "train", TrainConfig, "+experiment=quickstart", *moby, "method.predictor.hidden_dim=32"
    )
    method = method_of(config)
    start_from(method, str(path))
    assert all(torch.equal(tensor, state[name]) for name, tensor in method.state_dict().items())
    smaller = method_of(
        composed(
            "train", TrainConfig, "+experiment=quickstart", *moby, "method.predictor.hidden_dim=8"
        )
    )
    fresh = copy.deepcopy(smaller.predictor)
    start_from(smaller, str(path))
    for name, tensor in smaller.state_dict().items():
        if not name.startswith("predictor."):
            assert torch.equal(tensor, state[name])
    assert all(
        map(torch.equal, smaller.predictor.state_dict().values(), fresh.state_dict().values())
    )


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


SHORT = [
    "+experiment=quickstart", "backbone=resnet_tiny", "method.queue_size=48", "data.batch_size=32", "trainer.max_steps=1",
    "evaluation.baselines=false", "evaluation.every_n_epochs=100", "optimizer.lr=1e-12", "trainer.accelerator=cpu",
    "optimizer.weight_decay=0",
]  # fmt: skip


def test_init_from_is_read_by_a_new_run_and_not_by_one_that_goes_on(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    model = randomised(build_backbone("resnet_tiny", stem="cifar"))
    path = tmp_path / "x.pth"
    torch.save({"state_dict": prefixed(model.state_dict(), "module.backbone.")}, path)
    config = composed("train", TrainConfig, *SHORT, f"init_from={path}")
    train.run(config, tmp_path / "run")
    assert f"init_from={path}: backbone alone; taken: backbone (72)" in caplog.messages
    state = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]
    slim = torch.load(tmp_path / "run" / "checkpoints" / "backbone.pth", weights_only=True)
    for name, parameter in model.named_parameters():
        for there in (state[f"query_encoder.backbone.{name}"], slim["state_dict"][name]):
            torch.testing.assert_close(there, parameter.detach(), rtol=0, atol=1e-6)
    assert slim["step"] == 1

    path.unlink()
    config.trainer.max_steps = 2
    train.run(config, tmp_path / "run")
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 2
    assert (
        torch.load(tmp_path / "run" / "checkpoints" / "backbone.pth", weights_only=True)["step"]
        == 2
    )
    with pytest.raises(InputError, match=f"init_from={path}: no such file"):
        train.run(config, tmp_path / "another")
    assert not (tmp_path / "another").exists()
