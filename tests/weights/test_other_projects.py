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
from moco.weights.backbone_files import read_backbone
from moco.weights.init_from import start_from
from moco.weights.loading import load_pretrained
from moco.weights.reading import read_content, read_weight_file
from moco.weights.recognise import listed, renumber_layers, rows_of_unit_norm
from tests.conftest import run_program
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
from tests.weights.test_init_from import moby_method, started


@pytest.mark.parametrize("build", WITH_HEADS.values(), ids=WITH_HEADS)
def test_both_encoders_of_a_file_give_the_outputs_of_their_models(build, tmp_path):
    content, query, key = build()
    # The official weights of MoCo v1 and v2 are older than today's format.
    torch.save(
        content, tmp_path / "x.pth", _use_new_zipfile_serialization=build not in (moco_v1, moco_v2)
    )
    size = 32 if build in (moco_v3_vit, moby) else 64
    for which, model in (("query", query), ("key", key)):
        pretrained = load_pretrained(str(tmp_path / "x.pth"), which, {}, "embedding")
        assert_same(pretrained.encoder, model, "embedding", size)
        assert pretrained.config == {}
    assert pretrained.epoch == content.get("epoch", 0)


@pytest.mark.parametrize("legacy", [False, True])
def test_checkpoints_of_the_official_moby_code_load_without_yacs(legacy, tmp_path, monkeypatch):
    """Their config is a yacs node with a set in its state; its class is not imported, and yacs need not be there."""
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


