"""Images of an evaluation, drawn with Pillow. Arrays and thumbnails in, an image out.

Letters: Q queries, A classes, P positive pairs, K negative pairs, M points, N images, h w cells of a map.
"""

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

MARGIN, LINE, FONT = 6, 14, 11  # px
RIGHT, WRONG = (0, 120, 60), (190, 30, 30)
BLUE, ORANGE = (60, 110, 190), (225, 130, 30)
WIDEST_MATRIX = 900  # px
NUMBERED_CLASSES = 30  # up to so many have their counts written in the cells, or a legend
MAP_SIDE, MAPPED_SIDE = 640, 112  # px: of a map of points, of an image beside its feature maps


@dataclass(frozen=True)
class Neighbor:
    """An image of the bank beside a query."""

    image: Image.Image
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


def thumbnail(image: Image.Image, side: int) -> Image.Image:
    """The middle square of an image at `side` x `side` px; small images show their pixels."""
    method = Image.Resampling.NEAREST if min(image.size) < side else Image.Resampling.BICUBIC
    return ImageOps.fit(image.convert("RGB"), (side, side), method)


def neighbors_plot(rows: Sequence[NeighborRow]) -> Image.Image:
    """A line for each query: itself, then its neighbours with label and similarity, green where the class is the query's.

    Args:
        rows: at least one, their images of one size.
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
            sheet.paste(neighbor.image, (left, top))
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
    for place, (name, values, color) in enumerate(
        (("negative", negative, BLUE), ("positive", positive, ORANGE))
    ):
        counts, _ = np.histogram(np.clip(values, -1, 1), num_bins, (-1, 1))
        for number, share in enumerate(counts / max(counts.max(), 1)):
            left = MARGIN + number * width / num_bins
            pen.rectangle(
                (left, bottom - share * height, left + width / num_bins - 1, bottom), (*color, 150)
            )
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


def confusion_plot(counts: np.ndarray, names: Sequence[str]) -> Image.Image:
    """The confusion matrix, rows the true class, columns the predicted one; the darker the larger a share of its row.

    Args:
        counts: (A, A).
        names: of the classes, (A,); written where there is room for them.
    """
    number = len(counts)
    cell = max(1, min(34, WIDEST_MATRIX // number))
    font = ImageFont.load_default(FONT)
    is_written = number <= NUMBERED_CLASSES
    room = (
        int(max(font.getlength(name) for name in names)) + 2 * MARGIN if is_written else 2 * MARGIN
    )
    left, top = min(room, 140), LINE * (2 if is_written else 1) + MARGIN
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    sheet = Image.new("RGB", (left + number * cell + MARGIN, top + number * cell + MARGIN), "white")
    shades = np.stack([255 - shares * (255 - end) for end in (8, 48, 107)], axis=2).astype(np.uint8)
    sheet.paste(
        Image.fromarray(shades).resize((number * cell, number * cell), Image.Resampling.NEAREST),
        (left, top),
    )
    pen = ImageDraw.Draw(sheet)
    pen.text(
        (left, 2),
        f"{np.trace(counts) / max(counts.sum(), 1):.1%} right; rows: true, columns: predicted",
        "black",
        font,
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
        pen.text(
            (left - MARGIN, top + middle),
            cut(name, left - MARGIN, font),
            "black",
            font,
            anchor="rm",
        )
        pen.text((left + middle, top - 2), cut(name, cell, font), "black", font, anchor="ms")
        for column in np.flatnonzero(counts[row]):
            color = "white" if shares[row, column] > 0.5 else "black"
            place = (left + (column + 0.5) * cell, top + middle)
            pen.text(place, str(counts[row, column]), color, font, anchor="mm")


def map_plot(points: np.ndarray, labels: np.ndarray, title: str) -> Image.Image:
    """Points on a plane, a colour for each class; a legend where the classes are few.

    Args:
        points: (M, 2); both axes are scaled alike.
        labels: (M,).
    """
    classes, numbers = np.unique(labels, return_inverse=True)
    colors = class_colors(len(classes))
    plane, font = scatter(points, numbers, colors), ImageFont.load_default(FONT + 2)
    has_legend = len(classes) <= NUMBERED_CLASSES
    words = [str(name) for name in classes] if has_legend else [f"{len(classes):,} classes"]
    room, step = int(max(font.getlength(word) for word in words)) + 6 * MARGIN, LINE + 4
    top, height = LINE + 3 * MARGIN, max(plane.height, len(words) * step)
    sheet = Image.new("RGB", (plane.width + room + 2 * MARGIN, top + height + MARGIN), "white")
    sheet.paste(plane, (MARGIN, top))
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), title, "black", font)
    pen.rectangle(
        (MARGIN, top, MARGIN + plane.width - 1, top + plane.height - 1), outline="lightgray"
    )
    left = plane.width + 3 * MARGIN
    for line, word in enumerate(words):
        middle = top + (line + 0.5) * step
        if has_legend:
            pen.ellipse((left, middle - 5, left + 10, middle + 5), colors[line])
        pen.text(
            (left + (3 * MARGIN if has_legend else 0), middle), word, "black", font, anchor="lm"
        )
    return sheet


def scatter(
    points: np.ndarray, numbers: np.ndarray, colors: Sequence[tuple[int, int, int]]
) -> Image.Image:
    """A disc for each point (M, 2) in the colour of its number (M,), `MAP_SIDE` px wide or high, whichever is more."""
    finer, radius, edge = 2, 6, 24  # drawn at twice the size, then reduced: discs with smooth edges
    lowest, extent = points.min(axis=0), np.ptp(points, axis=0)
    scale = (finer * MAP_SIDE - 2 * edge) / max(float(extent.max()), 1e-12)
    width, height = (finer * (int(length * scale + 2 * edge) // finer) for length in extent)
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet, "RGBA")
    for (x, y), number in zip(
        ((points - lowest) * scale + edge).tolist(), numbers.tolist(), strict=True
    ):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), (*colors[number], 200))
    return sheet.resize((width // finer, height // finer), Image.Resampling.LANCZOS)


def class_colors(number: int) -> list[tuple[int, int, int]]:
    """So many colours: hues around the circle, neighbours in turn light and dark."""
    shades = ((0.85, 0.95), (0.95, 0.6))
    found = (colorsys.hsv_to_rgb(place / number, *shades[place % 2]) for place in range(number))
    return [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in found]


def feature_maps_plot(images: Sequence[Image.Image], maps: Mapping[str, np.ndarray]) -> Image.Image:
    """Each image beside its maps, in two blocks side by side.

    Args:
        images: N, at least one.
        maps: the maps of all images by what stands above them, (N, h, w, 3) uint8 each; cells are shown as squares.
    """
    names, step = ["image", *maps], MAPPED_SIDE + MARGIN
    num_blocks = min(2, len(images))
    lines, block = -(-len(images) // num_blocks), len(names) * step + 3 * MARGIN
    top = LINE + 2 * MARGIN
    sheet = Image.new("RGB", (num_blocks * block - 2 * MARGIN, top + lines * step), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT)
    for number, image in enumerate(images):
        left = MARGIN + number // lines * block
        cells = [Image.fromarray(values[number]) for values in maps.values()]
        squares = [thumbnail(image, MAPPED_SIDE)]
        squares += [
            cell.resize((MAPPED_SIDE, MAPPED_SIDE), Image.Resampling.NEAREST) for cell in cells
        ]
        for column, (name, square) in enumerate(zip(names, squares, strict=True)):
            sheet.paste(square, (left + column * step, top + number % lines * step))
            if number % lines == 0:
                pen.text(
                    (left + column * step, MARGIN), cut(name, MAPPED_SIDE, font), "black", font
                )
    return sheet
