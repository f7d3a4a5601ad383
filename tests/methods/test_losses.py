"""The plain losses against the papers' equations in numpy."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moco.methods.blocked_loss import blocked_info_nce
from moco.methods.losses import (
    Groups,
    in_batch_info_nce,
    info_nce,
    matched_cells,
    most_similar_cells,
)


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def reference(query, key, negatives, temperature):
    """Equation 1 of arXiv 1911.05722 in numpy: the loss, and its gradient for each query."""
    losses = []
    gradients = []
    for q, k in zip(query, key, strict=True):
        candidates = np.vstack([k, negatives])
        weights = np.exp(candidates @ q / temperature)
        softmax = weights / weights.sum()
        losses.append(-np.log(softmax[0]))
        gradients.append((softmax @ candidates - k) / temperature)
    return np.mean(losses), np.array(gradients) / len(query)


def reference_without_own_group(query, key, negatives, temperature, groups, negative_groups):
    """`reference` for one query at a time, whose own group's negatives are not there at all."""
    losses = []
    gradients = []
    for row, group in enumerate(groups):
        others = [n for n, g in zip(negatives, negative_groups, strict=True) if g != group or g < 0]
        own = slice(row, row + 1)
        others = np.reshape(others, (-1, query.shape[1]))
        loss, gradient = reference(query[own], key[own], others, temperature)
        losses.append(loss)
        gradients.append(gradient[0])
    return np.mean(losses), np.array(gradients) / len(query)


@pytest.mark.parametrize("function", [info_nce, blocked_info_nce])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_negatives_of_the_own_group_count_as_absent(function, temperature):
    query, key, negatives = unit(6, 16), unit(6, 16), unit(50, 16)
    groups = torch.tensor([0, 1, 2, -1, 7, 3])  # none of group 7 among the negatives
    negative_groups = torch.arange(50) % 5 - 1  # -1, 0, 1, 2, 3
    expected = reference_without_own_group(
        *(rows.numpy() for rows in (query, key, negatives)),
        temperature,
        groups.tolist(),
        negative_groups.tolist(),
    )
    leaf = query.float().requires_grad_()
    both = Groups(groups, negative_groups)
    loss = function(leaf, key.float(), negatives.float(), temperature, both)
    loss.backward()
    assert loss.item() == pytest.approx(expected[0], rel=1e-5)
    np.testing.assert_allclose(leaf.grad.numpy(), expected[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("function", [info_nce, blocked_info_nce])
def test_queries_without_weight_count_as_absent(function):
    query, key, negatives = unit(6, 16), unit(6, 16), unit(50, 16)
    weights = torch.tensor([1.0, 0, 1, 1, 0, 1])
    counted = weights.bool().numpy()
    arrays = [rows.numpy() for rows in (query, key)]
    value, gradient = reference(*(rows[counted] for rows in arrays), negatives.numpy(), 0.2)
    leaf = query.float().requires_grad_()
    loss = function(leaf, key.float(), negatives.float(), 0.2, None, weights)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(leaf.grad[counted].numpy(), gradient, rtol=1e-3, atol=1e-6)
    assert (leaf.grad[~counted] == 0).all()
    none = function(leaf, key.float(), negatives.float(), 0.2, None, torch.zeros(6))
    assert none.item() == 0


@pytest.mark.parametrize("function", [info_nce, blocked_info_nce])
def test_a_query_whose_negatives_all_belong_to_its_group_has_no_loss(function):
    query, key, negatives = (unit(4, 8).float() for _ in range(3))
    query.requires_grad_()
    groups = Groups(torch.full((4,), 3), torch.full((4,), 3))
    loss = function(query, key, negatives, 0.2, groups)
    loss.backward()
    assert loss.item() == 0
    assert (query.grad == 0).all()


def test_in_a_batch_the_own_positive_is_never_left_out():
    query, keys = unit(3, 16), unit(6, 16)
    groups, key_groups = torch.tensor([4, 4, -1]), torch.tensor([4, 9, 4, 4, 4, -1])
    both = Groups(groups, key_groups)
    loss = in_batch_info_nce(query, keys, 0.2, rank=1, groups=both)
    # Of all six keys, the positives are rows 3, 4 and 5.
    losses = []
    for row, kept in enumerate([[1, 5], [1, 5], [0, 1, 2, 3, 4]]):
        rows = (query[row : row + 1], keys[row + 3 : row + 4], keys[kept])
        losses.append(reference(*(part.numpy() for part in rows), 0.2)[0])
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.024, 0.026, 0.07, 0.2, 1.0])
def test_value_and_gradient_equal_the_papers_equation(temperature):
    query, key, negatives = unit(6, 16), unit(6, 16), unit(50, 16)
    value, gradient = reference(query.numpy(), key.numpy(), negatives.numpy(), temperature)
    query = query.float().requires_grad_()
    loss = info_nce(query, key.float(), negatives.float(), temperature)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(query.grad.numpy(), gradient, rtol=1e-3, atol=1e-5)


