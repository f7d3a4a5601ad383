"""Runs that start from a file of weights, ours or another project's."""

import copy
import dataclasses
import logging

import pytest
import torch

from moco import train
from moco.config.train import TrainConfig
from moco.errors import InputError
from moco.methods.moco import MoCo
from moco.models.backbones import build_backbone
from moco.runs.checkpoint_files import read_checkpoint
from moco.weights.init_from import start_from
from moco.weights.loading import load_pretrained
from tests.segmentation.test_segment import composed, pretraining_checkpoint
from tests.weights.projects import (
    EMBEDDING_DIM,
    QUEUE_SIZE,
    assert_same,
    densecl,
    moby,
    moco_v1,
    moco_v2,
    notebook,
    prefixed,
    randomised,
    solo_learn,
    without_classifier,
)


def method(
    queue_size=QUEUE_SIZE,
    embedding_dim=EMBEDDING_DIM,
    num_queues=1,
    dense_weight=0.0,
    backbone=None,
    predictor=None,
    **projector,
):
    torch.manual_seed(7)
    return MoCo(
        backbone=backbone or {"name": "resnet18"},
        optimizer={"name": "sgd"},
        projector={"num_layers": 2} | projector,
        predictor=predictor or {"num_layers": 0},
        embedding_dim=embedding_dim,
        queue_size=queue_size,
        num_queues=num_queues,
        symmetric=num_queues == 2,
        dense_weight=dense_weight,
    )


def moby_method():
    heads = {"num_layers": 2, "hidden_dim": 64, "hidden_batch_norm": True}
    backbone = {"name": "swin_tiny_patch2", "window_size": [4, 4, 4, 2]}
    return method(num_queues=2, backbone=backbone, predictor=heads, **heads)


def started(content, tmp_path, **settings):
    """A new method from a file of this content, its first state, and what the log said."""
    path = tmp_path / "x.pth"
    torch.save(content, path)
    new = method(**settings)
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    logged = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(
        record.getMessage().removeprefix(f"init_from={path}: ")
    )
    logger = logging.getLogger("moco.weights.init_from")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        start_from(new, str(path))
    finally:
        logger.removeHandler(handler)
    return new.eval(), before, logged


def changed(new, before, part):
    return any(
        not torch.equal(x, before[name])
        for name, x in new.state_dict().items()
        if name.startswith(part)
    )


def test_a_run_starts_from_official_weights_with_key_encoder_and_queue(tmp_path):
    content, query, key = moco_v2()
    new, _, logged = started(content, tmp_path)
    assert_same(new.query_encoder, query, "embedding")
    assert_same(new.key_encoder, key, "embedding")
    torch.testing.assert_close(new.queue.keys, content["state_dict"]["module.queue"].T)
    assert (int(new.queue.pointer), int(new.queue.filled)) == (32, QUEUE_SIZE)
    assert logged == [
        "MoCo v1 or v2 (facebookresearch/moco); loaded: backbone (120), projector (4), key encoder's backbone (120), key "
        "encoder's projector (4), queue (3)"
    ]


@torch.no_grad()
def test_a_run_goes_on_from_the_official_notebooks_last_file(tmp_path):
    """All of it: backbone, key encoder, projector (its fc), queue."""
    content, query, key = notebook()
    backbone = {"name": "resnet18", "stem": "cifar"}
    new, _, logged = started(content, tmp_path, backbone=backbone, num_layers=1)
    assert logged == [
        "the CIFAR-10 notebook of MoCo (facebookresearch/moco, branch colab-notebook); loaded: backbone (120), projector "
        "(2), key encoder's backbone (120), key encoder's projector (2), queue (3)"
    ]
    images = torch.randn(4, 3, 32, 32)
    for encoder, model in ((new.query_encoder, query), (new.key_encoder, key)):
        torch.testing.assert_close(encoder.encode(images, "backbone"), model.net[:9](images))
        torch.testing.assert_close(encoder.encode(images, "embedding"), model(images))
    torch.testing.assert_close(new.queue.keys, content["state_dict"]["queue"].T)
    assert (int(new.queue.pointer), int(new.queue.filled)) == (16, QUEUE_SIZE)
    pretrained = load_pretrained(str(tmp_path / "x.pth"), "query", {})
    assert pretrained.settings == backbone
    assert pretrained.epoch == 200


