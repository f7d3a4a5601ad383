"""Pictures of an evaluation, drawn with Pillow. Arrays and thumbnails in, a picture out.

Letters: Q queries, A classes, P positive pairs, K negative pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

MARGIN, LINE, FONT = 6, 14, 11  # px
RIGHT, WRONG = (0, 120, 60), (190, 30, 30)
BLUE, ORANGE = (60, 110, 190), (225, 130, 30)
WIDEST_MATRIX = 900  # px
NUMBERED_CLASSES = 30  # up to so many have their counts written in the cells


@dataclass(frozen=True)
class Neighbor:
    """A picture of the bank beside a query."""

    picture: Image.Image
    similarity: float
    label: str
    is_same: bool
    """Its class is the query's."""


@dataclass(frozen=True)
class NeighborRow:
    """A query and its nearest neighbours, the most similar first."""

    query: Image.Image
    label: str
    neighbors: Sequence[Neighbor]


def thumbnail(picture: Image.Image, side: int) -> Image.Image:
    """The middle square of a picture at `side` x `side` px; small pictures show their pixels."""
    method = Image.Resampling.NEAREST if min(picture.size) < side else Image.Resampling.BICUBIC
    return ImageOps.fit(picture.convert("RGB"), (side, side), method)


def neighbors_picture(rows: Sequence[NeighborRow]) -> Image.Image:
    """A line for each query: itself, then its neighbours with label and similarity, green where the class is the query's.

    Args:
        rows: at least one, their pictures of one size.
    """
    side = rows[0].query.width
    width, height = side + MARGIN, side + LINE + MARGIN
    columns = 1 + max(len(row.neighbors) for row in rows)
    sheet = Image.new("RGB", (columns * width + 3 * MARGIN, len(rows) * height + MARGIN), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT)
    for line, row in enumerate(rows):
        top = MARGIN + line * height
        sheet.paste(row.query, (MARGIN, top))
        pen.text((MARGIN, top + side), cut(row.label, side, font), "black", font)
        for column, neighbor in enumerate(row.neighbors, start=1):
            left = 3 * MARGIN + column * width  # a gap after the query
            sheet.paste(neighbor.picture, (left, top))
            words = cut(f"{neighbor.label}: {neighbor.similarity:.2f}", side, font)
            pen.text((left, top + side), words, RIGHT if neighbor.is_same else WRONG, font)
    return sheet


def cut(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """As much of the text's beginning as `width` px hold."""
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text


def similarity_histogram(positive: np.ndarray, negative: np.ndarray) -> Image.Image:
    """Two histograms of cosines, each as high as its own highest bar: what is to be near, and what apart.

    Args:
        positive: (P,) of two views of an image.
        negative: (K,) of different images.
    """
    width, height, num_bins = 640, 240, 80
    sheet = Image.new("RGB", (width + 2 * MARGIN, height + 3 * LINE + 2 * MARGIN), "white")
    pen, font = ImageDraw.Draw(sheet, "RGBA"), ImageFont.load_default(FONT)
    bottom = MARGIN + LINE + height
    for place, (name, values, color) in enumerate((("negative", negative, BLUE), ("positive", positive, ORANGE))):
        counts, _ = np.histogram(np.clip(values, -1, 1), num_bins, (-1, 1))
        for number, share in enumerate(counts / max(counts.max(), 1)):
            left = MARGIN + number * width / num_bins
            pen.rectangle((left, bottom - share * height, left + width / num_bins - 1, bottom), (*color, 150))
        words = f"{name}: {len(values):,} pairs, mean {float(np.mean(values)):.3f}"
        pen.text((MARGIN + place * width / 2, MARGIN), words, color, font)
    for cosine in (-1, -0.5, 0, 0.5, 1):
        tick = MARGIN + (cosine + 1) / 2 * width
        pen.line((tick, bottom, tick, bottom + 3), "black")
        anchor = "la" if cosine == -1 else "ra" if cosine == 1 else "ma"
        pen.text((tick, bottom + 4), f"{cosine:g}", "black", font, anchor=anchor)
    pen.text((MARGIN + width / 2, bottom + 4 + LINE), "cosine", "black", font, anchor="ma")
    return sheet


def confusion_counts(labels: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How often queries (Q,) of each class were predicted to be of each: (A, A), rows the true class; and the classes."""
    classes, numbers = np.unique(np.concatenate([labels, predicted]), return_inverse=True)
    true, said = numbers.reshape(2, -1)
    counts = np.bincount(true * len(classes) + said, minlength=len(classes) ** 2)
    return counts.reshape(len(classes), len(classes)), classes


def confusion_picture(counts: np.ndarray, names: Sequence[str]) -> Image.Image:
    """The confusion matrix, rows the true class, columns the predicted one; the darker the larger a share of its row.

    Args:
        counts: (A, A).
        names: of the classes, (A,); written where there is room for them.
    """
    number = len(counts)
    cell = max(1, min(34, WIDEST_MATRIX // number))
    font = ImageFont.load_default(FONT)
    is_written = number <= NUMBERED_CLASSES
    room = int(max(font.getlength(name) for name in names)) + 2 * MARGIN if is_written else 2 * MARGIN
    left, top = min(room, 140), LINE * (2 if is_written else 1) + MARGIN
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    sheet = Image.new("RGB", (left + number * cell + MARGIN, top + number * cell + MARGIN), "white")
    shades = np.stack([255 - shares * (255 - end) for end in (8, 48, 107)], axis=2).astype(np.uint8)
    sheet.paste(Image.fromarray(shades).resize((number * cell, number * cell), Image.Resampling.NEAREST), (left, top))
    pen = ImageDraw.Draw(sheet)
    pen.text(
        (left, 2), f"{np.trace(counts) / max(counts.sum(), 1):.1%} right; rows: true, columns: predicted", "black", font
    )
    if is_written:
        write_cells(pen, counts, names, (left, top), cell, font)
    return sheet


def write_cells(
    pen: ImageDraw.ImageDraw,
    counts: np.ndarray,
    names: Sequence[str],
    corner: tuple[int, int],
    cell: int,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
) -> None:
    """The classes' names beside and above the matrix, and the counts in its cells."""
    left, top = corner
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    for row, name in enumerate(names):
        middle = (row + 0.5) * cell
        pen.text((left - MARGIN, top + middle), cut(name, left - MARGIN, font), "black", font, anchor="rm")
        pen.text((left + middle, top - 2), cut(name, cell, font), "black", font, anchor="ms")
        for column in np.flatnonzero(counts[row]):
            color = "white" if shares[row, column] > 0.5 else "black"
            place = (left + (column + 0.5) * cell, top + middle)
            pen.text(place, str(counts[row, column]), color, font, anchor="mm")
