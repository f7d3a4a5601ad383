"""Images with masks that tests of dense evaluation draw, and a backbone that sees their colours."""

import numpy as np
import torch.nn.functional as F
from torch import nn

from moco.data.augment.views import Normalized
from moco.evaluation.dense_features import DenseSet
from moco.segmentation.mask_sources import build_segmentation_source
from tests.segmentation.shapes import save

COLOURS = np.array([(90, 90, 90), (220, 40, 40), (40, 40, 220)], np.uint8)


class MeanColours(nn.Module):
    """A backbone whose maps are the mean colours of squares of 2, 4, 4 and 8 px."""

    feature_map_strides = (2, 4, 4, 8)

    def feature_maps(self, images):
        return [F.avg_pool2d(images, stride) for stride in self.feature_map_strides]


def draw_halves(root, sizes, num_val=3, ignored_rows=0):
    """Draw images whose left and right halves have two of three colours, which are the classes.

    Args:
        sizes: height and width of each image, px. The first `num_val` are held out.
        ignored_rows: upper rows without a class.

    Returns:
        The folder.
    """
    generator = np.random.default_rng(1)
    for number, (height, width) in enumerate(sizes):
        part = "val" if number < num_val else "train"
        mask = np.zeros((height, width), np.uint8)
        column = generator.integers(width // 4, 3 * width // 4)
        mask[:, :column] = number % 3
        mask[:, column:] = (number + 1) % 3
        noise = generator.integers(-9, 10, (height, width, 3))
        image = (COLOURS[mask].astype(int) + noise).astype(np.uint8)
        mask[:ignored_rows] = 255
        save(root / "images" / part / f"{number:02}.png", image)
        save(root / "masks" / part / f"{number:02}.png", mask)
    return root


def dense_set(root, **settings):
    """A small set of the images in a folder."""
    defaults = {
        "image_size": 24,
        "maps": [2],
        "bank_size": 300,
        "sampling": "balanced",
        "seed": 0,
        "batch_size": 4,
    }
    source = build_segmentation_source("segmentation_folder", str(root))
    normalize = Normalized([0.5, 0.5, 0.5], [0.25, 0.25, 0.25])
    return DenseSet(source, normalize, **(defaults | settings))
