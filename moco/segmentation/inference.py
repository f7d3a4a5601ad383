"""The class of every pixel of an image: the whole image at once, or a sliding window."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def predicted_logits(
    predict: Callable[[Tensor], Tensor], images: Tensor, inference: str, window: int
) -> Tensor:
    """Return the logits of every pixel, (N, classes, height, width).

    Args:
        predict: returns logits (N, classes, height, width) for images (N, 3, height, width).
        images: (N, 3, height, width).
        inference: ``whole``: predict the images as they are. ``slide``: predict square windows
            that overlap by a third.
        window: side of the windows, px.
    """
    if inference == "slide":
        stride = max(1, window * 2 // 3)
        return sliding_logits(predict, images, window, stride)
    return predict(images)


def predicted_classes(
    predict: Callable[[Tensor], Tensor], images: Tensor, inference: str, window: int
) -> Tensor:
    """Return the class of every pixel, (N, height, width) int64; see `predicted_logits`."""
    return predicted_logits(predict, images, inference, window).argmax(dim=1)


def sliding_logits(
    predict: Callable[[Tensor], Tensor], images: Tensor, window: int, stride: int
) -> Tensor:
    """Return logits (N, classes, height, width): the mean over all windows that hold a pixel.

    Args:
        predict, images: see `predicted_logits`.
        window: side of the square windows, px. A shorter side of the images is taken whole.
        stride: from one window to the next, px.
    """
    height, width = images.shape[-2:]
    total: Tensor | None = None
    counts = images.new_zeros(1, 1, height, width)
    for top in window_starts(height, window, stride):
        for left in window_starts(width, window, stride):
            rows, columns = slice(top, top + window), slice(left, left + window)
            logits = predict(images[..., rows, columns])
            if total is None:
                num_images, num_classes = logits.shape[:2]
                total = logits.new_zeros(num_images, num_classes, height, width)
            total[..., rows, columns] += logits
            counts[..., rows, columns] += 1
    assert total is not None
    return total / counts


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return where the windows begin that cover `length` pixels.

    Windows follow each other in steps of `stride`. The last one ends where the image ends.
    """
    # The last window is moved back until it ends with the image, so all windows have one size.
    last = max(length - window, 0)
    num_windows = math.ceil(last / stride) + 1
    return [min(number * stride, last) for number in range(num_windows)]
