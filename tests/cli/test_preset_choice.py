"""`moco.train data.root=DIR` alone: what DIR is, which preset trains on it, and what wins over it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from moco.cli import build_pretraining, from_python, preset_choice
from moco.cli.preset_choice import (
    PRESET_FILE,
    Preset,
    kind_of,
    preset_overrides,
    with_kind_of_data,
    with_preset,
)
from moco.config.parsing import SCHEMAS, parse
from tests.configs import composed
from tests.conftest import thinned


def chosen(overrides, folder, number, monkeypatch, side=224, program="train"):
    """The config and the files of `with_preset` for this number of images."""
    source = SimpleNamespace(train=range(number), image_size=side)
    monkeypatch.setattr(build_pretraining, "listed_source", lambda *_, **__: source)
    monkeypatch.setattr(preset_choice, "check_pretraining", lambda *_: None)
    config = composed(program, *overrides)
    whole, files = with_preset(program, {}, config, overrides, folder)
    return (parse(whole, SCHEMAS[program]) if files else None), files


@pytest.mark.parametrize(
    ("number", "backbone", "queue", "batch"),
    thinned(
        [
            (100, "resnet18", 8, 64),
            (10_000, "resnet50", 512, 256),
            (200_001, "resnet50", 16384, 256),
        ],
        every=3,
    ),
)
def test_the_number_of_images_picks_the_preset(
    number, backbone, queue, batch, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO")
    config, _ = chosen(["data.root=pics"], tmp_path, number, monkeypatch)
    assert config.backbone.name == backbone
    assert config.data.image_size == 224
    assert (config.method.queue_size, config.data.batch_size) == (queue, batch)
    assert f"for {number:,} images, since no experiment was chosen" in caplog.messages[0]


@pytest.mark.slow
def test_a_run_from_python_is_in_the_folder_of_its_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = SimpleNamespace(train=range(100), image_size=224)
    monkeypatch.setattr(build_pretraining, "listed_source", lambda *_, **__: source)
    monkeypatch.setattr(preset_choice, "check_pretraining", lambda *_: None)
    _, folder, _ = from_python.composed(["data.root=pics"], None)
    assert folder.parts[:2] == ("runs", "own_images_small")
    _, folder, _ = from_python.composed(["data.root=pics"], "here")
    assert folder == Path("here")


def test_what_the_user_chooses_wins_key_by_key(tmp_path, monkeypatch):
    overrides = ["data.root=pics", "method=moco_v3", "optimizer.lr=0.5", "data.batch_size=32"]
    config, _ = chosen(overrides, tmp_path, 5_000, monkeypatch)
    assert config.method == composed("train", "method=moco_v3", "data.root=x").method
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (0.5, 5e-4)
    assert (config.data.batch_size, config.trainer.max_epochs) == (32, 800)
    assert config.backbone.name == "resnet18"


@pytest.mark.parametrize(
    "overrides",
    thinned(
        [
            ["+experiment=quickstart"],
            ["data=digits"],
            ["data=cifar10"],
            ["data=custom", "data.target=a:b"],
            ["seed=1"],
        ],
        every=3,
    ),
    ids=" ".join,
)
def test_nothing_is_picked_where_there_is_nothing_to_pick(overrides, tmp_path, monkeypatch):
    assert chosen(overrides, tmp_path, 100, monkeypatch) == (None, {})


@pytest.mark.slow
def test_a_preview_shows_the_same_choice(tmp_path, monkeypatch):
    config, _ = chosen(["data.root=pics"], tmp_path, 100, monkeypatch)
    preview, _ = chosen(["data.root=pics"], tmp_path, 100, monkeypatch, program="preview")
    assert preview.augmentation == config.augmentation
    assert preview.data == config.data


@pytest.mark.slow
def test_a_run_keeps_its_preset_when_images_were_added(tmp_path, monkeypatch):
    run = tmp_path / "run"
    (run / ".hydra").mkdir(parents=True)
    config, files = chosen(["data.root=pics"], run, 9_000, monkeypatch)
    (run / ".hydra" / PRESET_FILE).write_text(files[PRESET_FILE])
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").write_text("")
    again, kept = chosen(["data.root=pics"], run, 11_000, monkeypatch)
    assert (again, kept) == (config, files)
    resume = f"resume={run}/checkpoints/last.ckpt"
    elsewhere, _ = chosen(["data.root=pics", resume], tmp_path / "new", 11_000, monkeypatch)
    assert elsewhere.backbone.name == "resnet18"
    (run / ".hydra" / PRESET_FILE).unlink()  # as a version without presets left it
    assert chosen(["data.root=pics"], run, 9_000, monkeypatch) == (None, {})


def test_small_images_keep_their_size(tmp_path, monkeypatch):
    config, files = chosen(["data=npz", "data.root=x.npz"], tmp_path, 50_000, monkeypatch, side=28)
    assert config.data.image_size is None
    assert (config.backbone.name, config.backbone.stem) == ("resnet50", "cifar")
    assert yaml.safe_load(files[PRESET_FILE])["data"] == "npz"


@pytest.mark.parametrize("size", thinned(["large", "small", "medium"], every=3))
def test_every_line_of_a_preset_is_an_override(size):
    lines = preset_overrides(Preset("image_folder", size, 10**6, 224), set())
    whole = composed("train", f"+experiment=own_images_{size}", "data=image_folder", "data.root=x")
    assert composed("train", *lines, "data.root=x") == whole


@pytest.mark.parametrize("program", ["pack", "stats"])
def test_other_programs_find_the_same_kind_of_data(program, tmp_path):
    def kind(*overrides):
        config = composed(program, *overrides)
        whole = with_kind_of_data(program, None, config, overrides)
        return None if whole is None else whole.data.name

    own = ["output=x"] if program == "pack" else []
    assert kind("data.root=x.npz", *own) == "npz"
    assert kind(f"data.root={tmp_path}", *own) is None  # data=images, as before
    assert kind("data=images", "data.root=x.npz", *own) is None
    assert kind(*own) is None


def test_the_kind_of_data_is_found_where_it_is_certain(tmp_path):
    def folder(name, *files):
        for file in files:
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
        return str(tmp_path / name)

    assert kind_of(folder("plain", "a/1.jpg", "b/2.jpg")) == "images"
    assert kind_of(folder("plain", "index.json")) == "images"
    assert (
        kind_of(folder("split", "train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg")) == "image_folder"
    )
    assert kind_of(folder("years", "train/2023/1.jpg", "test/2024/2.jpg")) == "images"
    assert kind_of(folder("shards", "00.tar", "01.tar", "sizes.json")) == "webdataset"
    assert kind_of(folder("mixed", "00.tar", "1.jpg")) == "images"
    assert kind_of(folder("saved", "dataset_info.json")) == "hf"
    assert kind_of(folder("array", ".zarray")) == "zarr"
    assert kind_of("x.NPZ") == kind_of("x.npy") == "npz"
    assert kind_of("x.h5") == "hdf5"
    assert kind_of("shards-{000..012}.tar") == kind_of("pipe:cat x") == "webdataset"
    assert kind_of([folder("plain"), folder("years")]) == "images"
    packed = folder("packed", "index.json")
    (tmp_path / "packed" / "index.json").write_text('{"version": 1, "parts": [], "source": {}}')
    assert kind_of(packed) == "packed"
