"""Near-duplicates are told from images that are merely similar, whatever the encoder."""

import numpy as np
import pytest

from moco.evaluation import near_duplicates
from moco.evaluation.near_duplicates import (
    COPY,
    near_duplicate_cosine,
    nearest_cosines,
    pairs_above,
)


def features_of(generator, common, num_images=400, num_copies=10, num_near=10):
    """Random images, of which the last ones are copies and near-duplicates of the first.

    `common` is the size of what all images share: with 10 all cosines are above 0.95.
    """
    images = generator.normal(size=(num_images, 64))
    copies = images[:num_copies]
    near = images[num_copies : num_copies + num_near]
    near = near + 0.02 * generator.normal(size=near.shape)
    return np.concatenate([images, copies, near]) + common


@pytest.mark.parametrize("common", [0.0, 1.0, 10.0])
def test_copies_and_near_duplicates_are_found_and_no_others(generator, common):
    features = features_of(generator, common)
    cosines = nearest_cosines(features)
    assert len(cosines) == len(features)
    threshold = near_duplicate_cosine(cosines)
    is_found = cosines > threshold
    assert is_found[:20].all()
    assert is_found[400:].all()
    assert not is_found[20:400].any()
    if common == 10.0:
        assert (cosines > 0.95).all()  # where a fixed threshold takes every image for a duplicate


def test_without_near_duplicates_nearly_nothing_is_found(generator):
    cosines = nearest_cosines(features_of(generator, 1.0, 1000, 0, 0))
    assert (cosines > near_duplicate_cosine(cosines)).mean() < 0.01


def test_copies_alone_and_a_few_images_have_the_threshold_of_copies():
    assert near_duplicate_cosine(np.ones(50)) == 1 - COPY
    assert near_duplicate_cosine(np.array([0.1, 0.5])) == 1 - COPY
    assert near_duplicate_cosine(np.full(50, 0.5)) == pytest.approx(0.75)  # twice as near


def test_of_many_images_some_are_searched(generator):
    assert len(nearest_cosines(generator.normal(size=(3000, 4)))) == 1000


def test_each_pair_is_listed_once_the_most_similar_first(generator, monkeypatch):
    features = features_of(generator, 1.0)
    pairs = pairs_above(features, near_duplicate_cosine(nearest_cosines(features)))
    assert sorted(pair[:2] for pair in pairs) == [(number, 400 + number) for number in range(20)]
    cosines = [pair[2] for pair in pairs]
    assert cosines == sorted(cosines, reverse=True)
    assert {pair[0] for pair in pairs[:10]} == set(range(10))  # the copies
    monkeypatch.setattr(near_duplicates, "MOST_PRODUCTS_OF_ALL", 1e6)
    assert pairs_above(features, 0.5) is None
