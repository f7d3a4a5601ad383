"""Run folders: one for each run, and none that a program reads."""

from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from moco.cli.launch import remove_empty
from moco.cli.run_folders import check_folder
from moco.cli.run_names import (
    is_named_by_time,
    job_name,
    new_folder,
    renamed_by_preset,
    sweep_name,
    takes_name_of_preset,
)
from moco.config.pretrained import EvaluateConfig
from moco.config.train import TrainConfig
from moco.errors import InputError


def test_two_runs_of_one_second_get_two_folders(tmp_path):
    wanted = tmp_path / "runs" / "2026-11-30_13-00-00"
    folders = [new_folder(wanted) for _ in range(3)]
    assert [folder.name[19:] for folder in folders] == ["", "_2", "_3"]
    assert all(folder.is_dir() for folder in folders)
    (tmp_path / "file").write_text("")
    blocked = tmp_path / "file" / "run"
    assert new_folder(blocked) == blocked  # Hydra says what is wrong


def test_only_folders_with_a_time_in_their_name_get_numbers(monkeypatch):
    def named(text):
        return is_named_by_time(OmegaConf.create({"hydra": {"run": {"dir": text}}}))

    for name in ("WORLD_SIZE", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    assert named("runs/custom/${run_name:${now:%H}}")
    assert not named("runs/mine")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not named("runs/custom/${run_name:${now:%H}}")


def test_a_new_run_moves_to_the_name_of_its_preset(tmp_path, monkeypatch):
    for name in ("WORLD_SIZE", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    plain = {"run": {"dir": "x"}, "runtime": {"output_dir": "x"}, "overrides": {"hydra": []}}
    running = OmegaConf.create({**plain, "mode": RunMode.RUN})
    monkeypatch.setattr(HydraConfig, "get", lambda: running)
    folder = tmp_path / "runs" / "custom" / "now"
    folder.mkdir(parents=True)
    (folder / "images.npz").write_text("")
    others = tmp_path / "runs" / "own_images_small" / "now"
    others.mkdir(parents=True)
    assert takes_name_of_preset(folder)
    assert not takes_name_of_preset(others)
    OmegaConf.set_readonly(running, True)
    new = renamed_by_preset(folder, "own_images_small")
    assert new == others.with_name("now_2")
    assert (new / "images.npz").exists()
    assert not folder.parent.exists()
    assert running.runtime.output_dir == str(new)
    OmegaConf.set_readonly(running, False)
    running.overrides.hydra = ["hydra.run.dir=runs/custom/mine"]
    assert not takes_name_of_preset(folder)
    running.overrides.hydra = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not takes_name_of_preset(folder)


def test_a_run_does_not_write_into_what_it_reads(tmp_path, monkeypatch):
    images = tmp_path / "images"
    images.mkdir()
    config = TrainConfig()
    for root, folder in (
        (str(images), images),
        (str(images), images / "run"),
        ([str(tmp_path), str(images)], images / "run"),
    ):
        config.data.root = root
        with pytest.raises(InputError, match=r"lies in data.root=.*choose another hydra.run.dir"):
            check_folder(config, folder)
    config.data.root = str(images)
    check_folder(config, tmp_path / "images_run")
    monkeypatch.chdir(images)
    check_folder(config, images / "runs" / "new")  # started among the images


def test_an_evaluation_does_not_overwrite_the_run_of_its_checkpoint(tmp_path):
    run = tmp_path / "run"
    (run / ".hydra").mkdir(parents=True)
    (run / ".hydra" / "config.yaml").write_text("")
    config = EvaluateConfig(checkpoint=str(run / "checkpoints" / "last.ckpt"))
    with pytest.raises(InputError, match="is the run of checkpoint="):
        check_folder(config, run)
    check_folder(config, run / "evaluation")


def test_of_a_path_the_last_part_is_in_the_name_of_a_sweep_and_the_names_differ():
    overrides = [
        "method.temperature=0.1,0.2",
        'data.root="/tmp/data/Fotos Überblick"',
    ]
    name = sweep_name(overrides)
    assert name.startswith("data.root-Fotos--berblick-__method.temperature__")
    names = {
        job_name([f"data.root={root}"], ["data.root"])
        for root in ("/a/b/train", "/a/c/train", "[/a/x,/b/y]", "train", "/a/b/train/")
    }
    assert len(names) == 5
    assert "data.root-train" in names
    assert max(map(len, names)) < 35


def test_only_empty_folders_inside_runs_go_with_a_run_that_never_began(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/evaluate/small/now", "mine/now"):
        (tmp_path / name).mkdir(parents=True)
        remove_empty(Path(name))
    (tmp_path / "runs" / "kept" / "other").mkdir(parents=True)
    (tmp_path / "runs" / "kept" / "now").mkdir()
    remove_empty(Path("runs/kept/now"))
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "mine", "runs", "runs/kept", "runs/kept/other",
    ]  # fmt: skip