def test_equal_similarities_give_log_of_one_plus_k():
    rows = F.normalize(torch.ones(4, 8), dim=1)
    loss = info_nce(rows, rows, rows.repeat(25, 1), 0.07)
    assert loss.item() == pytest.approx(math.log(101), rel=1e-6)


def test_perfect_match_at_low_temperature_gives_zero():
    query = torch.eye(4)
    assert info_nce(query, query, -query, 0.01).item() == pytest.approx(0.0, abs=1e-6)


def test_no_negatives_give_zero():
    query = unit(4, 8).float()
    assert info_nce(query, unit(4, 8).float(), torch.empty(0, 8), 0.2).item() == 0.0


def test_autocast_does_not_lower_the_precision():
    query, key, negatives = (unit(n, 32).float() for n in (8, 8, 64))
    expected = info_nce(query, key, negatives, 0.07)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(info_nce(query, key, negatives, 0.07), expected)
    expected = in_batch_info_nce(query, key, 0.07)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(in_batch_info_nce(query, key, 0.07), expected)


def in_batch_reference(query, keys, temperature, first=0):
    """Algorithm 1 of arXiv 2104.02057 in numpy, as `reference`. Query i has key `first` + i."""
    losses = []
    gradients = []
    for own, q in enumerate(query, start=first):
        weights = np.exp(keys @ q / temperature)
        softmax = weights / weights.sum()
        losses.append(-np.log(softmax[own]))
        gradients.append((softmax @ keys - keys[own]) / temperature)
    return np.mean(losses), np.array(gradients) / len(query)


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_in_batch_value_and_gradient_equal_the_papers_algorithm(temperature, rank):
    query, keys = unit(5, 16), unit(15, 16)
    value, gradient = in_batch_reference(query.numpy(), keys.numpy(), temperature, first=5 * rank)
    query = query.float().requires_grad_()
    loss = in_batch_info_nce(query, keys.float(), temperature, rank)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(query.grad.numpy(), gradient, rtol=1e-3, atol=1e-6)


def test_in_batch_loss_of_one_pair_is_zero_and_of_equal_ones_log_m():
    rows = F.normalize(torch.ones(8, 4), dim=1)
    assert in_batch_info_nce(rows[:1], rows[:1], 0.2).item() == 0.0
    loss = in_batch_info_nce(rows[:4], rows, 0.2, rank=1)
    assert loss.item() == pytest.approx(math.log(8), rel=1e-6)


def dense_reference(query, key, query_features, key_features, negatives, temperature):
    """DenseCL (arXiv 2011.09157, section 3) in numpy, cell by cell: loss and gradients."""
    losses = []
    gradient = np.zeros_like(query)
    for image in range(len(query)):
        for cell in range(query.shape[1]):
            feature = query_features[image, cell]
            similarities = []
            for other in key_features[image]:
                cosine = other @ feature / np.linalg.norm(other) / np.linalg.norm(feature)
                similarities.append(cosine)
            positive = key[image, int(np.argmax(similarities))]
            row = query[image, cell][None]
            value, slope = reference(row, positive[None], negatives, temperature)
            losses.append(value)
            gradient[image, cell] = slope[0]
    return np.mean(losses), gradient / len(losses)


@pytest.mark.parametrize("temperature", [0.1, 0.2])
def test_dense_value_and_gradient_equal_the_papers_equations(temperature):
    query, key, negatives = unit(3, 6, 16), unit(3, 6, 16), unit(20, 16)
    features = [torch.randn(3, 6, 8, dtype=torch.float64) for _ in range(2)]
    arrays = [tensor.numpy() for tensor in (query, key, *features, negatives)]
    value, gradient = dense_reference(*arrays, temperature)
    query = query.float().requires_grad_()
    query_features, key_features = (F.normalize(each, dim=-1).float() for each in features)
    matches = most_similar_cells(query_features, key_features)
    assert matches.shape == (3, 6)
    assert len(matches.unique()) > 2
    positives = matched_cells(key.float(), matches).flatten(0, 1)
    loss = info_nce(query.flatten(0, 1), positives, negatives.float(), temperature)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(query.grad.numpy(), gradient, rtol=1e-3, atol=1e-6)


def test_cells_that_moved_are_found_again():
    features = unit(2, 9, 32)
    moved = torch.stack([torch.randperm(9), torch.randperm(9)])
    key_features = torch.stack([features[0, moved[0]], features[1, moved[1]]])
    matches = most_similar_cells(features, key_features)
    assert torch.equal(matches.gather(1, moved), torch.arange(9).expand(2, 9))
