"""Plots for a card of TensorBoard, which is 340 to 480 px wide: large letters, landscape.

TensorBoard shrinks an image to its card. So the letters here are about twice as large as in the
plots that ``moco.evaluate`` writes, and there are fewer images.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from moco.data.sources.source import numbered_class
from moco.errors import printable
from moco.evaluation.diagnostics import evenly_spaced
from moco.evaluation.knn import Search
from moco.evaluation.neighbors import joined
from moco.evaluation.reports.embedded import Embedded
from moco.evaluation.reports.plots import (
    MARGIN,
    RIGHT,
    WRONG,
    Tile,
    legible,
    new_figure,
    thumbnail,
    tile_plot,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_PAIRS = 8
"""Pairs of views in a plot."""
VIEW_SIDES = (96, 128)
"""Smallest and largest side of a view or image, in px."""
NUM_COLUMNS = 10
"""Queries in a plot of neighbours."""
NUM_ROWS = 4
"""Neighbours of each of them."""
FRAME = 5
"""Width of the coloured frame of a neighbour, in px."""
LETTERS = 7
"""Letters below an image."""
FONT_SIZE = 13
"""In points: 18 px."""
TILE_FONT_SIZE = 16
"""Of the letters beside images, in points: 22 px."""
CAPTION = 24
"""Height of a caption, in px."""
TILE_CAPTION = 30
"""Height of a caption below an image, in px."""
SIDE_NAME = 34
"""Width of the upright names beside the view pairs, in px."""

WRITTEN_CLASSES = 12
"""A confusion matrix with more classes has no numbers in its cells."""
NAMED_CLASSES = 30
"""A confusion matrix with more classes names only ten of them."""
LONGEST_NAME = 14
"""Letters of the name of a class beside a confusion matrix."""

COMPARISON_WIDTH = 660
"""A comparison of masks that is not as wide is enlarged, in px."""
CLASSES_IN_ROW = 4
"""Names of classes beside each other, below a comparison of masks."""
COMPARED_CLASSES = 12
"""Names of classes below a comparison of masks."""


def view_pairs_card(queries: np.ndarray, keys: np.ndarray) -> "Figure":
    """Draw at most eight pairs of views in columns, the query above its key.

    Small views are enlarged without smoothing, to a multiple of their side.

    Args:
        queries, keys: (pairs, side, side, 3) uint8 each, at least one pair.
    """
    queries, keys = queries[:NUM_PAIRS], keys[:NUM_PAIRS]
    smallest, largest = VIEW_SIDES
    side = queries.shape[1]
    if side < smallest:
        side *= -(-smallest // side)
    side = min(side, largest)
    width = SIDE_NAME + len(queries) * (side + MARGIN)
    height = MARGIN + 2 * (side + MARGIN)
    figure = new_figure(width, height)
    for row, (name, views) in enumerate((("query", queries), ("key", keys))):
        # matplotlib measures from the bottom left corner.
        bottom = height - (row + 1) * (side + MARGIN)
        for column, view in enumerate(views):
            tile = thumbnail(Image.fromarray(view), side)
            left = SIDE_NAME + column * (side + MARGIN)
            figure.figimage(np.asarray(tile), left, bottom, origin="upper")
        figure.text(
            SIDE_NAME / 2 / width,
            (bottom + side / 2) / height,
            name,
            fontsize=TILE_FONT_SIZE,
            rotation=90,
            horizontalalignment="center",
            verticalalignment="center",
        )
    return figure


def neighbors_card(bank: Embedded, queries: Embedded, search: Search) -> "Figure":
    """Draw a column for each of ten queries: the query, and below it its nearest neighbours.

    With up to ten classes there is a query of every class. A neighbour of the query's class has a
    green frame and a tick, any other a red frame and the name of its class in red.

    Args:
        search: finds the nearest rows of the bank, which does not contain the queries.
    """
    chosen = rows_of_classes(queries.labels, NUM_COLUMNS)
    _, rows = joined(search(queries.features[chosen], min(NUM_ROWS, len(bank.rows))))
    side = VIEW_SIDES[0]
    first = []
    for query in chosen:
        name = queries.shown_class(queries.labels[query], LETTERS)
        first.append(Tile(queries.thumbnail(query, side), name))
    lines = [first]
    for nearest in rows.T:
        line = []
        for query, row in zip(chosen, nearest, strict=True):
            is_right = queries.labelled.share_a_class(queries.labels[query], bank.labels[row])
            color, caption = RIGHT, "✓"
            if not is_right:
                color, caption = WRONG, bank.shown_class(bank.labels[row], LETTERS)
            inner = bank.thumbnail(row, side - 2 * FRAME)
            line.append(Tile(ImageOps.expand(inner, FRAME, color), caption, color))
        lines.append(line)
    return tile_plot(lines, font_size=TILE_FONT_SIZE, caption_height=TILE_CAPTION)


def rows_of_classes(labels: np.ndarray, number: int) -> np.ndarray:
    """Choose rows of as many classes as possible, and return them in the order of their classes.

    Args:
        labels: (rows,) class numbers.
        number: how many; all rows if there are fewer. Each class has at least one row, or if there
            are more classes than that, each of `number` evenly spaced classes has one.
    """
    order = np.argsort(labels, kind="stable")
    if len(order) <= number:
        return order
    _, starts = np.unique(labels[order], return_index=True)
    by_class = np.split(order, starts[1:])
    if len(by_class) > number:
        places = evenly_spaced(np.arange(len(by_class)), number)
        by_class = [by_class[place] for place in places]
    # The first rows of all classes, then the second ones, until there are enough.
    place_in_class = np.concatenate([np.arange(len(rows)) for rows in by_class])
    rows = np.concatenate(by_class)
    is_chosen = np.zeros(len(rows), dtype=bool)
    is_chosen[np.argsort(place_in_class, kind="stable")[:number]] = True
    return rows[is_chosen]


def confusion_card(names: Sequence[str], counts: np.ndarray, what: str) -> "Figure":
    """Draw a confusion matrix in percent of its rows; a cell is darker the larger its share.

    Args:
        names: (classes,) the names of the classes, from `shown_name`.
        counts: (classes, classes), rows the true class, columns the predicted one.
        what: what was counted, such as ``queries``.
    """
    num_classes = len(counts)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    has_numbers = num_classes <= WRITTEN_CLASSES
    cell = 48 if has_numbers else 30
    side = float(np.clip(cell * num_classes, 300, 900))
    figure = new_figure(side + 190, side + 190, "constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    accuracy = np.trace(counts) / max(counts.sum(), 1)
    figure.suptitle(f"{accuracy:.1%} of {counts.sum():,} {what} right", fontsize=FONT_SIZE + 2)
    axes.set_xlabel("predicted class", fontsize=FONT_SIZE)
    unit = ", cells in % of it" if has_numbers else ""
    axes.set_ylabel(f"true class{unit}", fontsize=FONT_SIZE)
    if has_numbers:
        for row, column in np.argwhere(counts):
            axes.text(
                column,
                row,
                f"{100 * shares[row, column]:.0f}",
                color="white" if shares[row, column] > 0.5 else "black",
                fontsize=FONT_SIZE,
                horizontalalignment="center",
                verticalalignment="center",
                in_layout=False,
            )
    named = np.arange(num_classes)
    if num_classes > NAMED_CLASSES:
        named = np.linspace(0, num_classes - 1, 10).astype(int)
    shown = [names[place] for place in named.tolist()]
    axes.set_xticks(named, shown, rotation=90, fontsize=FONT_SIZE)
    axes.set_yticks(named, shown, fontsize=FONT_SIZE)
    return figure


def shown_name(name: str, number: int, most: int = LONGEST_NAME) -> str:
    """Return the name of a class as a plot can show it, or else ``class`` and its number.

    Args:
        most: letters; a longer name is cut.
    """
    return legible(printable(name), most) or numbered_class(number)


def comparison_card(
    panels: np.ndarray, classes: Sequence[tuple[str, Sequence[int]]], title: str = ""
) -> "Figure":
    """Draw an image, its mask and a prediction with their names above and the classes below.

    Args:
        panels: (height, width, 3) uint8, the three beside each other, each a third of the width. A
            small one is enlarged without smoothing.
        classes: names, from `shown_name`, and colours (red, green, blue in 0..255) of the classes
            that are seen.
        title: a line above everything; empty: there is none.
    """
    scale = max(1, COMPARISON_WIDTH // panels.shape[1])
    panels = panels.repeat(scale, axis=0).repeat(scale, axis=1)
    height, width = panels.shape[:2]
    # The card shrinks a wide plot more, so its letters are larger.
    unit = width / COMPARISON_WIDTH
    line = round(CAPTION * unit)
    font_size = FONT_SIZE * unit
    num_rows = -(-len(classes) // CLASSES_IN_ROW)
    above = 2 * line if title else line
    whole = above + height + num_rows * line + MARGIN
    figure = new_figure(width, whole)
    figure.figimage(panels, 0, whole - above - height, origin="upper")
    if title:
        y = 1 - line / 2 / whole
        figure.text(0.01, y, title, fontsize=font_size, verticalalignment="center")
    for place, name in enumerate(("image", "truth", "prediction")):
        figure.text(
            (place + 0.5) / 3,
            1 - (above - line / 2) / whole,
            name,
            fontsize=font_size,
            horizontalalignment="center",
            verticalalignment="center",
        )
    for place, (name, color) in enumerate(classes):
        row, column = divmod(place, CLASSES_IN_ROW)
        x = 0.01 + column / CLASSES_IN_ROW
        y = (whole - above - height - MARGIN - (row + 0.5) * line) / whole
        square = [part / 255 for part in color]
        figure.text(x, y, "■", color=square, fontsize=font_size, verticalalignment="center")
        figure.text(x + 0.03, y, name, fontsize=font_size, verticalalignment="center")
    return figure
