"""The change of a Swin's windows after pretraining, and which window fits other images."""

import math
from collections.abc import Sequence

from torch import nn

from moco.errors import InputError
from moco.models.swin.backbone import MAX_WINDOW_SIZE, Swin, map_sides, windows_of


def rewindow(backbone: nn.Module, window_size: int | Sequence[int]) -> nn.Module:
    """Change the attention windows of a Swin in place, and return it.

    With position_bias ``log_cpb`` (Swin V2) or ``linear_cpb`` the position MLP stays, and so does
    the pretraining window that normalises its coordinates. So the biases of all offsets that both
    windows have stay the same. With ``table`` (Swin V1) the tables are resized bicubically.

    Args:
        backbone: a `Swin`.
        window_size: the new side, cells: one number, or one for each stage.

    Raises:
        InputError: the backbone has no windows, or the window is no whole number from 1 to
            `MAX_WINDOW_SIZE`.
    """
    if not isinstance(backbone, Swin):
        raise InputError(
            f"backbone.window_size={window_size}: this backbone has no attention windows"
        )
    backbone.set_windows(windows_of("window_size", window_size))
    return backbone


class WindowSuggestion:
    """A window for images of another size, and what it does to the four stages' maps.

    Attributes:
        window_size: cells.
        image_size: px.
        maps: side of the maps, cells.
        padded: side of the same maps with their padding, cells.
        padding: cells of padding per real cell, over all stages.
    """

    def __init__(self, window_size: int, image_size: int, patch_size: int = 4) -> None:
        self.window_size = window_size
        self.image_size = image_size
        self.maps = map_sides(image_size, patch_size)
        self.padded = []
        num_cells = 0
        num_padded_cells = 0
        for side in self.maps:
            window = min(window_size, side)
            padded = -(-side // window) * window
            self.padded.append(padded)
            num_cells += side**2
            num_padded_cells += padded**2
        self.padding = num_padded_cells / num_cells - 1

    def __str__(self) -> str:
        changes = []
        for side, padded in zip(self.maps, self.padded, strict=True):
            if side == padded:
                changes.append(str(side))
            else:
                changes.append(f"{side} to {padded}")
        return (
            f"window {self.window_size} for {self.image_size} px: the four maps are padded "
            f"{', '.join(changes)} ({self.padding:.1%} more cells)"
        )


def suggest_window(
    image_size: int,
    pretrained_window_size: int,
    pretrained_image_size: int | None = None,
    patch_size: int = 4,
) -> WindowSuggestion:
    """Return the window for images of another size.

    It covers the share of the image that the pretraining window covered, give or take a tenth. Of
    these windows it is the one with the least padding. All position biases get the same suggestion.
    What a change of the window does to them depends on their kind, see `rewindow`.

    Args:
        image_size: side of the new images, px.
        pretrained_window_size: side of the pretraining window, cells.
        pretrained_image_size: side of the pretraining images, px. None: the size whose last map is
            a single window, which is 224 px for window 7 and 256 px for window 8.
        patch_size: px.
    """
    if pretrained_image_size is None:
        pretrained_image_size = pretrained_window_size * patch_size * 8
    same_share = pretrained_window_size * image_size / pretrained_image_size
    smallest = max(1, math.floor(same_share * 0.9))
    smallest = min(smallest, MAX_WINDOW_SIZE)
    largest = min(math.ceil(same_share * 1.1), MAX_WINDOW_SIZE)

    def cost(suggestion: WindowSuggestion) -> tuple[float, float]:
        # Rounded, so that windows of equal padding are equal. The nearest of them is taken.
        return round(suggestion.padding, 9), abs(suggestion.window_size - same_share)

    suggestions = []
    for window in range(smallest, largest + 1):
        suggestions.append(WindowSuggestion(window, image_size, patch_size))
    return min(suggestions, key=cost)


def clipped_in_words(backbone: nn.Module, image_size: int, what: str) -> str:
    """Return in which stages the windows are larger than the map, or nothing.

    Args:
        backbone: any backbone; only a Swin has windows.
        image_size: side of the images, px.
        what: these images in words, such as ``crops of 32 px``.
    """
    if not isinstance(backbone, Swin):
        return ""
    stages, cells = [], []
    sides = map_sides(backbone.cells(image_size), patch_size=1)
    for number, (side, window) in enumerate(zip(sides, backbone.window_size, strict=True), start=1):
        if side < window:
            stages.append(str(number))
            cells.append(str(side))
    if not stages:
        return ""
    maps, each = ("maps of stages", "each") if len(stages) > 1 else ("map of stage", "it")
    small = f"{maps} {joined(stages)} ({joined(cells)} cells wide)"
    return f"larger than the {small} for {what}: {each} is one window"


def joined(parts: Sequence[str]) -> str:
    """Return parts as an enumeration: ``2, 3 and 4``."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def fitting_window(image_size: int, window_size: int, patch_size: int = 4) -> WindowSuggestion:
    """Return the window of about the same size with the least padding, for a new pretraining.

    Args:
        image_size: side of the images, px.
        window_size: side of the window that it replaces, cells. It may be up to 40 % smaller or
            larger.
        patch_size: px.
    """

    def cost(suggestion: WindowSuggestion) -> tuple[float, int]:
        return round(suggestion.padding, 3), abs(suggestion.window_size - window_size)

    smallest = max(2, math.ceil(0.6 * window_size))
    largest = min(math.floor(1.4 * window_size), MAX_WINDOW_SIZE)
    windows = {window_size, *range(smallest, largest + 1)}
    suggestions = [WindowSuggestion(window, image_size, patch_size) for window in sorted(windows)]
    return min(suggestions, key=cost)
