"""Folders whose names rich takes for markup, and which are not UTF-8, in all programs that a user needs."""

import csv
import json

import pytest

from tests.conftest import run_program

SMALL = [
    "backbone=resnet_tiny",
    "augmentation=cifar",
    "data=images",
    "data.image_size=16",
    "data.batch_size=8",
    "data.num_workers=0",
    "method.batch_norm_splits=2",
    "method.queue_size=16",
    "trainer.accelerator=cpu",
]
NAME = "a[/b] caf\udce9"


@pytest.mark.slow
def test_every_program_takes_a_name_with_brackets_that_is_not_utf8(tmp_path, photographs):
    (tmp_path / NAME).parent.mkdir()
    photographs.rename(tmp_path / NAME)
    run_name = f"run {NAME}"
    folder = tmp_path / run_name
    where = [f'data.root="{NAME}"', f'hydra.run.dir="{run_name}"']
    for epochs in (1, 2):
        ended = run_program(
            "moco.train", *SMALL, *where, f"trainer.max_epochs={epochs}", cwd=tmp_path
        )
        assert ended.returncode == 0, ended.stderr
    assert "run a[/b] caf\\udce9/checkpoints/last.ckpt" in ended.stdout
    assert "TensorBoard cannot write to a folder" in ended.stdout
    log = (folder / "train.log").read_text(encoding="utf-8")
    assert log.count("started:") == 2
    assert "epoch    2/2  loss" in log
    with (folder / "metrics.csv").open(newline="") as file:
        assert list(csv.DictReader(file))

    checkpoint = f'checkpoint="{run_name}/checkpoints/last.ckpt"'
    programs = {
        "moco.embed": ["data=images", where[0], f'output="{NAME}.npz"', "index=flat"],
        "moco.export": ["format=safetensors", f'output="{NAME}.safetensors"'],
        "moco.evaluate": [
            "data=image_folder",
            where[0],
            f'hydra.run.dir="of {NAME}"',
            "data.image_size=16",
        ],
    }
    for program, arguments in programs.items():
        ended = run_program(program, checkpoint, *arguments, cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr
        assert "written to " in ended.stdout
        assert "a[/b] caf\\udce9" in ended.stdout
    figures = json.loads((tmp_path / f"of {NAME}" / "metrics.json").read_text(encoding="utf-8"))
    assert figures["checkpoint"] == f"{run_name}/checkpoints/last.ckpt"
