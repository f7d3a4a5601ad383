"""Runs that start from a file of weights, ours or another project's."""

import copy
import dataclasses
import logging
from typing import NamedTuple

import pytest
import torch

from moco import train
from moco.cli import build_pretraining
from moco.errors import InputError
from moco.methods.moco import MoCo
from moco.models.backbones import build_backbone
from moco.runs.checkpoint_files import read_checkpoint
from moco.weights.init_from import start_from
from moco.weights.load_encoder import load_pretrained
from tests.configs import composed
from tests.segmentation.test_segment import pretraining_checkpoint
from tests.weights.projects import (
    EMBEDDING_DIM,
    PADS_OTHERWISE,
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
    solo_learn_on_cifar,
    without_classifier,
)

MOBY_HEADS = {"num_layers": 2, "hidden_dim": 64, "hidden_batch_norm": True}


def small_method(
    queue_size=QUEUE_SIZE,
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
        embedding_dim=EMBEDDING_DIM,
        queue_size=queue_size,
        num_queues=num_queues,
        symmetric=num_queues == 2,
        dense_weight=dense_weight,
    )


def moby_method():
    backbone = {"name": "swin_tiny_patch2", "window_size": [4, 4, 4, 2]}
    return small_method(num_queues=2, backbone=backbone, predictor=MOBY_HEADS, **MOBY_HEADS)


class Started(NamedTuple):
    """A method that started from a file, its state before that, and what the log said."""

    method: MoCo
    before: dict[str, torch.Tensor]
    logged: list[str]

    def has_changed(self, part):
        """Return whether a tensor of this part is another one than before."""
        for name, tensor in self.method.state_dict().items():
            if name.startswith(part) and not torch.equal(tensor, self.before[name]):
                return True
        return False


@pytest.fixture
def start(tmp_path, caplog):
    """Return a function that starts a method from a file with some content."""
    caplog.set_level(logging.INFO)

    def call(content, method=None, **settings):
        path = tmp_path / "x.pth"
        torch.save(content, path)
        if method is None:
            method = small_method(**settings)
        before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
        caplog.clear()
        start_from(method, str(path))
        logged = [message.removeprefix(f"init_from={path}: ") for message in caplog.messages]
        return Started(method.eval(), before, logged)

    return call


def query_encoder_alone(content):
    """Return a file as the MoCo authors published theirs."""
    state = {name: x for name, x in content["state_dict"].items() if "encoder_q" in name}
    return {"state_dict": state}


def test_a_run_starts_from_official_weights_with_key_encoder_and_queue(start):
    content, query, key = moco_v2()
    method, _, logged = start(content)
    assert_same(method.query_encoder, query, "embedding")
    assert_same(method.key_encoder, key, "embedding")
    torch.testing.assert_close(method.queue.keys, content["state_dict"]["module.queue"].T)
    assert (int(method.queue.pointer), int(method.queue.filled)) == (32, QUEUE_SIZE)
    assert logged == [
        "MoCo v1 or v2 (facebookresearch/moco); loaded: backbone (120), projector (4), "
        "key encoder's backbone (120), key encoder's projector (4), queue (3)"
    ]


@pytest.mark.slow
@torch.no_grad()
def test_a_run_starts_from_the_official_notebooks_last_file(start, tmp_path):
    """All parts are loaded: backbone, key encoder, projector (its fc) and queue."""
    content, query, key = notebook()
    backbone = {"name": "resnet18", "stem": "cifar"}
    method, _, logged = start(content, backbone=backbone, num_layers=1)
    assert logged == [
        "the CIFAR-10 notebook of MoCo (facebookresearch/moco, branch colab-notebook); "
        "loaded: backbone (120), projector (2), key encoder's backbone (120), "
        "key encoder's projector (2), queue (3)"
    ]
    images = torch.randn(4, 3, 32, 32)
    for encoder, model in ((method.query_encoder, query), (method.key_encoder, key)):
        torch.testing.assert_close(encoder.encode(images, "backbone"), model.net[:9](images))
        torch.testing.assert_close(encoder.encode(images, "embedding"), model(images))
    torch.testing.assert_close(method.queue.keys, content["state_dict"]["queue"].T)
    assert (int(method.queue.pointer), int(method.queue.filled)) == (16, QUEUE_SIZE)
    pretrained = load_pretrained(str(tmp_path / "x.pth"), "query", {})
    assert pretrained.settings == backbone
    assert pretrained.epoch == 200


