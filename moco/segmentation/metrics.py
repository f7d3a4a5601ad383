"""Predictions for whole images and how right they are. Tensors in, numbers out.

Letters: N batch, C classes, H W pixels.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

Predict = Callable[[Tensor], Tensor]


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin that cover `length` pixels in steps of `stride`; the last one ends with the image."""
    last = max(length - window, 0)
    return [min(number * stride, last) for number in range(math.ceil(last / stride) + 1)]


def sliding_logits(predict: Predict, images: Tensor, window: int, stride: int) -> Tensor:
    """Logits (N, C, H, W) of images (N, 3, H, W), the mean over all windows that hold a pixel.

    Args:
        predict: images to logits.
        window: side of the square windows, px; a shorter side of the images is taken whole.
        stride: px from one window to the next.
    """
    height, width = images.shape[-2:]
    total: Any = 0.0
    counts = images.new_zeros(1, 1, height, width)
    for top in window_starts(height, window, stride):
        for left in window_starts(width, window, stride):
            rows, columns = slice(top, top + window), slice(left, left + window)
            logits = predict(images[..., rows, columns])
            if isinstance(total, float):
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[..., rows, columns] += logits
            counts[..., rows, columns] += 1
    return total / counts


@torch.no_grad()
def predicted_classes(predict: Predict, images: Tensor, inference: str, window: int) -> Tensor:
    """The class of every pixel, (N, H, W) int64.

    Args:
        predict: images to logits.
        inference: ``whole`` shows the images as they are; ``slide`` shows windows a third of which overlaps the next.
        window: side of the windows, px.
    """
    if inference == "slide":
        return sliding_logits(predict, images, window, max(1, window * 2 // 3)).argmax(dim=1)
    return predict(images).argmax(dim=1)


def confusion_matrix(
    predicted: Tensor, classes: Tensor, num_classes: int, ignore_index: int
) -> Tensor:
    """(C, C) int64: pixels of the class (row) that were predicted as a class (column).

    Args:
        predicted: (N, H, W), 0 to C - 1.
        classes: (N, H, W), 0 to C - 1 or `ignore_index`, which is left out.
    """
    return multiclass_confusion_matrix(
        predicted, classes, num_classes, ignore_index=ignore_index, validate_args=False
    )


def segmentation_figures(confusion: Tensor, class_names: Sequence[str]) -> dict[str, float | None]:
    """Fractions under the names of ``metrics.json``.

    ``segment/miou`` is the mean over classes of intersection over union; ``segment/iou/NAME`` is one class's, None if it is
    neither there nor predicted, and then it does not count into the mean. ``segment/pixel_accuracy`` is the share of
    pixels that are right.

    Args:
        confusion: (C, C), see `confusion_matrix`.
        class_names: C names.
    """
    right = confusion.diagonal().double()
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - confusion.diagonal()
    ious = [
        float(hits / pixels) if pixels else None
        for hits, pixels in zip(right, union.double(), strict=True)
    ]
    present = [iou for iou in ious if iou is not None]
    return {
        "segment/miou": sum(present) / len(present) if present else 0.0,
        "segment/pixel_accuracy": float(right.sum() / confusion.sum().clamp(min=1)),
        **{f"segment/iou/{name}": iou for name, iou in zip(class_names, ious, strict=True)},
    }


def class_colours(num_classes: int) -> Tensor:
    """A colour for each class, and grey for pixels without a class: (C + 1, 3) uint8.

    Hues a golden section apart, so that neighbours differ; class 0, often the background, is black.
    """
    hues = torch.arange(num_classes) * 0.61803 % 1
    bright = torch.where(torch.arange(num_classes) % 2 == 0, 1.0, 0.65)
    channels = [
        bright * (torch.cos(2 * math.pi * (hues - third / 3)) * 0.5 + 0.5) for third in range(3)
    ]
    colours = (torch.stack(channels, dim=1) * 255).round().to(torch.uint8)
    colours[0] = 0
    return torch.cat([colours, torch.full((1, 3), 128, dtype=torch.uint8)])


def comparison_plot(
    image: Tensor, classes: Tensor, predicted: Tensor, num_classes: int, largest_side: int = 512
) -> Tensor:
    """Image, truth and prediction side by side with two white columns between them: (3, H, 3 W + 4) uint8.

    Args:
        image: (3, H, W) in 0..1.
        classes: (H, W), 0 to C - 1, or any larger number where there is no class.
        predicted: (H, W), 0 to C - 1.
        largest_side: of larger images only every n-th pixel is shown.
    """
    step = math.ceil(max(classes.shape) / largest_side)
    image, classes, predicted = (
        shown[..., ::step, ::step] for shown in (image, classes, predicted)
    )
    colours = class_colours(num_classes)
    shown = [
        colours[torch.where(numbers < num_classes, numbers, num_classes)].permute(2, 0, 1)
        for numbers in (classes.cpu(), predicted.cpu())
    ]
    gap = torch.full((3, image.shape[1], 2), 255, dtype=torch.uint8)
    return torch.cat(
        [(image.cpu() * 255).round().to(torch.uint8), gap, shown[0], gap, shown[1]], dim=2
    )
