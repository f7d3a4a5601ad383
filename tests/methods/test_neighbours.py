"""Nearest neighbours as extra positives, against a slow form in numpy."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from moco.errors import InputError
from moco.methods import blocked_loss
from moco.methods.losses import Groups, info_nce
from moco.methods.moco import MoCo
from moco.methods.neighbours import nearest_rows, neighbour_info_nce
from moco.models.encoder import Encoded
from tests.methods.test_losses import reference, unit
from tests.processes import on_two


def nearest_in_numpy(key, negatives, num_neighbours):
    """The rows of the most similar negatives of each key, by sorting all of them."""
    return np.argsort(-(key @ negatives.T), axis=1)[:, :num_neighbours]


def reference_with_neighbours(query, key, negatives, num_neighbours, temperature, own=None):
    """Both terms and their gradients, query by query, each positive beside what is left.

    Args:
        own: (N, K) bool, the negatives of a query's own group.
    """
    terms = []
    gradients = []
    for row, nearest in enumerate(nearest_in_numpy(key, negatives, num_neighbours)):
        is_left = np.ones(len(negatives), bool)
        is_left[nearest] = False
        if own is not None:
            is_left &= ~own[row]
        one = slice(row, row + 1)
        values = []
        slopes = []
        for positive in [key[row], *negatives[nearest]]:
            value, slope = reference(query[one], positive[None], negatives[is_left], temperature)
            values.append(value)
            slopes.append(slope[0])
        terms.append((values[0], np.mean(values[1:])))
        gradients.append((slopes[0], np.mean(slopes[1:], axis=0)))
    return np.mean(terms, axis=0), np.array(gradients).transpose(1, 0, 2) / len(query)


def terms_and_gradients(query, key, negatives, num_neighbours, temperature, groups=None):
    """The same of ours."""
    key, negatives = key.float(), negatives.float()
    neighbours = nearest_rows(key, negatives, num_neighbours)
    values = []
    gradients = []
    for place in range(2):
        leaf = query.clone().float().requires_grad_()
        terms = neighbour_info_nce(leaf, key, negatives, neighbours, temperature, groups)
        terms[place].backward()
        values.append(terms[place].item())
        gradients.append(leaf.grad.numpy())
    return values, gradients


# A processor takes the blocked form, but not at the lowest temperatures.
@pytest.mark.parametrize(("temperature", "is_plain"), [(0.024, True), (0.07, False), (0.2, False)])
@pytest.mark.parametrize("num_neighbours", [1, 4])
def test_both_terms_and_their_gradients_equal_the_formula(temperature, is_plain, num_neighbours):
    query, key, negatives = unit(6, 16), unit(6, 16), unit(50, 16)
    assert is_plain == blocked_loss.is_plain_form_better(query, negatives, temperature)
    arrays = [rows.numpy() for rows in (query, key, negatives)]
    expected = reference_with_neighbours(*arrays, num_neighbours, temperature)
    values, gradients = terms_and_gradients(query, key, negatives, num_neighbours, temperature)
    np.testing.assert_allclose(values, expected[0], rtol=1e-5)
    np.testing.assert_allclose(gradients, expected[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("rows", "block"), [(1024, 2**20), (1024, 64), (4, 50), (1, 7), (3, 3)])
def test_blocks_of_any_size_give_the_same(rows, block, monkeypatch):
    query, key, negatives = unit(7, 16), unit(7, 16), unit(50, 16)
    own = np.zeros((7, 50), bool)
    own[0, :20] = own[3, 40:] = True
    groups = Groups(torch.tensor([1, -1, -1, 2, -1, 5, -1]), torch.zeros(50, dtype=torch.long) - 1)
    groups.negatives[:20] = 1
    groups.negatives[40:] = 2
    arrays = [rows.numpy() for rows in (query, key, negatives)]
    expected = reference_with_neighbours(*arrays, 3, 0.2, own)
    monkeypatch.setattr(blocked_loss, "MOST_QUERIES_PER_BLOCK", rows)
    monkeypatch.setattr(blocked_loss, "LOGITS_PER_BLOCK_ON_CPU", max(block, 7))
    values, gradients = terms_and_gradients(query, key, negatives, 3, 0.2, groups)
    np.testing.assert_allclose(values, expected[0], rtol=1e-5)
    np.testing.assert_allclose(gradients, expected[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.02, 0.2])
def test_a_query_without_any_negatives_has_no_loss_and_no_gradient(temperature):
    query, key, negatives = unit(4, 8), unit(4, 8), unit(9, 8)
    groups = Groups(torch.full((4,), 3), torch.full((9,), 3))
    values, gradients = terms_and_gradients(query, key, negatives, 2, temperature, groups)
    assert values == [0, 0]
    assert not np.any(gradients)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("temperature", [0.02, 0.2])
def test_a_value_that_is_not_finite_makes_a_term_nan(temperature, where, bad):
    tensors = [unit(7, 16), unit(7, 16), unit(50, 16)]
    tensors[where][3, 2] = bad
    values, _ = terms_and_gradients(*tensors, 4, temperature)
    assert not np.isfinite(values).all()


def test_equal_similarities_give_the_logarithm_of_one_and_the_negatives_that_are_left():
    rows = F.normalize(torch.ones(4, 8), dim=1)
    values, _ = terms_and_gradients(rows, rows, rows.repeat(25, 1), 10, 0.07)
    assert values == pytest.approx([math.log(91)] * 2, rel=1e-6)


def test_autocast_does_not_lower_the_precision():
    query, key, negatives = (unit(n, 32).float() for n in (8, 8, 64))
    neighbours = nearest_rows(key, negatives, 3)
    expected = neighbour_info_nce(query, key, negatives, neighbours, 0.07)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nearest_rows(key, negatives, 3), neighbours)
        terms = neighbour_info_nce(query, key, negatives, neighbours, 0.07)
    assert all(map(torch.equal, terms, expected))


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made inside."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (list, tuple)) else [output]:
            if isinstance(tensor, torch.Tensor) and not function.is_view:
                self.bytes = max(self.bytes, tensor.nbytes)
        return output


def test_no_tensor_is_larger_than_a_block_of_logits():
    query, key, negatives = unit(300, 4).float(), unit(300, 4).float(), unit(20_000, 4).float()
    with LargestTensor() as made:
        neighbours = nearest_rows(key, negatives, 5)
        terms = neighbour_info_nce(query.requires_grad_(), key, negatives, neighbours, 0.2)
        terms.weighted_mean(0.5).backward()
    assert made.bytes <= 4 * blocked_loss.LOGITS_PER_BLOCK_ON_CPU


# In the method.

METHOD = {"queue_size": 12, "embedding_dim": 8, "temperature": 0.2, "neighbours": 3}


def method_of(**settings):
    torch.manual_seed(0)
    return MoCo("resnet_tiny", **METHOD | settings)


def filled(method, num_keys):
    """The method with so many real keys in each queue."""
    for queue in method.queues:
        queue.enqueue(unit(num_keys, 8).float(), None if queue.groups is None else torch.arange(12))
    return method


def step_on(method, queries, keys, **batch):
    """A training step in which the encoders give these."""
    method.encode_queries = lambda views: [Encoded(query) for query in queries[: len(views)]]
    method.encode_keys = lambda views: [Encoded(key) for key in keys[: len(views)]]
    return method.training_step(SimpleNamespace(views=(None, None), **batch), 0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"neighbours_weight": 0.2},
        {"symmetric": True},
        {"symmetric": True, "num_queues": 2, "symmetric_reduction": "mean", "loss_times_2t": True},
    ],
    ids=str,
)
def test_a_step_is_the_formula_for_each_direction_and_its_queue(settings):
    method = filled(method_of(**settings), 12)
    queries, keys = unit(2, 5, 8), unit(2, 5, 8)
    queues = [queue.keys.double().numpy().copy() for queue in method.queues]
    weight = settings.get("neighbours_weight", 0.5)
    expected = []
    for query, key, queue in zip(queries.numpy(), keys.numpy(), queues, strict=False):
        terms, _ = reference_with_neighbours(query, key, queue, 3, 0.2)
        expected.append((1 - weight) * terms[0] + weight * terms[1])
    value = sum(expected)
    if "loss_times_2t" in settings:
        value = 2 * 0.2 * np.mean(expected)
    outputs = step_on(method, queries.float(), keys.float())
    assert float(outputs["loss"]) == pytest.approx(value, rel=1e-5)
    assert float(outputs["loss_key"]) == pytest.approx(terms[0], rel=1e-5)
    assert float(outputs["loss_neighbours"]) == pytest.approx(terms[1], rel=1e-5)


def test_a_neighbour_of_the_own_group_is_a_positive_and_the_others_of_it_count_as_absent():
    method = filled(method_of(mask_own_group=True), 12)
    query, key = unit(5, 8), unit(5, 8)
    queue = method.queue.keys.double().numpy().copy()
    groups = torch.tensor([3, 0, -1, 99, 11])
    own = groups.numpy()[:, None] == np.arange(12)
    terms, _ = reference_with_neighbours(query.numpy(), key.numpy(), queue, 3, 0.2, own)
    outputs = step_on(method, query[None].float(), key[None].float(), groups=groups)
    assert float(outputs["loss"]) == pytest.approx(np.mean(terms), rel=1e-5)


@pytest.mark.parametrize("queue_start", ["random", "empty"])
def test_there_are_no_neighbours_until_the_queue_is_full_of_real_keys(queue_start):
    method = filled(method_of(queue_start=queue_start), 7)
    query, key = unit(2, 5, 8).float()
    negatives = method.queue.negatives()
    outputs = step_on(method, query[None], key[None])
    assert "loss_neighbours" not in outputs
    assert outputs["loss"].item() == pytest.approx(info_nce(query, key, negatives, 0.2).item())
    assert method.loss_of_chance(12) == pytest.approx(math.log(10))  # that step has filled it
    assert "loss_neighbours" in step_on(method, query[None], key[None])


@pytest.mark.slow
def test_the_neighbours_of_a_run_begin_with_their_epoch(runner):
    steps = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            steps.append((trainer.current_epoch, "loss_neighbours" in outputs))

    settings = ["method.neighbours=2", "method.neighbours_from_epoch=1", "data.batch_size=512"]
    runner.fit(runner.config(*settings, "trainer.max_steps=-1", "trainer.max_epochs=2"), [Watch()])
    assert {epoch for epoch, _ in steps} == {0, 1}
    assert all(has_neighbours == (epoch == 1) for epoch, has_neighbours in steps)


def test_without_neighbours_a_full_queue_gives_the_plain_loss():
    method = filled(method_of(neighbours=0), 12)
    query, key = unit(2, 5, 8).float()
    negatives = method.queue.negatives()
    outputs = step_on(method, query[None], key[None])
    expected = blocked_loss.efficient_info_nce(query, key, negatives, 0.2)
    assert torch.equal(outputs["loss"], expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"negatives": "batch", "queue_size": None},
            "method.neighbours=3: neighbours are looked for in a queue, and method.negatives=batch "
            "has none; expected 0, or method.negatives=queue",
        ),
        (
            {"queue_size": 3},
            "method.neighbours=3: a queue of method.queue_size=3 keys leaves no negatives; "
            "expected at most 2",
        ),
    ],
)
def test_neighbours_that_no_queue_has_are_named(settings, expected):
    with pytest.raises(InputError) as error:
        method_of(**settings)
    assert str(error.value) == expected


def same_on_both(rank):
    """Each of two devices looks for its neighbours in the keys of both."""
    from moco.training.distributed.collectives import all_gather

    method = filled(method_of(queue_size=10), 10)
    queries, keys = unit(2, 5, 8), unit(2, 5, 8)
    queue = method.queue.keys.double().numpy().copy()
    terms, _ = reference_with_neighbours(queries[rank].numpy(), keys[rank].numpy(), queue, 3, 0.2)
    outputs = step_on(method, queries[rank][None].float(), keys[rank][None].float())
    assert float(outputs["loss"]) == pytest.approx(np.mean(terms), rel=1e-5)
    torch.testing.assert_close(method.queue.keys, keys.flatten(0, 1).float())
    one, other = all_gather(method.queue.keys[None])
    assert torch.equal(one, other)


@pytest.mark.slow
def test_two_devices_find_neighbours_in_one_queue():
    on_two(same_on_both)
