"""Test-time augmentation against scaling, mirroring and averaging by hand."""

import numpy as np
import torch
from PIL import Image

from moco.segmentation.averaged_views import mean_probabilities, resized


def leaning(images):
    """Logits that a mirrored image does not have mirrored."""
    columns = torch.linspace(-1, 1, images.shape[3])
    return torch.stack([images[:, 0], images[:, 0] * columns], dim=1)


def test_it_is_the_mean_over_all_scaled_and_mirrored_copies():
    images = torch.rand(2, 1, 12, 16)
    total = torch.zeros(2, 2, 12, 16)
    for height, width in ((6, 8), (12, 16), (18, 24)):
        scaled = resized(images, [height, width])
        plain = leaning(scaled).exp()
        mirrored = leaning(scaled[..., range(width - 1, -1, -1)]).exp()
        for scores in (plain, mirrored[..., range(width - 1, -1, -1)]):
            total += resized(scores / scores.sum(dim=1, keepdim=True), [12, 16])
    found = mean_probabilities(leaning, images, [0.5, 1.0, 1.5], flip=True)
    torch.testing.assert_close(found, total / 6)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(2, 12, 16))


def test_one_scale_without_mirroring_is_plain_softmax():
    images = torch.rand(1, 1, 5, 7)
    found = mean_probabilities(leaning, images, [1.0], flip=False)
    assert torch.equal(found, leaning(images).softmax(dim=1))


def test_a_symmetric_network_does_not_see_the_mirror():
    images = torch.rand(1, 3, 8, 8)
    plain = mean_probabilities(lambda x: x, images, [1.0], flip=False)
    torch.testing.assert_close(mean_probabilities(lambda x: x, images, [1.0], flip=True), plain)


def test_images_shrink_as_pillow_shrinks_them():
    image = np.random.default_rng(0).random((20, 30), dtype=np.float32)
    expected = Image.fromarray(image).resize((15, 10), Image.Resampling.BILINEAR)
    found = resized(torch.from_numpy(image)[None, None], [10, 15])[0, 0]
    np.testing.assert_allclose(found, np.asarray(expected), atol=1e-5)


def test_one_pixel_has_copies():
    found = mean_probabilities(leaning, torch.rand(1, 1, 1, 1), [0.5, 1.0, 3.0], flip=True)
    assert found.shape == (1, 2, 1, 1)
