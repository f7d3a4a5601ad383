"""The linear head on patches against scikit-learn, and the choice of its weight decay."""

import numpy as np
import torch
import torch.nn.functional as F

from moco.evaluation.dense_bank import Bank
from moco.evaluation.dense_linear import DEFAULT_WEIGHT_DECAY, WEIGHT_DECAYS, fit, fit_best


def test_the_linear_head_is_scikit_learns_logistic_regression(generator):
    from sklearn.linear_model import LogisticRegression

    features = generator.normal(3, [1, 5, 0.1, 2], (300, 4)).astype(np.float32)
    noise = generator.normal(size=300)
    labels = (features[:, 0] + features[:, 1] / 5 + noise > 3.6).astype(int)
    labels += features[:, 2] > 3.1
    weights = generator.uniform(0.5, 2, 300).astype(np.float32)
    shares = F.one_hot(torch.from_numpy(labels)).float()
    head = fit(torch.from_numpy(features), shares, torch.from_numpy(weights), 0.01)
    standardised = (features - features.mean(0)) / features.std(0)
    other = LogisticRegression(C=1 / (0.01 * weights.sum()), tol=1e-8, max_iter=1000)
    other.fit(standardised, labels, weights)
    ours = torch.from_numpy(head.scores(features)).softmax(dim=1).numpy()
    np.testing.assert_allclose(ours, other.predict_proba(standardised), atol=2e-3)


def one_hot(labels):
    return np.eye(2, dtype=np.float32)[labels]


def test_the_weight_decay_is_chosen_on_images_that_the_head_was_not_fitted_to(generator):
    features = generator.normal(size=(600, 200)).astype(np.float32)
    noise = one_hot(generator.integers(0, 2, 600))
    signal = one_hot((features[:, 0] > 0).astype(int))
    ten_images = np.arange(600) // 60 * 7
    one_image = np.zeros(600, np.int64)
    ones = np.ones(600, np.float32)
    _, weight_decay = fit_best(Bank(features, noise, ones, ten_images))
    assert weight_decay == max(WEIGHT_DECAYS)
    _, weight_decay = fit_best(Bank(features[:, :1], signal, ones, ten_images))
    assert weight_decay == min(WEIGHT_DECAYS)
    _, weight_decay = fit_best(Bank(features, noise, ones, one_image))
    assert weight_decay == DEFAULT_WEIGHT_DECAY
