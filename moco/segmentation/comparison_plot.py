"""A plot of an image, its mask and a prediction side by side, as a tensor for TensorBoard."""

import colorsys
import math

import torch
from torch import Tensor

MAX_SIDE = 512  # px; a larger image is shown with every n-th pixel only
GAP = 2  # white columns between the parts
GOLDEN_SECTION = 0.61803
FIRST_HUE = 0.09  # orange


def class_colours(num_classes: int) -> Tensor:
    """Return a colour for each class, and grey for no class: (num_classes + 1, 3) uint8.

    Hues are a golden section apart, so that neighbouring classes differ. Class 0 is black, because
    it is often the background. Class 1 is orange, which shows on dark and on stained images.
    """
    colours = [(0.0, 0.0, 0.0)]
    for number in range(1, num_classes):
        hue = (FIRST_HUE + (number - 1) * GOLDEN_SECTION) % 1
        brightness = 1.0 if number % 2 == 1 else 0.65
        colours.append(colorsys.hsv_to_rgb(hue, 1.0, brightness))
    colours.append((0.5, 0.5, 0.5))
    return as_bytes(torch.tensor(colours))


def comparison_plot(image: Tensor, classes: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Return the image, the true classes and the predicted ones beside each other.

    Args:
        image: (3, height, width) in 0..1.
        classes: (height, width) class numbers; a number of `num_classes` or more is no class.
        predicted: (height, width) class numbers.

    Returns:
        (3, height, 3 * width + 4) uint8.
    """
    step = math.ceil(max(classes.shape) / MAX_SIDE)
    colours = class_colours(num_classes)
    image = image[:, ::step, ::step].cpu()
    gap = torch.full((3, image.shape[1], GAP), 255, dtype=torch.uint8)
    parts = [as_bytes(image)]
    for numbers in (classes, predicted):
        # Every number that is no class gets the last colour, the grey.
        shown = numbers[::step, ::step].cpu().clamp(max=num_classes)
        parts += [gap, colours[shown].permute(2, 0, 1)]
    return torch.cat(parts, dim=2)


def as_bytes(values: Tensor) -> Tensor:
    """Return values from 0 to 1 as uint8 from 0 to 255."""
    return (values * 255).round().to(torch.uint8)
