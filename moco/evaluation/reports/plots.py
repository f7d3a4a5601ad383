"""Plots of an evaluation, drawn by matplotlib: arrays and images in, a figure out.

A figure is made without pyplot, so no global state changes and no window opens. matplotlib is
imported when the first plot is drawn, because importing it takes half a second.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 100
"""Pixels per inch. Sizes below are in px; matplotlib takes inches."""
MARGIN = 6
"""Space around an image, in px."""
LINE = 14
"""Height of a caption, in px."""
FONT_SIZE = 8
"""In points: 11 px."""
RIGHT = "#007a3d"
WRONG = "#be1e1e"

NAMED_CLASSES = 30
"""A plot with more classes than this names only some of them."""
MATRIX_SIDE = (240, 900)
"""Smallest and largest side of a confusion matrix, in px."""
MAP_SIDE = 640
"""Side of a map of points, in px."""
MAPPED_SIDE = 112
"""Side of an image beside its feature maps, in px."""
LONGEST_NAME = 24
"""Letters of the name of a class; longer names are cut."""


@dataclass(frozen=True)
class Tile:
    """A square image with a caption below."""

    image: Image.Image
    caption: str
    color: str = "black"
    """Of the caption."""


def new_figure(
    width: float, height: float, layout: Literal["constrained"] | None = None
) -> "Figure":
    """Return an empty white figure of `width` x `height` px.

    Args:
        layout: ``constrained`` makes room for labels and legends.
    """
    from matplotlib.figure import Figure

    # matplotlib 3.9 rounds the size in px down, so 459.9999 would become 459.
    size = ((width + 0.01) / DPI, (height + 0.01) / DPI)
    return Figure(figsize=size, dpi=DPI, facecolor="white", layout=layout)


@cache
def has_glyph(letter: str) -> bool:
    """Return whether the font of the plots has this letter."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return get_font(findfont(FontProperties())).get_char_index(ord(letter)) != 0


def legible(name: str, most: int) -> str | None:
    """Return a name as matplotlib can draw it, cut to `most` letters; None if letters are missing.

    A dollar sign begins no formula.
    """
    shown = name
    if len(shown) > most:
        shown = shown[: most - 1] + "…"
    if not all(map(has_glyph, shown)):
        return None
    return shown.replace("$", r"\$")


