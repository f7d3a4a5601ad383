"""Other projects' files of weights give the outputs of their own models."""

import logging
import sys
from argparse import Namespace
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

from moco.errors import InputError
from moco.models.backbones import build_backbone
from moco.weights.architecture import fitting_backbones
from moco.weights.init_from import start_from
from moco.weights.load_encoder import load_pretrained
from moco.weights.weight_files import (
    listed,
    read_content,
    recognise,
    renumber_layers,
    rows_of_unit_norm,
)
from tests.conftest import thinned
from tests.runs.test_hostile_checkpoints import Calls
from tests.weights.projects import (
    BACKBONES_ALONE,
    MOBY_CONFIG,
    PADS_OTHERWISE,
    WITH_HEADS,
    as_moby_saves,
    assert_same,
    moby,
    moco_v1,
    moco_v2,
    moco_v3_vit,
    queue,
    randomised,
    refused,
    resnet18,
    solo_learn_on_cifar,
    torchvision_swin,
)
from tests.weights.test_init_from import moby_method


def name_of(build):
    return build.__name__


def quick(cases, *of_all):
    """The cases, of which only some run in the fast suite."""
    return [
        pytest.param(case, marks=[] if case in of_all else [pytest.mark.slow]) for case in cases
    ]


@pytest.mark.parametrize("build", quick(WITH_HEADS, moco_v2, moco_v3_vit), ids=name_of)
def test_both_encoders_of_a_file_give_the_outputs_of_their_models(build, tmp_path):
    content, query, key = build()
    path = tmp_path / "x.pth"
    # The official weights of MoCo v1 and v2 are older than today's format.
    is_legacy = build in (moco_v1, moco_v2)
    torch.save(content, path, _use_new_zipfile_serialization=not is_legacy)
    size = 32 if build in (moco_v3_vit, moby) else 64
    for which, model in (("query", query), ("key", key)):
        pretrained = load_pretrained(str(path), which, {}, "embedding")
        assert_same(pretrained.encoder, model, "embedding", size)
        assert pretrained.config == {}
    assert pretrained.epoch == content.get("epoch", 0)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.slow
def test_checkpoints_of_the_official_moby_code_load_without_yacs(legacy, tmp_path, monkeypatch):
    """Their config is a yacs node with sets in its state. It is read without importing yacs."""
    content, query, key = moby()
    path = tmp_path / "checkpoint.pth"
    as_moby_saves(content, path, monkeypatch, _use_new_zipfile_serialization=not legacy)
    assert b"yacs.config" in path.read_bytes()
    read = read_content(path, "x")
    assert type(read["config"]) is OrderedDict
    assert read["config"] == MOBY_CONFIG
    assert vars(read["config"])["__deprecated_keys__"] == {"DATA.OLD", "BASE"}
    assert read["optimizer"]["state"][0]["step"] == 1
    for which, model in (("query", query), ("key", key)):
        pretrained = load_pretrained(str(path), which, {}, "embedding")
        assert_same(pretrained.encoder, model, "embedding", 32)
    assert pretrained.epoch == 299
    assert pretrained.settings["window_size"] == [4, 4, 4, 2]  # the last map is 2 x 2 cells
    new = moby_method()
    start_from(new, str(path))
    assert_same(new.eval().query_encoder, query, "embedding", 32)
    torch.testing.assert_close(new.reverse_queue.keys, content["model"]["queue1"].T)
    assert "yacs" not in sys.modules


def test_settings_of_argparse_are_read_as_a_dict(tmp_path):
    content, _, _ = moby()
    torch.save(content | {"config": Namespace(seed=3)}, tmp_path / "x.pth")
    read = read_content(tmp_path / "x.pth", "x")["config"]
    assert type(read) is OrderedDict
    assert read.seed == 3


@pytest.mark.parametrize("ending", ["pth", pytest.param("safetensors", marks=pytest.mark.slow)])
@pytest.mark.parametrize("build", thinned(BACKBONES_ALONE, every=4), ids=name_of)
def test_a_backbone_alone_is_recognised_by_its_tensors(build, ending, tmp_path):
    content, model, settings = build()
    path = tmp_path / f"x.{ending}"
    if ending == "pth":
        torch.save(content, path)
    else:
        content = content.get("state_dict", content.get("model", content))
        contiguous = {name: tensor.contiguous() for name, tensor in content.items()}
        pytest.importorskip("safetensors.torch").save_file(contiguous, path, {"format": "pt"})
    pretrained = load_pretrained(str(path), "query", {})
    assert_same(pretrained.encoder, model, "backbone")
    assert {key: pretrained.settings[key] for key in settings} == settings


