"""Labelled patches and the votes of the nearest ones, against slow loops."""

import numpy as np
import pytest

from moco.evaluation.dense_bank import (
    Bank,
    class_shares,
    draw_patches,
    knn_scores,
    patches_represented,
)


def slow_shares(classes, grid, num_classes):
    """The class shares of the patches by looking at every pixel."""
    height, width = classes.shape
    num_rows, num_columns = grid
    counts = np.zeros((num_rows, num_columns, num_classes))
    for row, column in np.ndindex(height, width):
        label = classes[row, column]
        if label != 255:
            counts[row * num_rows // height, column * num_columns // width, label] += 1
    totals = counts.sum(axis=2, keepdims=True)
    return (counts / np.maximum(totals, 1)).reshape(-1, num_classes)


@pytest.mark.parametrize(("size", "grid"), [((8, 12), (2, 3)), ((11, 7), (3, 2)), ((3, 5), (4, 4))])
def test_shares_count_the_labelled_pixels_of_each_patch(size, grid, generator):
    classes = generator.choice([0, 1, 2, 255], size)
    shares = class_shares(classes, grid, 3, 255)
    np.testing.assert_allclose(shares, slow_shares(classes, grid, 3), rtol=1e-6)


def test_balanced_patches_take_turns_until_a_class_has_none_left(generator):
    labels = np.repeat([0, 3, 4], [50, 2, 20])
    drawn = draw_patches(labels, 12, "balanced", generator)
    assert len(set(drawn)) == 12
    assert np.bincount(labels[drawn], minlength=5).tolist() == [5, 0, 0, 2, 5]
    assert sorted(draw_patches(labels, 100, "balanced", generator)) == list(range(72))


def test_uniform_patches_have_the_frequency_of_their_class(generator):
    labels = np.repeat([0, 1], [90, 10])
    shares = []
    for _ in range(400):
        drawn = draw_patches(labels, 20, "uniform", generator)
        shares.append(labels[drawn].mean())
    assert np.mean(shares) == pytest.approx(0.1, abs=0.01)


def test_drawn_patches_together_represent_all_of_their_classes(generator):
    labels = generator.choice(5, 200, p=[0.6, 0.2, 0.1, 0.1, 0])
    drawn = draw_patches(labels, 17, "balanced", generator)
    weights = patches_represented(labels, drawn)
    represented = np.bincount(labels[drawn], weights, 5)
    np.testing.assert_allclose(represented, np.bincount(labels, minlength=5), rtol=1e-6)


def slow_scores(bank, queries, num_neighbors, temperature):
    """The scores of the queries by sorting the bank for each of them."""
    scores = []
    for query in queries.astype(float):
        similarities = []
        for row in bank.features.astype(float):
            similarities.append(query @ row / np.linalg.norm(query) / np.linalg.norm(row))
        nearest = np.argsort(similarities)[::-1][:num_neighbors]
        weights = np.exp(np.array(similarities)[nearest] / temperature)
        scores.append(weights @ bank.shares[nearest] / weights.sum())
    return np.array(scores)


def test_knn_scores_equal_those_of_a_slow_loop(generator):
    features = generator.normal(size=(40, 6)).astype(np.float32)
    queries = generator.normal(size=(9, 6)).astype(np.float32)
    shares = generator.dirichlet(np.ones(4), 40).astype(np.float32)
    bank = Bank(features, shares, np.ones(40, np.float32), np.zeros(40, np.int64))
    scores = knn_scores(bank, 7, 0.05, "cpu", queries)
    np.testing.assert_allclose(scores, slow_scores(bank, queries, 7, 0.05), rtol=1e-4, atol=1e-6)
