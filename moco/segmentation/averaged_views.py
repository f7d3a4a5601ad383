"""Test-time augmentation: the mean over scaled and mirrored copies of an image."""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor


def mean_probabilities(
    predict: Callable[[Tensor], Tensor], images: Tensor, scales: Sequence[float], flip: bool
) -> Tensor:
    """Return the probability of each class at each pixel, the mean over copies of the images.

    Every copy is predicted, turned into probabilities by softmax, and brought back to the size and
    the orientation of the images. This is how segmentation benchmarks do it, as in PSPNet (arXiv
    1612.01105, section 5.1).

    Args:
        predict: returns logits (N, classes, height, width) for images (N, bands, height, width).
        images: (N, bands, height, width).
        scales: factors of height and width, above 0. Copies have at least one pixel a side.
        flip: also predict the mirror image of each copy.

    Returns:
        (N, classes, height, width) float32, which sum to 1 over the classes.
    """
    height, width = images.shape[-2:]
    total: Tensor | None = None
    num_copies = 0
    for scale in scales:
        size = [max(1, round(height * scale)), max(1, round(width * scale))]
        scaled = resized(images, size)
        copies = [predict(scaled).softmax(dim=1)]
        if flip:
            mirrored = predict(scaled.flip(-1)).softmax(dim=1)
            copies.append(mirrored.flip(-1))
        for probabilities in copies:
            probabilities = resized(probabilities, [height, width])
            total = probabilities if total is None else total + probabilities
            num_copies += 1
    assert total is not None
    return total / num_copies


def resized(images: Tensor, size: Sequence[int]) -> Tensor:
    """Return images (N, channels, height, width) in another size, bilinear and antialiased.

    Args:
        size: (height, width), px.
    """
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, list(size), mode="bilinear", align_corners=False, antialias=True)