def pixels(figure: "Figure") -> np.ndarray:
    """Draw the figure and return its pixels (height, width, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[:, :, :3]


def thumbnail(image: Image.Image, side: int) -> Image.Image:
    """Return the middle square of an image as RGB at `side` x `side` px.

    Images that are smaller are enlarged without smoothing, so that their pixels can be seen.
    """
    method = Image.Resampling.BICUBIC
    if min(image.size) < side:
        method = Image.Resampling.NEAREST
    return ImageOps.fit(image.convert("RGB"), (side, side), method)


def tile_plot(
    rows: Sequence[Sequence[Tile]],
    gap: int = 0,
    font_size: int = FONT_SIZE,
    caption_height: int = LINE,
    space: int = MARGIN,
) -> "Figure":
    """Draw tiles in rows, their images pixel by pixel.

    Args:
        rows: at least one tile in all; the images are squares of one size.
        gap: further space after the first tile of each row, in px.
        font_size: of the captions, in points.
        caption_height: room for a caption, in px.
        space: between the tiles of a row, in px.
    """
    side = rows[0][0].image.width
    column_width = side + space
    row_height = side + caption_height + MARGIN
    num_columns = max(len(tiles) for tiles in rows)
    width = MARGIN + num_columns * column_width + gap
    height = MARGIN + len(rows) * row_height
    figure = new_figure(width, height)
    for row, tiles in enumerate(rows):
        # matplotlib measures from the bottom left corner.
        bottom = height - MARGIN - row * row_height - side
        left = MARGIN
        for tile in tiles:
            figure.figimage(np.asarray(tile.image), left, bottom, origin="upper")
            figure.text(
                left / width,
                (bottom - caption_height / 2) / height,
                tile.caption,
                color=tile.color,
                fontsize=font_size,
                verticalalignment="center",
            )
            left += column_width
            if tile is tiles[0]:
                left += gap
    return figure


def feature_maps_plot(images: Sequence[Image.Image], maps: Mapping[str, np.ndarray]) -> "Figure":
    """Draw each image beside its feature maps, two images in a row.

    Args:
        images: at least one.
        maps: (images, height, width, 3) uint8, colours of all images' maps, by their caption. Each
            cell of a map is drawn as a square.
    """
    tiles = []
    for number, image in enumerate(images):
        tiles.append(Tile(thumbnail(image, MAPPED_SIDE), "image"))
        for name, colors in maps.items():
            tiles.append(Tile(thumbnail(Image.fromarray(colors[number]), MAPPED_SIDE), name))
    in_row = 2 * (1 + len(maps))
    rows = [tiles[start : start + in_row] for start in range(0, len(tiles), in_row)]
    return tile_plot(rows)


def similarity_histogram(positive: np.ndarray, negative: np.ndarray) -> "Figure":
    """Draw the histograms of the cosines of positive and of negative pairs.

    Each is divided by its highest bar, since there are many more negative pairs.

    Args:
        positive: (p,) cosines of two views of one image.
        negative: (n,) cosines of views of different images.
    """
    figure = new_figure(660, 320, "constrained")
    axes = figure.add_subplot()
    for name, values in (("negative", negative), ("positive", positive)):
        # Rounding may carry a cosine just over 1.
        counts, edges = np.histogram(np.clip(values, -1, 1), bins=80, range=(-1, 1))
        label = f"{name}: {len(values):,} pairs, mean {np.mean(values):.3f}"
        axes.stairs(counts / max(counts.max(), 1), edges, fill=True, alpha=0.6, label=label)
    axes.set_xlabel("cosine")
    axes.set_ylabel("share of the highest bar")
    axes.set_xlim(-1, 1)
    axes.set_ylim(0, 1)
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    return figure


def confusion_plot(classes: Sequence[object] | np.ndarray, counts: np.ndarray) -> "Figure":
    """Draw a confusion matrix: a cell is darker the larger its share of its row.

    Up to `NAMED_CLASSES` classes, every class is named and every count is written in its cell.

    Args:
        classes: (classes,) their names or numbers.
        counts: (classes, classes), rows the true class, columns the predicted one.
    """
    num_classes = len(counts)
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shares = counts / totals
    side = np.clip(34 * num_classes, *MATRIX_SIDE)
    figure = new_figure(side + 220, side + 140, "constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class", shrink=0.6)
    accuracy = np.trace(counts) / max(counts.sum(), 1)
    axes.set_title(f"{accuracy:.1%} of {counts.sum():,} queries right", fontsize=10)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    named = np.arange(num_classes)
    if num_classes <= NAMED_CLASSES:
        write_counts(axes, counts, shares)
    else:
        named = np.linspace(0, num_classes - 1, 10).astype(int)
    names = [str(classes[place]) for place in named.tolist()]
    axes.set_xticks(named, names, rotation=90, fontsize=FONT_SIZE)
    axes.set_yticks(named, names, fontsize=FONT_SIZE)
    return figure


def write_counts(axes: "Axes", counts: np.ndarray, shares: np.ndarray) -> None:
    """Write the counts that are not 0 into their cells, legible on the cell's shade."""
    for row, column in np.argwhere(counts):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(
            column,
            row,
            str(counts[row, column]),
            color=color,
            fontsize=FONT_SIZE,
            horizontalalignment="center",
            verticalalignment="center",
            in_layout=False,
        )


def map_plot(
    points: np.ndarray,
    labels: np.ndarray | None,
    title: str,
    name_of: Callable[[int], str] = str,
) -> "Figure":
    """Draw points on a plane, in a colour for each class, with a legend for few classes.

    Args:
        points: (points, 2); both axes are scaled alike.
        labels: (points,) class numbers; None: all points have one colour.
        name_of: returns the name of a class.
    """
    has_labels = labels is not None
    if labels is None:
        labels = np.zeros(len(points), int)
    classes, numbers = np.unique(labels, return_inverse=True)
    colors = class_colors(len(classes))
    figure = new_figure(MAP_SIDE + 140, MAP_SIDE, "constrained")
    axes = figure.add_subplot()
    axes.scatter(points[:, 0], points[:, 1], s=14, c=colors[numbers], alpha=0.8, linewidths=0)
    # Neither the axes nor distances between groups mean anything.
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_aspect("equal", adjustable="datalim")
    if len(classes) > NAMED_CLASSES:
        axes.set_title(f"{title} ({len(classes):,} classes)", fontsize=10)
        return figure
    axes.set_title(title, fontsize=10)
    if not has_labels:
        return figure
    for number, color in zip(classes, colors, strict=True):
        # No points: only an entry of the legend, which leaves out names that begin with _.
        name = name_of(number)
        label = f" {name}" if name.startswith("_") else name
        axes.scatter([], [], s=40, color=color, label=label)
    figure.legend(loc="outside right upper", title="class", fontsize=FONT_SIZE)
    return figure


def class_colors(number: int) -> np.ndarray:
    """Return a colour for each class, (number, 4): red, green, blue and opacity in 0..1.

    Up to 40 colours can be told apart. With more, classes with close numbers look alike.
    """
    from matplotlib import colormaps

    if number <= 10:
        return colormaps["tab10"](np.arange(number))
    if number <= 40:
        first, second = colormaps["tab20"], colormaps["tab20b"]
        return np.concatenate([first(np.arange(20)), second(np.arange(20))])[:number]
    return colormaps["turbo"](np.linspace(0, 1, number))
