"""Swin's position biases always belong to the current weights, whatever changed the weights.

PyTorch's fused optimizers and some foreach kernels do not count tensor versions, so versions cannot
be trusted. These tests compare the biases that a forward pass adds to its scores with those of a new
module that has the same weights.
"""

import copy
import dataclasses
import json

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from moco import evaluate, train
from moco.config.data import EvaluateDataConfig
from moco.config.pretrained import EvaluateConfig, EvaluationConfig
from moco.evaluation.features import embed
from moco.methods.momentum import update_key_encoder
from moco.models.backbones import build_backbone
from moco.models.swin import attention as window_attention
from moco.models.swin.window_change import rewindow
from moco.weights.init_from import start_from

IMAGES = torch.randn(2, 3, 16, 16)
SWINS = ["swin_tiny_patch2", "swin_v2_tiny_patch2"]
OPTIMIZERS = {
    "sgd": ["optimizer.lr=0.5"],
    "adamw": ["optimizer=adamw", "optimizer.lr=0.01", "optimizer.warmup_epochs=0"],
    "lars": ["optimizer=lars", "optimizer.lr=0.2", "optimizer.warmup_epochs=0"],
}


def biases_in_use(backbone, images=IMAGES):
    """The position bias that each block adds to its scores in one pass without gradients."""
    used = []
    attend = window_attention.attend_on_cpu

    def recorded(query, key, value, bias, grid):
        used.append(bias.clone())
        return attend(query, key, value, bias, grid)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(window_attention, "attend_on_cpu", recorded)
        backbone(images)
    return used


def new_with_same_weights(backbone, name):
    new = build_backbone(name, window_size=list(backbone.window_size))
    if name.startswith("swin_v2"):
        new = build_backbone(name, window_size=list(backbone.pretrained_window_size))
        rewindow(new, list(backbone.window_size))
    new.load_state_dict({key: tensor.clone() for key, tensor in backbone.state_dict().items()})
    return new.train(backbone.training)


def assert_biases_are_current(backbone, name):
    expected = biases_in_use(new_with_same_weights(backbone, name))
    used = biases_in_use(backbone)
    assert len(used) == len(expected) == 8
    for number, (bias, fresh) in enumerate(zip(used, expected, strict=True)):
        assert torch.equal(bias, fresh), f"block {number}: off by {(bias - fresh).abs().max():.3g}"


class BiasCheck(pl.Callback):
    """Compares the biases of both encoders with fresh ones before the first step and after every step."""

    def __init__(self, name):
        self.name = name
        self.checks = 0

    def on_train_start(self, trainer, pl_module):
        self.check(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.check(pl_module)

    def check(self, method):
        assert_biases_are_current(method.query_encoder.backbone, self.name)
        assert_biases_are_current(method.key_encoder.backbone, self.name)
        self.checks += 1


class Checkpoint(pl.callbacks.Checkpoint):
    """Keeps the last checkpoint in a file, with what `moco.train` adds to it."""

    def __init__(self, path, config):
        self.path = path
        self.config = config

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint |= {
            "config": dataclasses.asdict(self.config),
            "figures": {},
            "random_states": [],
        }

    def on_train_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("name", SWINS)
def test_biases_follow_every_change_of_the_weights(name):
    backbone = build_backbone(name)
    key_backbone = copy.deepcopy(backbone)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.5, fused=True)
    for _ in range(2):
        backbone(IMAGES).square().sum().backward()
        optimizer.step()
        update_key_encoder(key_backbone, backbone, 0.5)
        assert_biases_are_current(backbone, name)
        assert_biases_are_current(key_backbone, name)
    key_backbone.load_state_dict(backbone.state_dict())
    assert_biases_are_current(key_backbone, name)
    twin = copy.deepcopy(backbone)
    optimizer.step()
    assert_biases_are_current(backbone, name)
    assert_biases_are_current(twin, name)
    rewindow(backbone, 6)
    assert_biases_are_current(backbone, name)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", SWINS)
def test_biases_follow_every_change_in_a_training(name, optimizer, runner, tmp_path):
    settings = [
        f"backbone={name}",
        "data.image_size=16",
        "method.key_momentum=0.5",
        *OPTIMIZERS[optimizer],
    ]
    config = runner.config(*settings)
    check, path = BiasCheck(name), tmp_path / "last.ckpt"
    # Real optimizer steps and real key updates.
    method = runner.fit(config, [check, Checkpoint(path, config)])
    assert check.checks == 1 + 3
    # A resumed training.
    config.trainer.max_steps = 5
    resumed = runner.fit(config, [check], ckpt_path=path)
    assert check.checks == 1 + 3 + 1 + 2
    # load_state_dict and init_from into a module that has been used.
    method.load_state_dict(resumed.state_dict())
    check.check(method)
    other = runner.method(config)
    check.check(other)
    start_from(other, str(path))
    check.check(other)
    # A key update that was compiled.
    torch.compile(update_key_encoder, backend="aot_eager")(
        other.key_encoder, method.query_encoder, 0.5
    )
    check.check(other)
    # Other windows.
    for window in (2, 6):
        for encoder in (other.query_encoder, other.key_encoder):
            rewindow(encoder.backbone, window)
        check.check(other)
    # A copy shares nothing with what it was copied from.
    twin = copy.deepcopy(other)
    optimizer = torch.optim.SGD(other.query_encoder.parameters(), lr=0.1, fused=True)
    other.query_encoder.backbone(IMAGES).square().sum().backward()
    optimizer.step()
    check.check(other)
    check.check(twin)


@pytest.fixture
def embedded(monkeypatch):
    """All features that were computed of many images, by the module that asked for them: the monitor embeds by `sharding`."""
    found = {"callbacks.knn_monitor": [], "evaluation.subject": []}
    for module, features in found.items():

        def recorded(*arguments, features=features, **options):
            result = embed(*arguments, **options)
            features.append(result[0])
            return result

        monkeypatch.setattr(f"moco.{module}.embed", recorded)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", SWINS)
def test_the_knn_of_a_run_is_that_of_its_checkpoint(name, optimizer, runner, tmp_path, embedded):
    settings = [f"backbone={name}", "data.image_size=16", *OPTIMIZERS[optimizer]]
    length = [
        "trainer.max_epochs=3",
        "trainer.max_steps=-1",
        "evaluation.every_n_epochs=1",
        "data.batch_size=256",
    ]
    config = runner.config(*settings, *length)
    train.run(config, tmp_path / "run")
    monitored = json.loads((tmp_path / "run" / "metrics.json").read_text())
    of_checkpoint = EvaluateConfig(
        str(tmp_path / "run" / "checkpoints" / "last.ckpt"),
        EvaluateDataConfig(),
        EvaluationConfig(plots=False, label_free=False),
        "cpu",
    )
    evaluate.run(of_checkpoint, tmp_path / "evaluation")
    evaluated = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert monitored["knn/epoch"] == monitored["epoch"] == evaluated["epoch"] == 3
    assert monitored["knn/top1"] == evaluated["knn/top1"]
    assert monitored["knn/top5"] == evaluated["knn/top5"]
    # 360 queries hide small differences; the features of bank and queries show them.
    ours, theirs = embedded["callbacks.knn_monitor"][-2:], embedded["evaluation.subject"]
    assert sorted(map(len, ours)) == sorted(map(len, theirs)) == [360, 1437]
    for features in ours:
        same = next(rows for rows in theirs if len(rows) == len(features))
        np.testing.assert_array_equal(features, same[:, : features.shape[1]])