def test_what_official_releases_lack_is_rebuilt_and_said(tmp_path):
    """The published files hold the query encoder alone."""
    content, query, _ = moco_v2()
    content["state_dict"] = {n: x for n, x in content["state_dict"].items() if "encoder_q" in n}
    new, before, logged = started(content, tmp_path)
    assert_same(new.query_encoder, query, "embedding")
    assert_same(new.key_encoder, query, "embedding")  # its BatchNorm statistics included
    assert not changed(new, before, "queue.")
    assert not any(parameter.requires_grad for parameter in new.key_encoder.parameters())
    assert logged[1:] == [
        "key encoder's backbone: not in the file; copied from the query encoder",
        "key encoder's projector: not in the file; copied from the query encoder",
        "queue: not in the file; starts as in a new run",
    ]


def test_parts_that_do_not_fit_are_rebuilt_and_said(tmp_path):
    """v1's head and another QUEUE_SIZE: the backbones alone are of use."""
    content, query, key = moco_v1()
    new, before, logged = started(content, tmp_path, queue_size=32)
    assert_same(new.query_encoder, without_classifier(query, "fc"), "backbone")
    assert_same(new.key_encoder, without_classifier(key, "fc"), "backbone")
    assert not changed(new, before, "query_encoder.projector.")
    assert not changed(new, before, "queue.")
    for mine, other in zip(
        new.key_encoder.projector.parameters(),
        new.query_encoder.projector.parameters(),
        strict=True,
    ):
        assert torch.equal(mine, other)
    assert logged[1] == (
        "projector: does not fit: 0.weight (512, 512) is missing, and 5 more differ; starts as in a new run"
    )
    assert logged[-1] == "not used: projector (2), key encoder's projector (2), queue (3)"
    _, before, logged = started(moco_v2()[0], tmp_path, queue_size=32)
    assert (
        logged[1]
        == "queue: does not fit: keys is (48, 16) and should be (32, 16); starts as in a new run"
    )


def test_the_backbone_has_to_fit(tmp_path):
    torch.save(moco_v2()[0], tmp_path / "x.pth")
    with pytest.raises(InputError) as error:
        start_from(method(backbone={"name": "resnet18", "stem": "cifar"}), str(tmp_path / "x.pth"))
    assert str(error.value) == (
        f"init_from={tmp_path / 'x.pth'}: its weights do not fit backbone=resnet18: conv1.weight is (64, 3, 7, 7) and should "
        "be (64, 3, 3, 3)"
    )


def test_two_queues_hold_the_views_that_they_are_for(tmp_path):
    """The first direction's negatives are the second view's keys, which solo-learn stores second and MoBY as queue2."""
    content, _, _ = solo_learn()
    new, _, _ = started(content, tmp_path, num_queues=2, hidden_dim=32)
    first, second = content["state_dict"]["queue"]
    torch.testing.assert_close(new.queue.keys, second.T)
    torch.testing.assert_close(new.reverse_queue.keys, first.T)
    assert int(new.queue.pointer) == int(new.reverse_queue.pointer) == 40

    content, query, _ = moby()
    backbone = {"name": "swin_tiny_patch2", "window_size": [4, 4, 4, 2]}
    heads = {"num_layers": 2, "hidden_dim": 64, "hidden_batch_norm": True}
    new, before, logged = started(
        content, tmp_path, num_queues=2, backbone=backbone, predictor=heads, **heads
    )
    torch.testing.assert_close(new.queue.keys, content["model"]["queue2"].T)
    torch.testing.assert_close(new.reverse_queue.keys, content["model"]["queue1"].T)
    assert_same(new.query_encoder, query, "embedding", 32)
    assert changed(new, before, "predictor.")
    assert len(logged) == 1


def test_the_dense_parts_are_taken(tmp_path):
    content, query, _ = densecl()
    new, _, logged = started(content, tmp_path, dense_weight=0.5, hidden_dim=32)
    dense_map = torch.randn(2, 512, 3, 3)
    with torch.no_grad():
        expected = query[1].mlp2(dense_map).flatten(2).transpose(1, 2)
        torch.testing.assert_close(
            new.query_encoder.dense_projector(dense_map).embeddings, expected
        )
    torch.testing.assert_close(new.dense_queue.keys, content["state_dict"]["queue2"].T)
    assert (int(new.queue.pointer), int(new.dense_queue.pointer)) == (8, 24)
    assert len(logged) == 1


def test_a_classifier_is_listed_as_not_used(tmp_path):
    _, _, logged = started(solo_learn()[0], tmp_path, hidden_dim=32)
    assert logged[-1] == "not used: reverse queue (3); classifier.weight, classifier.bias"


def method_of(config):
    return train.build_method(dataclasses.asdict(config))


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
    assert f"init_from={path}: backbone alone; loaded: backbone (72)" in caplog.messages
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
