"""The pairs of views in TensorBoard are those that the model sees."""

import numpy as np
import torch

from moco.callbacks.view_pairs import as_shown
from moco.cli.build_pretraining import build_data


def test_views_are_shown_without_their_normalisation(runner):
    data = build_data(runner.config())
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    query = batch.views[0]
    mean, std = data.augment.mean[0], data.augment.std[0]
    shown = as_shown(data, query)
    assert (shown.shape, shown.dtype) == ((len(query), 16, 16, 3), np.uint8)
    expected = (query[0, 0] * std + mean).clamp(0, 1) * 255
    torch.testing.assert_close(
        torch.from_numpy(shown[0, :, :, 0]).float(), expected, rtol=0, atol=0.5001
    )


def test_the_first_pairs_are_those_of_the_first_batch(runner):
    data = build_data(runner.config())
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    query, key = data.pairs(data.first_images(3))
    torch.testing.assert_close(query, batch.views[0][:3])
    torch.testing.assert_close(key, batch.views[1][:3])
