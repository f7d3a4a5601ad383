import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moco.methods.losses import info_nce


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def reference(query, key, negatives, temperature):
    """Equation 1 of arXiv 1911.05722, one query at a time in numpy; value and gradient with respect to the queries."""
    losses, gradients = [], []
    for q, k in zip(query, key, strict=True):
        candidates = np.vstack([k, negatives])
        weights = np.exp(candidates @ q / temperature)
        softmax = weights / weights.sum()
        losses.append(-np.log(softmax[0]))
        gradients.append((softmax @ candidates - k) / temperature)
    return np.mean(losses), np.array(gradients) / len(query)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
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
    assert info_nce(rows, rows, rows.repeat(25, 1), 0.07).item() == pytest.approx(math.log(101), rel=1e-6)


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
