"""Where files go when nobody says it."""

import os
from pathlib import Path

import pytest

from moco.cli.default_outputs import export_file, features_file

SETTINGS = {"split": "train", "feature": "backbone", "data": {"name": "images", "root": "/d/写真"}}


@pytest.fixture
def last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "first"
    (run / ".hydra").mkdir(parents=True)
    (run / ".hydra" / "config.yaml").write_text("")
    return run / "checkpoints" / "last.ckpt"


def test_features_are_in_the_run_and_the_same_command_finds_them_again(last, tmp_path):
    folder = Path("runs/embed/now")
    path = features_file(last, SETTINGS, folder)
    assert path.parent == Path("runs/first/embeddings")
    assert path.name.startswith("last-写真-train-")
    assert path.suffix == ".npz"
    assert features_file(os.path.relpath(last), SETTINGS, Path("runs/embed/later")) == path
    other = SETTINGS | {"data": {"name": "images", "root": "/e/写真"}}
    assert features_file(last, other, folder) != path
    assert features_file(tmp_path / "other.pth", SETTINGS, folder).parent == Path("runs/embed")


def test_exported_weights_are_beside_the_checkpoint_of_a_run(last, tmp_path):
    folder = Path("runs/export/now")
    checkpoints = Path("runs/first/checkpoints")
    assert export_file(last, "timm", ".pth", folder) == checkpoints / "last_timm.pth"
    own = export_file(tmp_path / "a.pth", "safetensors", ".safetensors", folder)
    assert own == folder / "a.safetensors"