def test_programs_take_checkpoints_of_the_official_moby_code(tmp_path, monkeypatch):
    content, _, _ = moby()
    as_moby_saves(content, tmp_path / "checkpoint.pth", monkeypatch)
    done = run_program(
        "moco.export", "checkpoint=checkpoint.pth", "format=safetensors", "image_size=32", "output=x.safetensors",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    backbone, about = read_backbone(tmp_path / "x.safetensors")
    assert about["backbone"]["window_size"] == [4, 4, 4, 2]
    patches = content["model"]["encoder.patch_embed.proj.weight"]
    assert torch.equal(backbone.features[0][0].weight, patches)


def test_settings_of_argparse_are_read_as_a_dict(tmp_path):
    content, _, _ = moby()
    torch.save(content | {"config": Namespace(seed=3)}, tmp_path / "x.pth")
    read = read_content(tmp_path / "x.pth", "x")["config"]
    assert type(read) is OrderedDict
    assert read.seed == 3


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("build", BACKBONES_ALONE.values(), ids=BACKBONES_ALONE)
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


def test_the_log_says_what_was_recognised_taken_and_left(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    torch.save(moco_v2()[0], tmp_path / "x.pth")
    load_pretrained(str(tmp_path / "x.pth"), "query", {})
    source = f"checkpoint={tmp_path / 'x.pth'}"
    assert caplog.messages == [
        f"{source}: backbone=resnet18, recognised by its tensors' shapes",
        f"{source}: MoCo v1 or v2 (facebookresearch/moco); backbone resnet18",
        "loaded: backbone (120)",
        "not used: projector (4), key encoder's backbone (120), key encoder's projector (4), queue (3)",
        "the file says nothing about images: mean and std are ImageNet's where none are given",
    ]
    torch.save(resnet18().state_dict(), tmp_path / "x.pth")
    caplog.clear()
    load_pretrained(str(tmp_path / "x.pth"), "query", {"name": "resnet18", "stem": "imagenet"})
    assert caplog.messages[:-1] == [
        f"{source}: torchvision or timm ResNet; backbone resnet18 (stem imagenet)", "loaded: backbone (120)", "not used: fc.weight, fc.bias",
    ]  # fmt: skip


def test_what_shapes_do_not_show_has_to_be_given(tmp_path):
    timm = pytest.importorskip("timm")
    path = str(tmp_path / "x.pth")

    def complaint(given):
        with pytest.raises(InputError) as error:
            load_pretrained(path, "query", given)
        return str(error.value)

    small = timm.models.vision_transformer.VisionTransformer(
        32, 16, embed_dim=384, depth=12, num_heads=6, num_classes=0
    )
    torch.save(randomised(small).state_dict(), path)
    heads = f"checkpoint={path}: does not say how many heads its attention has; give backbone.num_heads: 6 in DeiT"
    assert complaint({}).startswith(heads)
    assert complaint({"name": "vit_small"}).startswith(heads)
    assert_same(load_pretrained(path, "query", {"num_heads": 6}).encoder, small, "backbone", 32)

    settings = {
        "patch_size": 2,
        "embed_dim": 32,
        "depths": (2,) * 4,
        "num_heads": (1, 2, 4, 8),
        "num_classes": 0,
    }
    swin = randomised(
        timm.models.swin_transformer_v2.SwinTransformerV2(img_size=64, window_size=4, **settings)
    )
    torch.save(swin.state_dict(), path)
    for given in ({}, {"name": "swin_v2_tiny_patch2"}):
        assert (
            "does not say which windows it was pretrained with; give backbone.window_size"
            in complaint(given)
        )
    assert_same(load_pretrained(path, "query", {"window_size": 4}).encoder, swin, "backbone")
    widened = timm.models.swin_transformer_v2.SwinTransformerV2(
        img_size=128, window_size=8, pretrained_window_sizes=[4] * 4, **settings
    ).eval()
    widened.load_state_dict(swin.state_dict())
    given = {"pretrained_window_size": 4, "window_size": 8}
    assert_same(load_pretrained(path, "query", given).encoder, widened, "backbone", 128)


def test_another_architecture_is_named_with_tensor_and_shapes(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(resnet18().state_dict(), path)
    assert refused(path, {"name": "resnet50"}).startswith(
        "its weights do not fit backbone=resnet50: layer1.0.conv1.weight is (64, 64, 3, 3) and should be (64, 64, 1, 1), and "
    )
    assert refused(path, {"name": "resnet18", "stem": "cifar"}) == (
        "its weights do not fit backbone=resnet18: conv1.weight is (64, 3, 7, 7) and should be (64, 3, 3, 3)"
    )
    assert refused(path, {"name": "resnet34"}).startswith(
        "its weights do not fit backbone=resnet34: layer1.2.conv1.weight (64, 64, 3, 3) is missing, and "
    )
    deeper = {
        name: x
        for name, x in build_backbone("resnet34").state_dict().items()
        if not name.startswith("layer4.")
    }
    torch.save(
        deeper
        | {name: x for name, x in resnet18().state_dict().items() if name.startswith("layer4.")},
        path,
    )
    assert refused(path) == "no backbone here has tensors of these shapes; give backbone=NAME"
    assert "layer1.2.conv1.weight (64, 64, 3, 3) has no counterpart" in refused(
        path, {"name": "resnet18"}
    )
    missing = {
        name: x for name, x in resnet18().state_dict().items() if name != "layer3.1.bn2.running_var"
    }
    torch.save(missing, path)
    assert refused(path, {"name": "resnet18"}).endswith(
        "layer3.1.bn2.running_var (256,) is missing"
    )
    torch.save(torchvision_swin()[0], path)
    assert "conv1.weight (64, 3, 7, 7) is missing" in refused(path, {"name": "resnet18"})


def test_a_file_lacks_what_is_asked_of_it(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(resnet18().state_dict(), path)
    assert (
        refused(path, which="key") == "torchvision or timm ResNet, without key encoder's backbone"
    )
    assert refused(path, feature="embedding") == "holds no projector, which feature=embedding needs"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weird.0.weight": torch.zeros(2), "other": torch.zeros(1)}, "tensors named weird.0.weight, other are of no known format"),
        ({f"a.{n}": torch.zeros(1) for n in range(9)}, "tensors named a.* (9) are of no known format"),
        ({"state_dict": {"epoch": 3}}, "holds no tensors by name, neither directly nor in an item state_dict or model"),
        ([torch.zeros(3)], "holds no tensors by name"),
        ({"state_dict": {3: 4}, "model": None}, "holds no tensors by name"),
    ],
)  # fmt: skip
def test_unknown_content_is_one_line(content, message, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    assert refused(tmp_path / "x.pth").startswith(message)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_is_named_and_never_runs(legacy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = resnet18().state_dict() | {"config": Calls(open, "canary", "w")}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    message = refused(tmp_path / "x.pth")
    assert message.startswith("it holds objects whose loading would run code (")
    assert message.endswith(
        "if you trust its source, write its tensors alone to a new file with torch.save"
    )
    assert not (tmp_path / "canary").exists()


def test_files_that_hold_no_weights_are_one_line(tmp_path):
    path = tmp_path / "x.pth"
    assert refused(path) == "no such file"
    path.write_text("layer1: [0.1, 0.2]\n" * 20)
    assert refused(path).startswith("damaged, or no checkpoint at all (")
    torch.save(resnet18().state_dict(), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for length in generator.integers(1, len(whole), 4):
        path.write_bytes(whole[:length])
        assert refused(path).startswith("damaged")
    for place in generator.integers(100, 20_000, 20):  # in the pickles
        path.write_bytes(whole[:place] + generator.bytes(3) + whole[place + 3 :])
        try:
            load_pretrained(str(path), "query", {})
        except InputError:
            assert "\n" not in refused(path)


def test_what_cannot_be_a_queue_is_left_aside_and_listed(tmp_path):
    content, _, _ = moco_v2()
    for name, tensor in {
        "module.queue": torch.zeros(5), "module.queue_ptr": torch.zeros(2), "module.queue ": torch.zeros(0, 0),
    }.items():  # fmt: skip
        changed = {"state_dict": content["state_dict"] | {name.strip(): tensor}}
        torch.save(changed, tmp_path / "x.pth")
        held = read_weight_file(str(tmp_path / "x.pth"), "checkpoint=x")
        assert held.ignored[-1] == ("queue.pointer" if "ptr" in name else "queue.keys")


def test_two_tensors_of_one_name_are_refused(tmp_path):
    content, _, _ = moco_v2()
    content["state_dict"]["encoder_q.conv1.weight"] = torch.zeros(64, 3, 7, 7)
    torch.save(content, tmp_path / "x.pth")
    assert refused(tmp_path / "x.pth") == "two different tensors stand for encoder_q.conv1.weight"


def test_a_damaged_safetensors_file_is_one_line(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    path = tmp_path / "x.safetensors"
    save_file({"conv1.weight": torch.zeros(3)}, path)
    path.write_bytes(path.read_bytes()[:-4])
    assert refused(path).startswith("damaged, or no safetensors file (")


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

    new, _, _ = started(
        content, tmp_path, backbone={"name": "resnet18", "stem": "solo_cifar"}, hidden_dim=32
    )
    assert_same(new.query_encoder, query, "backbone", 32)
    caplog.clear()
    started(content, tmp_path, backbone={"name": "resnet18", "stem": "cifar"}, hidden_dim=32)
    assert PADS_OTHERWISE in caplog.text


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


def test_a_head_is_put_into_our_order_whatever_the_order_of_its_tensors():
    weights = {
        "bn1.running_mean": torch.zeros(4), "fc1.weight": torch.zeros(4, 5), "bn0.running_mean": torch.zeros(5),
        "fc0.weight": torch.zeros(5, 6),
    }  # fmt: skip
    ours = renumber_layers(weights, is_dense=False)
    assert {name: tuple(x.shape) for name, x in ours.items()} == {
        "0.weight": (5, 6), "1.running_mean": (5,), "3.weight": (4, 5), "4.running_mean": (4,),
    }  # fmt: skip
    assert list(renumber_layers({"layers.0.weight": torch.zeros(2, 3)}, is_dense=False)) == [
        "weight"
    ]
    local = renumber_layers(
        {"layers.0.weight": torch.zeros(5, 6), "layers.2.weight": torch.zeros(4, 5)}, is_dense=True
    )
    assert {name: tuple(x.shape) for name, x in local.items()} == {
        "0.weight": (5, 6, 1, 1),
        "2.weight": (4, 5, 1, 1),
    }


def test_a_queue_is_rows_of_unit_norm_however_it_was_stored():
    keys = queue()
    assert torch.equal(rows_of_unit_norm(keys), keys.T)
    assert torch.equal(rows_of_unit_norm(keys.T), keys.T)


@pytest.mark.parametrize(
    "name", ["resnet50", "resnet101", "wide_resnet50_2", "swin_t", "swin_s", "vit_b_16"]
)
def test_every_published_architecture_has_one_backbone(name):
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    state = {
        key: torch.zeros(tensor.shape) if "pos_embedding" in key else tensor
        for key, tensor in model.state_dict().items()
    }
    assert [settings["name"] for settings in fitting_backbones(state)] == [name]


def test_names_in_a_line_are_grouped_when_there_are_many():
    assert listed(["a.b", "c"]) == "a.b, c"
    assert listed([f"a.{n}" for n in range(7)] + ["b"]) == "a.* (7), b"
