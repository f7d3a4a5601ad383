"""The figures of each held-out image of a segmentation, as a table for paired tests."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import BinaryIO

from moco.errors import printable

PER_IMAGE = "per_image.csv"
"""The file in the run folder of an evaluation."""


class ImageFigures:
    """Collect the figures of images, and write them as a table with one image a row.

    The columns are ``image``, ``pixels`` (those that have a class), and the figures under their
    names in ``metrics.json`` without ``segment/``. A cell is empty where the image does not tell
    the figure, such as the IoU of a class that is neither in its mask nor predicted.
    """

    def __init__(self) -> None:
        self.rows: dict[int, tuple[str, int, Mapping[str, float | None]]] = {}
        """By the number of the image in its dataset."""

    def add(
        self, number: int, name: str, num_pixels: int, figures: Mapping[str, float | None]
    ) -> None:
        """Add an image.

        Args:
            number: of the image in its dataset.
            name: its path below the dataset's folder.
            num_pixels: how many of its pixels have a class.
            figures: see `moco.segmentation.metrics.segmentation_figures`.
        """
        self.rows[number] = (name, num_pixels, figures)

    def from_worst_to_best(self, key: str, most: int) -> list[int]:
        """Return the numbers of at most `most` images, evenly spaced in the order of a figure."""
        known = []
        for number, (_, _, figures) in self.rows.items():
            figure = figures[key]
            if figure is not None:
                known.append((figure, number))
        known.sort()
        if len(known) > most:
            last = len(known) - 1
            places = [round(place * last / (most - 1)) for place in range(most)]
            known = [known[place] for place in places]
        return [number for _, number in known]

    def write(self, file: BinaryIO) -> None:
        """Write the table as CSV in UTF-8, in the order of the dataset."""
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        for place, number in enumerate(sorted(self.rows)):
            name, num_pixels, figures = self.rows[number]
            if place == 0:
                writer.writerow(["image", "pixels", *self.columns(list(figures))])
            # csv writes None as an empty cell, and a float with all its digits.
            writer.writerow([printable(name), num_pixels, *figures.values()])
        file.write(text.getvalue().encode())

    @staticmethod
    def columns(keys: Sequence[str]) -> list[str]:
        """Return the names of the figures' columns."""
        return [printable(key.removeprefix("segment/")) for key in keys]
