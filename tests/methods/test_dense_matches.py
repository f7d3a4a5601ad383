"""Matches by location against a search over all cells, and the dense term that uses them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import moco
from moco.errors import InputError
from moco.methods.dense_matches import cells_at_the_same_place
from moco.models.encoder import Encoded
from moco.models.heads import Cells
from tests.methods.test_losses import reference, unit

LOCATION = ["method.dense_weight=0.5", "method.dense_match=location"]
IDENTITY = [[1.0, 0, 0], [0, 1, 0]]


def random_placements(generator, number):
    """Crops of many sizes, mirrored and turned."""
    placements = []
    for _ in range(number):
        width, height = generator.uniform(0.15, 0.9, 2)
        left = generator.uniform(0, 1 - width)
        top = generator.uniform(0, 1 - height)
        crop = np.array([[width, 0, left], [0, height, top], [0, 0, 1]])
        mirror = np.array([[-1, 0, 1], [0, 1, 0], [0, 0, 1]])
        turn = np.array([[0, -1, 1], [1, 0, 0], [0, 0, 1]])
        view = crop
        if generator.random() < 0.5:
            view = view @ mirror
        if generator.random() < 0.5:
            view = view @ turn
        placements.append(view[:2])
    return np.array(placements)


def searched(query, key, rows, columns):
    """For each cell of a query the nearest cell of its key, measured in cells of the key.

    It is a match if it is at most half a cell away in both directions.
    """
    middles = []
    for row in range(rows):
        for column in range(columns):
            middles.append(((column + 0.5) / columns, (row + 0.5) / rows, 1))
    found = []
    for of_query, of_key in zip(query, key, strict=True):
        right = of_key[:, 0] / columns  # one cell of the key to the right, in the image
        down = of_key[:, 1] / rows
        for middle in middles:
            place = of_query @ middle
            distances = []
            for other in middles:
                away = place - of_key @ other
                cells = [away @ right / (right @ right), away @ down / (down @ down)]
                distances.append(np.abs(cells).max())
            nearest = int(np.argmin(distances))
            found.append((nearest, distances[nearest] <= 0.5))
    return found


@pytest.mark.parametrize(("rows", "columns"), [(7, 7), (3, 5)])
def test_a_cell_matches_the_nearest_cell_where_the_crops_overlap(rows, columns, generator):
    query, key = random_placements(generator, 10), random_placements(generator, 10)
    arguments = [torch.from_numpy(each).float() for each in (query, key)]
    matches = cells_at_the_same_place(*arguments, rows, columns)
    expected = searched(query, key, rows, columns)
    has_match = [is_match for _, is_match in expected]
    assert matches.has_match.flatten().tolist() == has_match
    assert 0.1 < np.mean(has_match) < 0.9
    for ours, (theirs, is_match) in zip(matches.cells.flatten().tolist(), expected, strict=True):
        if is_match:
            assert ours == theirs


def test_equal_crops_match_cell_by_cell_and_mirrored_ones_from_the_other_side():
    same = torch.tensor([IDENTITY])
    mirrored = torch.tensor([[[-1.0, 0, 1], [0, 1, 0]]])
    assert cells_at_the_same_place(same, same, 2, 3).cells.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert cells_at_the_same_place(same, mirrored, 2, 3).cells.tolist() == [[2, 1, 0, 5, 4, 3]]


def dense_method(rule, **settings):
    torch.manual_seed(0)
    sizes = {"embedding_dim": 16, "queue_size": 24, "batch_norm": "plain"}
    return moco.MoCo("resnet_tiny", dense_weight=0.5, dense_match=rule, **sizes, **settings)


def random_cells(number, leaf=False):
    embeddings, features = unit(number, 4, 16).float(), unit(number, 4, 8).float()
    pooled = F.normalize(embeddings.mean(1), dim=1)
    return Cells(embeddings.requires_grad_(leaf), pooled, features)


def dense_loss(method, query, key, placements):
    embedding = unit(len(query.pooled), 16).float()
    encoded = [[Encoded(embedding, cells)] for cells in (query, key)]
    return method.dense_losses(*encoded, placements=placements)[0]


LEFT = [[0.5, 0, 0], [0, 1, 0]]
RIGHT = [[0.5, 0, 0.5], [0, 1, 0]]


def test_pairs_without_overlap_count_for_nothing():
    method = dense_method("location")
    query, key = random_cells(2, leaf=True), random_cells(2)
    negatives = method.dense_queue.negatives().numpy()
    # The first pair has equal crops, the second one has no place in common.
    placements = torch.tensor([IDENTITY, LEFT]), torch.tensor([IDENTITY, RIGHT])
    loss = dense_loss(method, query, key, placements)
    loss.backward()
    arrays = [cells.embeddings[0].detach().numpy().astype(float) for cells in (query, key)]
    value, gradient = reference(*arrays, negatives, method.temperature)
    assert loss.item() == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(query.embeddings.grad[0].numpy(), gradient, rtol=1e-3, atol=1e-6)
    assert (query.embeddings.grad[1] == 0).all()


def test_a_batch_without_any_overlap_has_a_loss_of_zero():
    method = dense_method("location")
    query, key = random_cells(2, leaf=True), random_cells(2)
    placements = torch.tensor([LEFT, LEFT]), torch.tensor([RIGHT, RIGHT])
    loss = dense_loss(method, query, key, placements)
    loss.backward()
    assert loss.item() == 0
    assert (query.embeddings.grad == 0).all()


def test_both_is_the_mean_of_the_two_rules():
    query, key = random_cells(3), random_cells(3)
    placements = torch.tensor([IDENTITY, LEFT, RIGHT]), torch.tensor([LEFT, IDENTITY, RIGHT])
    values = {}
    for rule in ("feature", "location", "both"):
        values[rule] = float(dense_loss(dense_method(rule), query, key, placements))
    assert values["feature"] != values["location"]
    mean = (values["feature"] + values["location"]) / 2
    assert values["both"] == pytest.approx(mean, rel=1e-6)


def test_the_second_direction_exchanges_the_views():
    method = dense_method("location", symmetric=True)
    first, second = random_cells(1), random_cells(1)
    # Half of the whole image's cells lie in its left half, and all cells of the half match.
    placements = torch.tensor([IDENTITY]), torch.tensor([LEFT])
    embedding = unit(1, 16).float()
    queries = [Encoded(embedding, first), Encoded(embedding, second)]
    losses = method.dense_losses(queries, queries[::-1], placements=placements)
    alone = dense_loss(dense_method("location"), second, first, placements[::-1])
    assert float(losses[1]) == pytest.approx(float(alone), rel=1e-6)
    assert float(losses[0]) != pytest.approx(float(losses[1]), rel=1e-3)


@pytest.mark.parametrize("rule", ["location", "both"])
def test_a_batch_without_placements_is_told(rule):
    method = dense_method(rule)
    batch = SimpleNamespace(views=torch.randn(2, 2, 3, 32, 32))
    with pytest.raises(InputError, match=r"dense_match=.*do not say where.*a field placements"):
        method.training_step(batch, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dense_match": "location"}, r"dense_match=location: there is no dense term"),
        ({"dense_match": "place", "dense_weight": 0.5}, "expected both, feature, location"),
    ],
)
def test_contradicting_switches_are_told(settings, message):
    with pytest.raises(InputError, match=message):
        moco.MoCo("resnet_tiny", queue_size=16, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["batch", "worker"])
def test_a_run_learns_from_places(engine, runner):
    settings = [*LOCATION, "method.symmetric=true", "trainer.accumulate_grad_batches=2"]
    options = [f"data.engine={engine}", "data.image_size=32"]
    weights = []
    for rule in ("location", "feature"):
        config = runner.config(*settings, *options, f"method.dense_match={rule}")
        method = runner.fit(config)
        weights.append(method.query_encoder.dense_projector.layers[0].weight)
        assert weights[-1].isfinite().all()
    assert not torch.equal(*weights)
