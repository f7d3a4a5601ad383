"""The moving average and its schedule against their formulas."""

import copy
import math

import pytest
import torch
from torch import nn

from moco.methods.momentum import key_momentum_at, update_key_encoder


def test_update_averages_every_parameter_and_leaves_buffers_alone():
    query = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    key = copy.deepcopy(query)
    for parameter in query.parameters():
        parameter.data.normal_()
    query[1].running_mean.fill_(7.0)
    expected = [
        0.9 * k + 0.1 * q for k, q in zip(key.parameters(), query.parameters(), strict=True)
    ]
    update_key_encoder(key, query, 0.9)
    for parameter, value in zip(key.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter, value)
    assert key[1].running_mean.tolist() == [0.0] * 4


@pytest.mark.parametrize(("key_momentum", "source"), [(1.0, "key"), (0.0, "query")])
def test_momentum_one_keeps_the_key_encoder_and_zero_copies_the_query_encoder(key_momentum, source):
    encoders = {"query": nn.Linear(3, 3), "key": nn.Linear(3, 3)}
    expected = copy.deepcopy(encoders[source].state_dict())
    update_key_encoder(encoders["key"], encoders["query"], key_momentum)
    for name, value in encoders["key"].state_dict().items():
        assert torch.equal(value, expected[name])


def test_constant_schedule_stays():
    assert key_momentum_at(70, 100, 0.99, 1.0, "constant") == 0.99


@pytest.mark.parametrize("step", [0, 1, 37, 99, 100])
def test_cosine_schedule_equals_byols_formula(step):
    expected = 1 - (1 - 0.99) * (math.cos(math.pi * step / 100) + 1) / 2
    assert key_momentum_at(step, 100, 0.99, 1.0, "cosine") == pytest.approx(expected, rel=1e-12)


def test_cosine_schedule_ends_where_it_is_told_to():
    assert key_momentum_at(100, 100, 0.99, 0.999, "cosine") == pytest.approx(0.999)
