"""Features together with the images that they were computed from, and plots of neighbours."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from moco.data.sources.source import Labelled, numbered_class
from moco.errors import printable
from moco.evaluation.reports.plots import (
    LINE,
    LONGEST_NAME,
    RIGHT,
    WRONG,
    Tile,
    legible,
    thumbnail,
    tile_plot,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_QUERIES = 16
"""Queries in a plot of neighbours."""
NUM_NEIGHBORS = 8
"""Neighbours of each of them."""
THUMBNAIL = 64
"""Side of an image in that plot, in px."""
SPACE = 18
"""Space between two of them, in px: the cosine and ``class 123`` fit below an image."""
QUERY_LETTERS, LETTERS = 13, 9
"""Of the name of a class below a query, and behind the cosine of a neighbour."""
NAMED_THUMBNAIL = 96
"""The same for images without labels, which have their names below, in px."""
NAME_LENGTH = 15
"""Letters of a name below an image of that side."""
GAP = 12
"""Space between a query and its neighbours, in px."""


class Embedded(NamedTuple):
    """Features of labelled images, with the images."""

    features: np.ndarray
    """(rows, feature_dim), of any norm."""
    labels: np.ndarray
    """(rows,) class numbers; `labelled` may name the classes."""
    labelled: Labelled
    """The dataset. It may have more images than rows: some cannot be read or have no label."""
    rows: np.ndarray
    """(rows,) the index of each row's image in `labelled`."""

    @property
    def targets(self) -> np.ndarray:
        """What `classify` takes: class numbers (rows,), or (rows, classes) bool."""
        return self.labelled.targets_of(self.labels)

    def chosen(self, is_chosen: np.ndarray) -> "Embedded":
        """Return the rows where `is_chosen` (rows,) is true."""
        return Embedded(
            self.features[is_chosen], self.labels[is_chosen], self.labelled, self.rows[is_chosen]
        )

    def shown_class(self, number: int, most: int = LONGEST_NAME) -> str:
        """Return the name of a label as a plot can show it, or else ``class`` and its number.

        Args:
            most: letters; a longer name is cut, but no number.
        """
        name = self.labelled.label_name(int(number))
        numbered = numbered_class(int(number))
        if name == numbered:
            return name
        return legible(printable(name), most) or numbered

    def shown_name(self, row: int) -> str:
        """Return the name of a row's image as a plot can show it: the end of its file's name.

        A name with letters that the font lacks is the number of the image.
        """
        index = int(self.rows[row])
        images: Any = self.labelled.images
        name = printable(images.name(index).rpartition("/")[2])
        if len(name) > NAME_LENGTH:
            name = f"…{name[1 - NAME_LENGTH :]}"
        return legible(name, NAME_LENGTH) or f"image {index}"

    def unreadable(self) -> list[int]:
        """Return the indices of the images in `labelled` that have no row."""
        return np.delete(np.arange(len(self.labelled.images)), self.rows).tolist()

    def thumbnail(self, row: int, side: int) -> Image.Image:
        """Return the image of a row as a square of `side` px."""
        return thumbnail(shown_image(self.labelled.images, int(self.rows[row])), side)


def shown_image(images: Any, index: int) -> Image.Image:
    """Return an image for the eye, in 8-bit RGB.

    Args:
        images: `Images`, or anything that gives pixels (height, width, 3) uint8 by index.
    """
    return shown(images, images[index])


def shown(images: Any, image: Image.Image | np.ndarray) -> Image.Image:
    """Return an image of `images`, or a part of it, for the eye, in 8-bit RGB."""
    if isinstance(image, Image.Image):
        image = np.asarray(image)
    values = getattr(images, "values", None)
    if values is not None:
        image = values.shown(image)
    return Image.fromarray(np.ascontiguousarray(image))


def neighbors_plot(
    bank: Embedded,
    queries: Embedded,
    shown: np.ndarray,
    similarities: np.ndarray,
    neighbors: np.ndarray,
) -> "Figure":
    """Draw a row for each query: the query, then its neighbours with cosine and class.

    The caption of a neighbour is green if it is of the query's class, else red. Images without a
    label (-1) have the cosine and their names: nothing else tells which images they are.

    Args:
        shown: (n,) rows of `queries`.
        similarities: (n, k) cosines of each query's neighbours, in falling order.
        neighbors: (n, k) their rows in `bank`.
    """
    if (queries.labels[shown] < 0).all():
        return named_neighbors_plot(bank, queries, shown, similarities, neighbors)
    lines = []
    for query, cosines, rows in zip(shown, similarities, neighbors, strict=True):
        label = queries.labels[query]
        caption = "query" if label < 0 else queries.shown_class(label, QUERY_LETTERS)
        tiles = [Tile(queries.thumbnail(query, THUMBNAIL), caption)]
        for cosine, row in zip(cosines, rows, strict=True):
            neighbor_label = bank.labels[row]
            if neighbor_label < 0:
                tiles.append(Tile(bank.thumbnail(row, THUMBNAIL), f"{cosine:.2f}"))
                continue
            is_right = queries.labelled.share_a_class(label, neighbor_label)
            color = RIGHT if is_right else WRONG
            image = bank.thumbnail(row, THUMBNAIL)
            name = bank.shown_class(neighbor_label, LETTERS)
            tiles.append(Tile(image, f"{cosine:.2f} {name}", color))
        lines.append(tiles)
    return tile_plot(lines, gap=GAP, space=SPACE)


def named_neighbors_plot(
    bank: Embedded,
    queries: Embedded,
    shown: np.ndarray,
    similarities: np.ndarray,
    neighbors: np.ndarray,
) -> "Figure":
    """Draw a row for each query: the query, then its neighbours with cosine and name.

    The arguments are those of `neighbors_plot`.
    """
    lines = []
    for query, cosines, rows in zip(shown, similarities, neighbors, strict=True):
        image = queries.thumbnail(query, NAMED_THUMBNAIL)
        tiles = [Tile(image, f"query\n{queries.shown_name(query)}")]
        for cosine, row in zip(cosines, rows, strict=True):
            image = bank.thumbnail(row, NAMED_THUMBNAIL)
            # Features of similar photographs differ in the third digit.
            tiles.append(Tile(image, f"{cosine:.3f}\n{bank.shown_name(row)}"))
        lines.append(tiles)
    return tile_plot(lines, gap=GAP, caption_height=2 * LINE)
