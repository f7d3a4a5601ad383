"""The blocked form of InfoNCE against the plain one, and the rule that picks one of them."""

import math
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moco.methods import blocked_loss
from moco.methods.blocked_loss import (
    blocked_info_nce,
    efficient_info_nce,
)
from moco.methods.losses import Groups, info_nce
from tests.methods.test_losses import reference, unit


def value_and_gradient(
    function, query, key, negatives, temperature, groups=None, dtype=torch.float32
):
    """The loss and its gradient with respect to the queries, both in float64."""
    leaf = query.clone().to(dtype).requires_grad_()
    options = {} if groups is None else {"groups": groups}
    value = function(leaf, key.to(dtype), negatives.to(dtype), temperature, **options)
    (3 * value).backward()
    return value.detach().double(), leaf.grad.double() / 3


@pytest.fixture
def plain_in_double(monkeypatch):
    """Lets the plain form compute in float64, as a reference that is more exact."""

    def compute(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            return value_and_gradient(info_nce, *arguments, dtype=torch.float64)

    return compute


@pytest.mark.parametrize("temperature", [0.026, 0.07, 0.2, 1.0])
def test_value_and_gradient_equal_the_papers_equation(temperature):
    query, key, negatives = unit(6, 16), unit(6, 16), unit(50, 16)
    expected = reference(query.numpy(), key.numpy(), negatives.numpy(), temperature)
    value, gradient = value_and_gradient(blocked_info_nce, query, key, negatives, temperature)
    assert value.item() == pytest.approx(expected[0], rel=1e-5)
    np.testing.assert_allclose(gradient.numpy(), expected[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("rows", "block"), [(1024, 2**20), (1024, 64), (4, 50), (1, 7), (3, 3)])
def test_blocks_of_any_size_equal_the_plain_form(rows, block, monkeypatch, plain_in_double):
    monkeypatch.setattr(blocked_loss, "MOST_QUERIES_PER_BLOCK", rows)
    monkeypatch.setattr(blocked_loss, "LOGITS_PER_BLOCK_ON_CPU", block)
    rows = unit(7, 16), unit(7, 16), unit(50, 16), 0.2
    blocked = value_and_gradient(blocked_info_nce, *rows)
    torch.testing.assert_close(blocked, plain_in_double(*rows), rtol=1e-6, atol=1e-6)


def test_own_groups_are_left_out_of_blocks_of_any_size(monkeypatch, plain_in_double):
    monkeypatch.setattr(blocked_loss, "MOST_QUERIES_PER_BLOCK", 3)
    monkeypatch.setattr(blocked_loss, "LOGITS_PER_BLOCK_ON_CPU", 33)
    groups = Groups(torch.arange(7) - 1, torch.arange(50) % 9 - 1)
    rows = unit(7, 16), unit(7, 16), unit(50, 16), 0.2
    blocked = value_and_gradient(partial(blocked_info_nce, groups=groups), *rows)
    plain = plain_in_double(*rows, groups)
    torch.testing.assert_close(blocked, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [1e-3, 1e-2])
def test_a_low_temperature_does_not_overflow(temperature, plain_in_double):
    query, key, negatives = unit(7, 16), unit(7, 16), unit(50, 16)
    negatives[20], negatives[40] = query[0], -query[1]
    rows = query, key, negatives, temperature
    stable = value_and_gradient(efficient_info_nce, *rows)
    torch.testing.assert_close(stable, plain_in_double(*rows), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("function", [blocked_info_nce, info_nce])
def test_a_value_that_is_not_finite_makes_the_loss_nan(function, where, bad):
    tensors = [unit(7, 16), unit(7, 16), unit(50, 16)]
    tensors[where][3, 2] = bad
    value, gradient = value_and_gradient(function, *tensors, 0.2)
    assert not value.isfinite()
    assert not gradient.isfinite().all()


def test_no_negatives_give_zero():
    query, key = unit(4, 8).float(), unit(4, 8).float()
    assert blocked_info_nce(query, key, torch.empty(0, 8), 0.2).item() == 0.0


def test_the_negatives_may_change_before_the_backward_pass():
    query, key, negatives = (unit(count, 8).float() for count in (4, 4, 9))
    _, expected = value_and_gradient(blocked_info_nce, query, key, negatives, 0.2)
    leaf = query.clone().requires_grad_()
    loss = blocked_info_nce(leaf, key, negatives, 0.2)
    negatives.zero_()
    loss.backward()
    torch.testing.assert_close(leaf.grad.double(), expected)


def test_autocast_does_not_lower_the_precision():
    query, key, negatives = (unit(n, 32).float() for n in (8, 8, 64))
    expected = blocked_info_nce(query, key, negatives, 0.07)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(blocked_info_nce(query, key, negatives, 0.07), expected)


class LargestTensor(TorchDispatchMode):
    """Notes the elements of the largest tensor that is made inside."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and not function.is_view:
            self.elements = max(self.elements, output.numel())
        return output


@pytest.mark.parametrize(
    ("num_queries", "num_negatives"), [(300, 20_000), (2_000, 3_000), (4, 400_000)]
)
def test_no_tensor_is_larger_than_a_block_of_logits(num_queries, num_negatives):
    query, key = unit(num_queries, 4).float(), unit(num_queries, 4).float()
    negatives = unit(num_negatives, 4).float()
    with LargestTensor() as made:
        blocked_info_nce(query.requires_grad_(), key, negatives, 0.2).backward()
    assert made.elements <= blocked_loss.LOGITS_PER_BLOCK_ON_CPU


def test_without_a_gradient_the_value_is_the_same():
    query, key, negatives = (unit(count, 16).float() for count in (7, 7, 50))
    query.requires_grad_()
    with torch.no_grad():
        value = blocked_info_nce(query, key, negatives, 0.2)
    with_gradient = blocked_info_nce(query, key, negatives, 0.2)
    assert torch.equal(value, with_gradient.detach())
    assert not value.requires_grad
    assert with_gradient.requires_grad


def test_a_second_derivative_is_refused():
    query = unit(4, 8).float().requires_grad_()
    loss = blocked_info_nce(query, unit(4, 8).float(), unit(9, 8).float(), 0.2)
    (gradient,) = torch.autograd.grad(loss, query, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


def called_form(query, key, negatives):
    """Which form `efficient_info_nce` calls."""
    with (
        mock.patch.object(blocked_loss, "info_nce", return_value="plain"),
        mock.patch.object(blocked_loss, "blocked_info_nce", return_value="blocked"),
    ):
        return efficient_info_nce(query, key, negatives, 0.2)


@pytest.mark.parametrize(
    ("device", "num_queries", "num_negatives", "form"),
    [
        ("cpu", 2, 4, "blocked"),
        ("meta", 256, 65_536, "plain"),
        ("meta", 4_096, 65_536, "blocked"),
    ],
)
def test_a_cpu_and_many_logits_take_the_blocked_form(device, num_queries, num_negatives, form):
    """The meta device stands for a GPU."""
    query = torch.empty(num_queries, 8, device=device)
    negatives = torch.empty(num_negatives, 8, device=device)
    assert called_form(query, query, negatives) == form
