"""Local crops as queries, against the papers' equations."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import moco
import moco.methods.moco
from moco.cli.checks import check_local_crops
from moco.data.augment.local_crops import LocalCrops
from moco.errors import InputError, Interrupted
from moco.models.encoder import Encoded
from moco.train import run
from moco.training.distributed.collectives import all_gather
from tests.methods.test_losses import in_batch_reference, reference, unit
from tests.processes import on_two
from tests.runs.test_resume import assert_same_end, interrupt_at, last

SIZES = {"embedding_dim": 16, "batch_norm_splits": 2}


def built(backbone="resnet_tiny", count=2, **settings):
    torch.manual_seed(0)
    if settings.get("negatives") != "batch":
        settings.setdefault("queue_size", 24)
    return moco.MoCo(backbone, local_crops=count, **SIZES, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"symmetric": True, "symmetric_reduction": "mean"},
        {"negatives": "batch", "queue_size": None, "symmetric": True, "loss_times_2t": True},
    ],
    ids=["queue", "symmetric", "batch"],
)
def test_every_query_of_an_image_counts_the_same(settings):
    method = built(**settings)
    queries, keys, crops = unit(2, 6, 16), unit(2, 6, 16), unit(2, 6, 16)
    leaves = [rows.float().requires_grad_() for rows in (*queries, *crops)]
    num_directions = 1 + method.symmetric

    method.encode_queries = lambda views: [Encoded(leaf) for leaf in leaves[: len(views)]]
    method.encode_local_queries = lambda batch: leaves[2:]
    method.encode_keys = lambda views: [Encoded(rows.float()) for rows in keys[: len(views)]]
    negatives = None
    if method.queue is not None:
        negatives = method.queue.negatives().double().numpy()
    outputs = method.training_step(SimpleNamespace(views=("full", "full")), 0)
    outputs["loss"].backward()

    value = 0.0
    gradients = np.zeros((4, 6, 16))
    factor = 1 / 3  # of three queries
    if settings.get("symmetric_reduction") == "mean":
        factor /= 2
    if method.hparams["loss_times_2t"]:
        factor *= 2 * method.temperature
    for direction in range(num_directions):
        key = keys[direction].numpy()
        for number in (direction, 2, 3):
            rows = (*queries, *crops)[number].numpy()
            if negatives is None:
                one, slope = in_batch_reference(rows, key, method.temperature)
            else:
                one, slope = reference(rows, key, negatives, method.temperature)
            value += factor * one
            gradients[number] += factor * slope
    assert outputs["loss"].item() == pytest.approx(value, rel=1e-5)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        ours = np.zeros((6, 16)) if leaf.grad is None else leaf.grad.numpy()
        np.testing.assert_allclose(ours, gradient, rtol=1e-3, atol=1e-6)
    mean = outputs["loss_full"] / 3 + 2 * outputs["loss_local"] / 3
    assert outputs["loss"].item() == pytest.approx(mean.item(), rel=1e-6)


def batch_of(count, side=32, local_side=16, number=4):
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(2, number, 3, side, side, generator=generator)
    crops = torch.randn(count, number, 3, local_side, local_side, generator=generator)
    return SimpleNamespace(views=views, local_crops=tuple(crops))


@pytest.mark.parametrize("mode", ["plain", "split"])
def test_batch_norm_sees_each_local_crop_alone_and_keeps_the_statistics_of_full_views(mode):
    batch = batch_of(2)
    methods = [built(count=2), built(count=0)]
    for method in methods:
        method.install_batch_norm(mode)
        torch.manual_seed(0)  # of the shuffled keys
        method.training_step(batch, 0)
    ours, plain = (dict(method.named_buffers()) for method in methods)
    for name, statistics in plain.items():
        if "running" in name:
            assert torch.equal(ours[name], statistics), name
    # The momentum is there again, and a local crop's embedding does not depend on the other one.
    with torch.no_grad():
        both = methods[0].encode_local_queries(batch)
        alone = built(count=1)
        alone.install_batch_norm(mode)
        one = alone.encode_local_queries(SimpleNamespace(local_crops=batch.local_crops[1:]))
    torch.testing.assert_close(both[1], one[0])


def test_local_crops_never_become_keys():
    method = built(count=3)
    method.install_batch_norm("plain")
    method.training_step(batch_of(3), 0)
    assert method.queue.num_filled == 4
    assert not method.has_one_view_per_encoder


@pytest.mark.parametrize(
    ("backbone", "settings"),
    [
        ("swin_v2_tiny_patch2", {}),
        ("vit_tiny_patch4", {"negatives": "batch", "queue_size": None, "symmetric": True}),
        ("resnet_tiny", {"dense_weight": 0.5}),
    ],
)
def test_every_backbone_takes_local_crops_beside_its_views(backbone, settings):
    method = built(backbone, **settings)
    outputs = method.training_step(batch_of(2, local_side=24), 0)
    outputs["loss"].backward()
    assert outputs["loss"].isfinite()
    for name, weight in method.query_encoder.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None, name
    if settings.get("dense_weight"):
        mixed = 0.5 * outputs["loss_global"] + 0.5 * outputs["loss_dense"]
        assert outputs["loss"].item() == pytest.approx(mixed.item(), rel=1e-6)


def test_the_dense_term_is_of_the_full_views_alone():
    method = built(dense_weight=0.5)
    sides = []
    projector = method.query_encoder.dense_projector
    projector.register_forward_pre_hook(lambda _, inputs: sides.append(inputs[0].shape[-1]))
    method.training_step(batch_of(2, local_side=24), 0)
    assert len(sides) == 1


class OneSize(torch.nn.Module):
    """A backbone with a position for each pixel of images of 32 px."""

    feature_dim = 3

    def __init__(self):
        super().__init__()
        self.positions = torch.nn.Parameter(torch.zeros(32, 32))

    def forward(self, images):
        return (images + self.positions).mean((2, 3))


def test_a_backbone_of_one_size_is_refused():
    from moco.data.augment.views import ViewPair

    crop = {"random_resized_crop": {"scale": [0.2, 1]}}
    augment = ViewPair(crop, image_size=32, local=LocalCrops(2))
    check_local_crops(torch.nn.Identity(), ViewPair(crop, image_size=32))
    with pytest.raises(InputError, match=r"^method\.local_crops=2: the backbone fails on two"):
        check_local_crops(OneSize(), augment)


def test_a_batch_without_its_local_crops_is_told():
    method = built(count=2)
    method.install_batch_norm("plain")
    batch = SimpleNamespace(views=torch.randn(2, 4, 3, 32, 32))
    with pytest.raises(InputError, match=r"local_crops=2: the batches have 0 local crops"):
        method.training_step(batch, 0)


BOTH = ["method.local_crops=2", "method.dense_weight=0.5", "method.dense_match=both"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["batch", "worker"])
def test_a_stopped_run_with_both_switches_ends_in_the_same_bits(
    engine, runner, tmp_path, monkeypatch
):
    config = runner.config(
        *BOTH,
        f"data.engine={engine}",
        "data.num_workers=1",
        "data.image_size=16",
        "data.batch_size=704",  # two steps an epoch
        "augmentation.start_image_size=8",
        "augmentation.image_size_step=8",
        "augmentation.ramp_epochs=1",
        "trainer.max_steps=-1",
        "method.queue_size=500",
        "evaluation.every_n_epochs=100",
    )
    run(config, tmp_path / "whole")
    for step in (1, 3):
        with monkeypatch.context() as context:
            interrupt_at(step, context)
            with pytest.raises(Interrupted):
                run(config, tmp_path / "parts")
    run(config, tmp_path / "parts")
    assert_same_end(last(tmp_path / "whole"), last(tmp_path / "parts"))


def half_of_a_step(rank):
    """Both switches on half a batch: loss and gradients are those of the whole batch."""
    batch = batch_of(2, local_side=24, number=8)
    whole = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    left = torch.tensor([[0.5, 0, 0], [0, 1, 0]])
    # The same number of matches in both halves, each of which takes its own mean.
    query = torch.stack([whole, left, left, whole] * 2)
    batch.placements = torch.stack([query, whole.expand(8, 2, 3)])
    own = slice(4 * rank, 4 * rank + 4)
    half = SimpleNamespace(
        views=batch.views[:, own],
        local_crops=tuple(crops[own] for crops in batch.local_crops),
        placements=batch.placements[:, own],
    )
    switches = {"dense_weight": 0.5, "dense_match": "both", "symmetric": True}
    backbone = {"name": "swin_v2_tiny_patch2", "stochastic_depth": 0.0}
    ours = built(backbone, **switches)
    loss = ours.training_step(half, 0)["loss"]
    loss.backward()
    alone = built(backbone, **switches)
    with one_process():
        expected = alone.training_step(batch, 0)["loss"]
    expected.backward()
    total = all_gather(loss.detach()[None]).mean()
    torch.testing.assert_close(total, expected.detach())
    weights = zip(ours.query_encoder.parameters(), alone.query_encoder.parameters(), strict=True)
    for own_weight, weight in weights:
        if weight.grad is not None:
            mean = all_gather(own_weight.grad[None]).mean(0)
            torch.testing.assert_close(mean, weight.grad, atol=1e-5, rtol=1e-3)
    for own_queue, queue in zip(ours.dense_queues, alone.dense_queues, strict=True):
        torch.testing.assert_close(own_queue.keys, queue.keys)


@contextmanager
def one_process():
    """Let the collectives see this process alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moco.methods.moco, "all_gather", lambda rows: rows)
        yield


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_double_batch():
    on_two(half_of_a_step)