@pytest.mark.slow
def test_the_log_says_what_was_recognised_loaded_and_not_used(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    torch.save(moco_v2()[0], tmp_path / "x.pth")
    load_pretrained(str(tmp_path / "x.pth"), "query", {})
    assert caplog.messages == [
        "backbone=resnet18, recognised by its tensors' shapes",
        "MoCo v1 or v2 (facebookresearch/moco); backbone resnet18",
        "loaded: backbone (120)",
        "not used: projector (4), key encoder's backbone (120), key encoder's projector (4), queue (3)",
        "the file says nothing about images: mean and std are ImageNet's where none are given",
    ]
    torch.save(resnet18().state_dict(), tmp_path / "x.pth")
    caplog.clear()
    load_pretrained(str(tmp_path / "x.pth"), "query", {"name": "resnet18", "stem": "imagenet"})
    assert caplog.messages[:-1] == [
        "torchvision or timm ResNet; backbone resnet18 (stem imagenet)",
        "loaded: backbone (120)",
        "not used: fc.weight, fc.bias",
    ]


@pytest.mark.slow
def test_the_heads_of_a_vit_have_to_be_given(tmp_path):
    classes = pytest.importorskip("timm").models.vision_transformer
    small = classes.VisionTransformer(32, 16, embed_dim=384, depth=12, num_heads=6, num_classes=0)
    path = tmp_path / "x.pth"
    torch.save(randomised(small).state_dict(), path)
    heads = "does not say how many heads its attention has; give backbone.num_heads: 6 in DeiT"
    assert refused(path).startswith(heads)
    assert refused(path, {"name": "vit_small"}).startswith(heads)
    loaded = load_pretrained(str(path), "query", {"num_heads": 6})
    assert_same(loaded.encoder, small, "backbone", 32)


@pytest.mark.slow
def test_another_architecture_is_named_with_tensor_and_shapes(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(resnet18().state_dict(), path)
    assert refused(path, {"name": "resnet50"}).startswith(
        "its weights do not fit backbone=resnet50: "
        "layer1.0.conv1.weight is (64, 64, 3, 3) and should be (64, 64, 1, 1), and "
    )
    assert refused(path, {"name": "resnet18", "stem": "cifar"}) == (
        "its weights do not fit backbone=resnet18: "
        "conv1.weight is (64, 3, 7, 7) and should be (64, 3, 3, 3)"
    )
    assert refused(path, {"name": "resnet34"}).startswith(
        "its weights do not fit backbone=resnet34: "
        "layer1.2.conv1.weight (64, 64, 3, 3) is missing, and "
    )
    torch.save(torchvision_swin()[0], path)
    assert "conv1.weight (64, 3, 7, 7) is missing" in refused(path, {"name": "resnet18"})


def test_a_tensor_that_is_missing_or_left_over_is_named(tmp_path):
    path = tmp_path / "x.pth"
    state = dict(resnet18().state_dict())
    torch.save(state | {"layer1.2.conv1.weight": torch.zeros(2)}, path)
    assert refused(path) == "its tensors' shapes fit no backbone; give backbone=NAME"
    assert refused(path, {"name": "resnet18"}).endswith(
        "layer1.2.conv1.weight (2,) has no counterpart"
    )
    del state["layer3.1.bn2.running_var"]
    torch.save(state, path)
    assert refused(path, {"name": "resnet18"}).endswith(
        "layer3.1.bn2.running_var (256,) is missing"
    )


def test_a_file_lacks_what_is_asked_of_it(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(resnet18().state_dict(), path)
    assert (
        refused(path, which="key") == "torchvision or timm ResNet, without key encoder's backbone"
    )
    assert refused(path, feature="embedding") == "holds no projector, which feature=embedding needs"


NO_TENSORS = "holds no tensors by name, neither directly nor in an item state_dict or model"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"weird.0.weight": torch.zeros(2), "other": torch.zeros(1)},
            "tensors named weird.0.weight, other are of no known format",
        ),
        (
            {f"a.{n}": torch.zeros(1) for n in range(9)},
            "tensors named a.* (9) are of no known format",
        ),
        ({"state_dict": {"epoch": 3}}, NO_TENSORS),
        ([torch.zeros(3)], NO_TENSORS),
        ({"state_dict": {3: 4}, "model": None}, NO_TENSORS),
    ],
)
def test_unknown_content_is_one_line(content, message, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    assert refused(tmp_path / "x.pth").startswith(message)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_is_named_and_never_runs(legacy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"layer1.0.conv1.weight": torch.zeros(3), "config": Calls(open, "canary", "w")}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    message = refused(tmp_path / "x.pth")
    assert message.startswith("it holds objects whose loading would run code (")
    assert message.endswith(
        "if you trust its source, write its tensors alone to a new file with torch.save"
    )
    assert not (tmp_path / "canary").exists()


def test_a_file_of_another_kind_is_one_line(tmp_path):
    path = tmp_path / "x.pth"
    assert refused(path) == "no such file"
    path.write_text("layer1: [0.1, 0.2]\n" * 20)
    assert refused(path).startswith("damaged, or no checkpoint at all (")


def test_a_damaged_file_of_the_legacy_format_is_one_line(tmp_path):
    path = tmp_path / "x.pth"
    state = build_backbone("resnet_tiny").state_dict()
    torch.save(state, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for length in generator.integers(1, len(whole), 4):
        path.write_bytes(whole[:length])
        assert refused(path).startswith("damaged")
    for place in generator.integers(100, 5_000, 20):  # in the pickles
        path.write_bytes(whole[:place] + generator.bytes(3) + whole[place + 3 :])
        try:
            load_pretrained(str(path), "query", {})
        except InputError:
            refused(path)  # in one line


@pytest.mark.parametrize(
    ("name", "tensor", "ignored"),
    [
        ("queue", torch.zeros(5), "queue.keys"),
        ("queue", torch.zeros(0, 0), "queue.keys"),
    ],
)
def test_what_cannot_be_a_queue_is_ignored_and_listed(name, tensor, ignored):
    weights = {"encoder_q.conv1.weight": torch.zeros(2), name: tensor}
    assert recognise(weights).ignored == [ignored]


def test_two_tensors_of_one_name_are_refused(tmp_path):
    name = "encoder_q.conv1.weight"
    torch.save({name: torch.zeros(3), f"module.{name}": torch.ones(3)}, tmp_path / "x.pth")
    assert refused(tmp_path / "x.pth") == f"two different tensors stand for {name}"


def test_a_damaged_safetensors_file_is_one_line(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    path = tmp_path / "x.safetensors"
    save_file({"conv1.weight": torch.zeros(3)}, path)
    path.write_bytes(path.read_bytes()[:-4])
    assert refused(path).startswith("damaged, or no safetensors file (")


@pytest.mark.slow
def test_solo_learns_stem_for_cifar_is_chosen_by_the_files_origin(tmp_path, caplog):
    content, query, key = solo_learn_on_cifar()
    path = str(tmp_path / "x.pth")
    torch.save(content, path)
    for which, model in (("query", query), ("key", key)):
        for given in ({}, {"name": "resnet18"}):
            pretrained = load_pretrained(path, which, given)
            assert pretrained.settings == {"name": "resnet18", "stem": "solo_cifar"}
            assert_same(pretrained.encoder, model, "backbone", 32)
    assert PADS_OTHERWISE not in caplog.text
    other = load_pretrained(path, "query", {"stem": "cifar"})
    assert PADS_OTHERWISE in caplog.text
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert F.cosine_similarity(other.encoder.encode(images), query(images)).max() < 0.98


@pytest.mark.slow
def test_a_backbone_alone_does_not_say_how_its_stem_pads(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    content, query, _ = solo_learn_on_cifar()
    path = str(tmp_path / "x.pth")
    alone = {name: x for name, x in content["state_dict"].items() if name.startswith("backbone.")}
    torch.save(alone, path)
    load_pretrained(path, "query", {})
    assert "if the weights are solo-learn's give backbone.stem=solo_cifar" in caplog.text
    assert_same(
        load_pretrained(path, "query", {"stem": "solo_cifar"}).encoder, query, "backbone", 32
    )


def shapes(weights):
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def test_the_layers_of_a_head_get_our_numbers_whatever_their_order():
    weights = {
        "bn1.running_mean": torch.zeros(4),
        "fc1.weight": torch.zeros(4, 5),
        "bn0.running_mean": torch.zeros(5),
        "fc0.weight": torch.zeros(5, 6),
    }
    assert shapes(renumber_layers(weights, is_dense=False)) == {
        "0.weight": (5, 6),
        "1.running_mean": (5,),
        "3.weight": (4, 5),
        "4.running_mean": (4,),
    }
    alone = {"layers.0.weight": torch.zeros(2, 3)}
    assert shapes(renumber_layers(alone, is_dense=False)) == {"weight": (2, 3)}
    local = {"layers.0.weight": torch.zeros(5, 6), "layers.2.weight": torch.zeros(4, 5)}
    assert shapes(renumber_layers(local, is_dense=True)) == {
        "0.weight": (5, 6, 1, 1),
        "2.weight": (4, 5, 1, 1),
    }


def test_a_queue_is_rows_of_unit_norm_however_it_was_stored():
    keys = queue()
    assert torch.equal(rows_of_unit_norm(keys), keys.T)
    assert torch.equal(rows_of_unit_norm(keys.T), keys.T)


@pytest.mark.parametrize(
    "name",
    thinned(["resnet50", "swin_s", "vit_b_16", "resnet101", "wide_resnet50_2", "swin_t"], every=3),
)
def test_every_published_architecture_has_one_backbone(name):
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    state = model.state_dict()
    for name_of_tensor, tensor in state.items():
        if "pos_embedding" in name_of_tensor:
            # Fixed positions are told from learned ones by their values.
            state[name_of_tensor] = torch.zeros(tensor.shape)
    assert fitting_backbones(state) == [name]


def test_names_in_a_line_are_grouped_when_there_are_many():
    assert listed(["a.b", "c"]) == "a.b, c"
    assert listed([f"a.{n}" for n in range(7)] + ["b"]) == "a.* (7), b"