def test_what_official_releases_lack_is_made_and_logged(start):
    content, query, _ = moco_v2()
    started = start(query_encoder_alone(content))
    method = started.method
    assert_same(method.query_encoder, query, "embedding")
    # The copy includes the statistics of BatchNorm.
    assert_same(method.key_encoder, query, "embedding")
    assert not started.has_changed("queue.")
    assert not any(parameter.requires_grad for parameter in method.key_encoder.parameters())
    assert started.logged[1:] == [
        "key encoder's backbone: not in the file; copied from the query encoder",
        "key encoder's projector: not in the file; copied from the query encoder",
        "queue: not in the file; starts as in a new run",
    ]


@pytest.mark.slow
def test_parts_that_do_not_fit_are_made_and_logged(start):
    """With v1's head, only the backbones are of use."""
    content, query, key = moco_v1()
    started = start(content)
    method = started.method
    assert_same(method.query_encoder, without_classifier(query, "fc"), "backbone")
    assert_same(method.key_encoder, without_classifier(key, "fc"), "backbone")
    assert not started.has_changed("query_encoder.projector.")
    assert not started.has_changed("queue.")
    own = method.query_encoder.projector.state_dict()
    for name, tensor in method.key_encoder.projector.state_dict().items():
        assert torch.equal(tensor, own[name])
    assert started.logged[1] == (
        "projector: does not fit: 0.weight (512, 512) is missing, and 5 more differ; "
        "starts as in a new run"
    )
    assert started.logged[-1] == "not used: projector (2), key encoder's projector (2), queue (3)"


@pytest.mark.slow
def test_a_queue_of_another_size_is_not_loaded(start):
    started = start(moco_v2()[0], queue_size=32)
    assert started.logged[1] == (
        "queue: does not fit: keys is (48, 16) and should be (32, 16); starts as in a new run"
    )


def test_the_backbone_has_to_fit(start, tmp_path):
    content = query_encoder_alone(moco_v2()[0])
    with pytest.raises(InputError) as error:
        start(content, backbone={"name": "resnet18", "stem": "cifar"})
    assert str(error.value) == (
        f"init_from={tmp_path / 'x.pth'}: its weights do not fit backbone=resnet18: "
        "conv1.weight is (64, 3, 7, 7) and should be (64, 3, 3, 3)"
    )


@pytest.mark.slow
def test_solo_learns_two_queues_hold_the_views_that_they_are_for(start):
    """The first direction's negatives are the second view's keys, which solo-learn stores second.

    With one queue, the other one is listed as not used, and so is the classifier.
    """
    content, _, _ = solo_learn()
    method, _, _ = start(content, num_queues=2, hidden_dim=32)
    first, second = content["state_dict"]["queue"]
    torch.testing.assert_close(method.queue.keys, second.T)
    torch.testing.assert_close(method.reverse_queue.keys, first.T)
    assert int(method.queue.pointer) == int(method.reverse_queue.pointer) == 40

    _, _, logged = start(content, hidden_dim=32)
    assert logged[-1] == "not used: reverse queue (3); classifier.weight, classifier.bias"


def test_mobys_two_queues_hold_the_views_that_they_are_for(start):
    """The first direction's negatives are the second view's keys, which MoBY stores as queue2."""
    content, query, _ = moby()
    started = start(content, moby_method())
    method = started.method
    torch.testing.assert_close(method.queue.keys, content["model"]["queue2"].T)
    torch.testing.assert_close(method.reverse_queue.keys, content["model"]["queue1"].T)
    assert_same(method.query_encoder, query, "embedding", 32)
    assert started.has_changed("predictor.")
    assert len(started.logged) == 1


@pytest.mark.slow
def test_the_dense_parts_are_loaded(start):
    content, query, _ = densecl()
    method, _, logged = start(content, dense_weight=0.5, hidden_dim=32)
    feature_map = torch.randn(2, 512, 3, 3)
    with torch.no_grad():
        expected = query[1].mlp2(feature_map).flatten(2).transpose(1, 2)
        cells = method.query_encoder.dense_projector(feature_map)
    torch.testing.assert_close(cells.embeddings, expected)
    torch.testing.assert_close(method.dense_queue.keys, content["state_dict"]["queue2"].T)
    assert (int(method.queue.pointer), int(method.dense_queue.pointer)) == (8, 24)
    assert len(logged) == 1


