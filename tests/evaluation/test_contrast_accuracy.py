"""The share of queries that find their key, against plain loops over all similarities."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from moco.evaluation import contrast_accuracy as module
from moco.evaluation.contrast_accuracy import contrast_accuracy


def unit(rows, dim, generator):
    rows = torch.from_numpy(generator.normal(size=(rows, dim)).astype(np.float32))
    return normalize(rows, dim=1)


def by_loops(query, key, negatives, k, left_out):
    """The official accuracy: sort all 1 + K similarities of a query, look at the first k."""
    found = 0
    for row in range(len(query)):
        own = float(query[row] @ key[row])
        others = [
            float(query[row] @ negatives[column])
            for column in range(len(negatives))
            if not left_out[row, column]
        ]
        found += own in sorted([own, *others], reverse=True)[:k]
    return found / len(query)


@pytest.mark.parametrize("per_block", [7, 2**19])
@pytest.mark.parametrize("kind", ["queue", "groups", "batch", "batch of two devices"])
def test_it_is_the_share_of_keys_among_the_first(kind, per_block, generator, monkeypatch):
    monkeypatch.setattr(module, "SIMILARITIES_PER_BLOCK_ON_CPU", per_block)
    query = unit(6, 4, generator)
    key = normalize(query + 0.6 * unit(6, 4, generator), dim=1)
    negatives = unit(23, 4, generator)
    left_out = torch.zeros(6, 23, dtype=torch.bool)
    first_own_row, is_own_group = None, None
    if kind == "groups":
        left_out = torch.from_numpy(generator.random((6, 23)) < 0.3)

        def is_own_group(block):
            return left_out[:, block]

    elif kind != "queue":
        first_own_row = 0 if kind == "batch" else 6
        rows = torch.arange(6)
        negatives[first_own_row + rows] = key
        left_out[rows, first_own_row + rows] = True
    found = contrast_accuracy(query, key, negatives, (1, 5), first_own_row, is_own_group)
    expected = [by_loops(query, key, negatives, k, left_out) for k in (1, 5)]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert 0 < expected[0] < expected[1]


def test_neither_a_collapse_nor_nan_looks_right(generator):
    same = torch.ones(8, 4) / 2
    assert contrast_accuracy(same, same, torch.ones(30, 4) / 2).tolist() == [0, 0]
    lost = torch.full((8, 4), torch.nan)
    assert contrast_accuracy(lost, same, unit(30, 4, generator)).tolist() == [0, 0]
    assert contrast_accuracy(same, same, torch.full((30, 4), torch.nan)).tolist() == [0, 0]


def test_unrelated_embeddings_find_their_key_by_chance(generator):
    query, key, negatives = (unit(rows, 16, generator) for rows in (4000, 4000, 19))
    top1, top5 = contrast_accuracy(query, key, negatives).tolist()
    assert top1 == pytest.approx(1 / 20, abs=0.015)
    assert top5 == pytest.approx(5 / 20, abs=0.03)
