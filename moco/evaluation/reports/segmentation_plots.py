"""Plots of a segmentation: images beside their masks and predictions, and the confused classes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from moco.data.files.written_files import SOFTWARE
from moco.data.sources.pixel_values import PixelValues
from moco.data.sources.source import classes_in_words
from moco.evaluation.reports.cards import (
    COMPARED_CLASSES,
    comparison_card,
    confusion_card,
    shown_name,
)
from moco.evaluation.reports.plots import pixels
from moco.segmentation.comparison_plot import class_colours, comparison_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAP = 12
"""White rows between two comparisons, px."""


def shown_names(class_names: Sequence[str]) -> list[str]:
    """Return the names of classes as plots can show them."""
    names = classes_in_words(class_names)
    return [shown_name(name, number) for number, name in enumerate(names)]


def compared_masks(
    image: Tensor,
    classes: Tensor,
    predicted: Tensor,
    names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    values: PixelValues | None,
    title: str = "",
) -> np.ndarray:
    """Return a plot (height, width, 3) uint8 of an image, its mask and a prediction.

    Args:
        image: (bands, height, width), normalised.
        classes: (height, width) class numbers; one without a name is no class.
        predicted: (height, width) class numbers.
        names: of the classes, from `shown_names`.
        mean, std: of the normalisation, per band.
        values: how the pixels of the image were made.
        title: a line above.
    """
    image = image.cpu() * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    image = image.clamp(0, 1)
    if values is not None and values.is_float:
        shown = values.shown(image.permute(1, 2, 0).numpy())
        image = torch.from_numpy(shown).permute(2, 0, 1) / 255
    classes, predicted = classes.cpu(), predicted.cpu()
    panels = comparison_plot(image, classes, predicted, len(names))
    seen = classes_in(torch.stack([classes, predicted]), names)
    return pixels(comparison_card(panels.permute(1, 2, 0).numpy(), seen, title))


def classes_in(numbers: Tensor, names: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Return the names and colours of the classes that have most pixels, by class number.

    Args:
        numbers: class numbers of pixels, of any shape; a number without a name is no class.
        names: of all classes.
    """
    num_pixels = numbers.flatten().clamp(max=len(names)).bincount(minlength=len(names) + 1)
    largest = num_pixels.argsort(descending=True, stable=True)[:COMPARED_CLASSES]
    colours = class_colours(len(names)).tolist()
    classes = []
    for number in sorted(largest.tolist()):
        if num_pixels[number] > 0:
            name = names[number] if number < len(names) else "no class"
            classes.append((name, colours[number]))
    return classes


def confused_pixels(names: Sequence[str], confusion: Tensor) -> "Figure":
    """Draw the confusion matrix of pixels.

    Args:
        names: of the classes, from `shown_names`.
        confusion: (classes, classes), see `moco.segmentation.metrics.confusion_matrix`.
    """
    return confusion_card(names, confusion.cpu().numpy(), "pixels")


def write_stacked(plots: Sequence[np.ndarray], file: BinaryIO) -> None:
    """Write plots (height, width, 3) uint8, one below the other, as one PNG."""
    width = max(plot.shape[1] for plot in plots)
    height = sum(plot.shape[0] for plot in plots) + GAP * (len(plots) - 1)
    sheet = np.full((height, width, 3), 255, np.uint8)
    top = 0
    for plot in plots:
        sheet[top : top + plot.shape[0], : plot.shape[1]] = plot
        top += plot.shape[0] + GAP
    mark = PngInfo()  # so that it is no image of a dataset
    mark.add_text("Software", SOFTWARE)
    Image.fromarray(sheet).save(file, format="PNG", pnginfo=mark)