@pytest.mark.slow
def test_solo_learns_stem_has_to_be_given(start, caplog):
    content, query, _ = solo_learn_on_cifar()
    backbone = {"name": "resnet18", "stem": "solo_cifar"}
    method, _, _ = start(content, backbone=backbone, hidden_dim=32)
    assert_same(method.query_encoder, query, "backbone", 32)
    assert PADS_OTHERWISE not in caplog.text
    start(content, backbone={"name": "resnet18", "stem": "cifar"}, hidden_dim=32)
    assert PADS_OTHERWISE in caplog.text


def method_of(config):
    return build_pretraining.build_method(dataclasses.asdict(config))


def moby_config(hidden_dim):
    return [
        "backbone=resnet_tiny",
        "method=moby",
        "method.queue_size=48",
        "method.embedding_dim=16",
        f"method.predictor.hidden_dim={hidden_dim}",
    ]


def composed_method(*overrides):
    config = composed("train", "+experiment=quickstart", *overrides)
    return method_of(config)


def test_a_run_starts_from_a_checkpoint_of_ours_with_all_of_it(tmp_path):
    path = pretraining_checkpoint(tmp_path / "last.ckpt", *moby_config(hidden_dim=32))
    state = read_checkpoint(path)["state_dict"]
    method = composed_method(*moby_config(hidden_dim=32))
    start_from(method, str(path))
    for name, tensor in method.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_the_groups_of_another_dataset_are_not_loaded_with_its_keys(tmp_path):
    setting = "method.mask_own_group=true"
    path = pretraining_checkpoint(tmp_path / "last.ckpt", setting)
    content = torch.load(path)
    content["state_dict"]["queue.groups"].fill_(7)
    torch.save(content, path)
    method = composed_method("method.queue_size=48", "data.image_size=32", setting)
    start_from(method, str(path))
    assert torch.equal(method.queue.keys, content["state_dict"]["queue.keys"])
    assert (method.queue.groups == -1).all()


@pytest.mark.slow
def test_a_run_starts_from_a_checkpoint_of_ours_without_the_part_that_differs(tmp_path):
    path = pretraining_checkpoint(tmp_path / "last.ckpt", *moby_config(hidden_dim=32))
    state = read_checkpoint(path)["state_dict"]
    method = composed_method(*moby_config(hidden_dim=8))
    before = copy.deepcopy(method.state_dict())
    start_from(method, str(path))
    for name, tensor in method.state_dict().items():
        expected = before if name.startswith("predictor.") else state
        assert torch.equal(tensor, expected[name])


SHORT = [
    "+experiment=quickstart",
    "backbone=resnet_tiny",
    "method.queue_size=48",
    "data.batch_size=32",
    "trainer.max_steps=1",
    "trainer.accelerator=cpu",
    "evaluation.baselines=false",
    "evaluation.every_n_epochs=100",
    "optimizer.lr=1e-12",
    "optimizer.weight_decay=0",
]


@pytest.mark.slow
def test_init_from_is_read_by_a_new_run_and_not_by_one_that_continues(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    model = randomised(build_backbone("resnet_tiny", stem="cifar"))
    path = tmp_path / "x.pth"
    torch.save({"state_dict": prefixed(model.state_dict(), "module.backbone.")}, path)
    config = composed("train", *SHORT, f"init_from={path}")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    train.run(config, tmp_path / "run")
    assert f"init_from={path}: backbone alone; loaded: backbone (72)" in caplog.messages
    state = read_checkpoint(last)["state_dict"]
    backbone_file = torch.load(last.with_name("backbone.pth"), weights_only=True)
    assert backbone_file["step"] == 1
    for name, parameter in model.named_parameters():
        in_checkpoint = state[f"query_encoder.backbone.{name}"]
        in_backbone_file = backbone_file["state_dict"][name]
        for written in (in_checkpoint, in_backbone_file):
            torch.testing.assert_close(written, parameter.detach(), rtol=0, atol=1e-6)

    path.unlink()
    config.trainer.max_steps = 2
    train.run(config, tmp_path / "run")
    assert read_checkpoint(last)["global_step"] == 2
    backbone_file = torch.load(last.with_name("backbone.pth"), weights_only=True)
    assert backbone_file["step"] == 2
    with pytest.raises(InputError, match=f"init_from={path}: no such file"):
        train.run(config, tmp_path / "another")
    assert not (tmp_path / "another").exists()
