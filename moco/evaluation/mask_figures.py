"""The figures of masks that are on the disk, against the true masks of their images."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moco.data.files.encoded_image import NO_LIMIT
from moco.data.files.images import read_mask
from moco.phases import counted
from moco.segmentation.masked_images import MaskedImages
from moco.segmentation.metrics import confusion_matrix

PIXELS_AT_ONCE = 2**22


def confusion_of_files(
    images: MaskedImages,
    predicted_file: Callable[[str], Path],
    num_classes: int,
    ignore_index: int,
) -> tuple[Tensor, int]:
    """Compare predicted masks with the true ones.

    The files are read and not the predictions, so a prediction that was interrupted and resumed has
    the figures of one that was not.

    Args:
        images: with their true masks.
        predicted_file: the file of the predicted mask, by the name of the image. An image without
            one is left out.
        num_classes: of the model.
        ignore_index: the number of pixels that have no class.

    Returns:
        The confusion matrix (num_classes, num_classes) int64 over all pixels, and the number of
        images.
    """
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    num_measured = 0
    for index in counted(range(len(images)), "measuring", len(images)):
        path = predicted_file(images.name(index))
        if not path.exists():
            continue
        num_measured += 1
        predicted = torch.from_numpy(read_mask(str(path), NO_LIMIT))
        limit = images.masks.max_image_pixels
        classes = torch.from_numpy(read_mask(images.masks.name(index), limit))
        height, width = classes.shape
        # The matrix of many pixels at once takes several times their memory.
        rows_at_once = max(1, PIXELS_AT_ONCE // width)
        for top in range(0, height, rows_at_once):
            rows = slice(top, top + rows_at_once)
            confusion += confusion_matrix(
                predicted[rows].long()[None], classes[rows].long()[None], num_classes, ignore_index
            )
    return confusion, num_measured
