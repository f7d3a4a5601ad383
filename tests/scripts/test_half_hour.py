"""Test scripts/half_hour.py.

Its contenders do what they say, and a comparison of seconds ends with its table.
"""

import importlib
import io
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from moco.methods.batch_norm import split_batch_norm
from tests.conftest import REPOSITORY
from tests.processes import run_to_end

SIZES = {"train_images": 256, "test_images": 64}


@pytest.fixture
def script(monkeypatch):
    """Return a function that imports one of the two files."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    return importlib.import_module


def test_the_official_contender_has_the_batch_norm_of_split_batch_norm(script):
    theirs = script("half_hour_contender").SplitBatchNorm(5)
    own = nn.Sequential(nn.BatchNorm2d(5))
    split_batch_norm(own, 8)
    images = torch.randn(32, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(theirs(images), own(images))
    torch.testing.assert_close(theirs.running_var, own[0].running_var)
    torch.testing.assert_close(theirs.eval()(images), own.eval()(images))


def test_only_the_seconds_of_turns_count(script, monkeypatch):
    module = script("half_hour_contender")
    clock, embedded, answers = [100.0], [], io.StringIO()
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr("sys.stdin", io.StringIO("10\n5\n5\n"))

    def embed(backbone):
        embedded.append(backbone)
        clock[0] += 1000.0

    turns = module.Turns(20.0, answers, embed)
    turns.begin("net")
    clock[0] = 100.0
    turns.since = 100.0
    for seconds in (4.0, 4.0, 4.0, 6.0):  # the first turn ends within its third step
        clock[0] += seconds
        turns.step_done(256, "net")
    assert turns.share == pytest.approx(18 / 20)
    said = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert said == [
        {"seconds": 0.0, "images": 0, "finished": False},
        {"seconds": 12.0, "images": 768, "finished": False},
        {"seconds": 18.0, "images": 1024, "finished": False},
    ]
    assert embedded == ["net", "net", "net"]


def test_the_table_tells_how_each_ended(script):
    curves = {
        "ours": [
            [
                {"minutes": 0, "epochs": 0, "top1": 0.2},
                {"minutes": 2.04, "epochs": 1.2, "top1": 0.45},
            ],
            [
                {"minutes": 0, "epochs": 0, "top1": 0.2},
                {"minutes": 2.0, "epochs": 1.2, "top1": 0.47},
            ],
        ]
    }
    lines = script("half_hour").table(curves, "cifar10_cpu", 0.4).splitlines()
    assert lines[-2] == "| this project, cifar10_cpu | 2.0 | 1.20 | 20.0 ± 0.0 | 46.0 ± 1.4 |"
    assert lines[-1] == "| raw pixels | | | | 40.0 |"


@pytest.mark.slow
def test_a_race_of_seconds_ends_with_a_curve_of_each(tmp_path):
    generator = np.random.default_rng(0)
    arrays = {}
    for name, num in SIZES.items():
        arrays[name] = generator.integers(0, 256, (num, 32, 32, 3), np.uint8)
        arrays[name.replace("images", "labels")] = np.arange(num) % 10
    np.savez(tmp_path / "some.npz", **arrays)
    command = [sys.executable, "scripts/half_hour.py", tmp_path / "some.npz", tmp_path / "race"]
    options = ["--contenders", "ours", "official", "--minutes", "0.1", "--turn", "0.06"]
    options += ["--batch-size", "64", "--num-workers", "1"]
    options += ["data.batch_size=64", "trainer.max_epochs=100"]
    told = run_to_end(*command, *options, cwd=REPOSITORY)
    assert told.returncode == 0, told.stderr
    result = json.loads((tmp_path / "race" / "half_hour.json").read_text())
    for (curve,) in result["curves"].values():
        assert len(curve) == 3
        assert curve[-1]["minutes"] >= 0.1
        assert 0 == curve[0]["epochs"] < curve[1]["epochs"] < curve[2]["epochs"]
        assert 0 <= curve[-1]["top1"] <= 1
    assert "| official CIFAR-10 recipe |" in told.stdout
