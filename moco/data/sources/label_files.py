"""Classes of images from a text file: a table with a name and a class in each line.

The cells are divided by commas, semicolons or tabs. The first line may name the columns. A class is
a name or a whole number. Several columns of 0 and 1 stand for one class each, and an image has the
classes with a 1.
"""

import csv
import io
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from typing import Any, NamedTuple

import numpy as np

from moco.data.files.formats import FORMAT_OF_ENDING
from moco.data.files.listing import ending_of
from moco.data.files.text_files import read_text
from moco.data.sources.label_sets import numbered_sets
from moco.errors import InputError, near_path, printable

log = logging.getLogger(__name__)

NAME_COLUMNS = (
    "name", "file", "filename", "file_name", "path", "filepath", "file_path", "image", "image_name",
    "image_id", "img", "id",
)  # fmt: skip
CLASS_COLUMNS = ("class", "class_name", "label", "label_name", "category", "target", "species")
SEPARATORS = ",;\t"
NO_CLASS = -1
NO_IMAGE = -1
SEVERAL_IMAGES = -2
WHOLE_NUMBER = re.compile(r"-?\d{1,5}")
"""Of class numbers. Longer ones are names: a classifier has an output for each number from 0 on."""
DECIMAL_NUMBER = re.compile(r"[-+]?\d*\.\d+([eE][-+]?\d+)?")
NUM_NAMED = 3
"""Names in a message."""
EXPECTED = "expected a column of image names and one of classes"


def natural_order(name: str) -> tuple[Any, str]:
    """Return a sort key that puts "2" before "10", and names without numbers as `sorted` does."""
    # Texts and numbers take turns, so no text is compared with a number.
    parts: list[str | int] = [*re.split(r"(\d+)", name)]
    parts[1::2] = map(int, parts[1::2])
    return parts, name


class Table(NamedTuple):
    """The cells of a text file."""

    path: str
    header: list[str] | None
    """The names of the columns, if the file has them."""
    rows: list[list[str]]
    """The other lines, all of the same number of cells."""


class Labels(NamedTuple):
    """The labels of images or of rows of a table."""

    numbers: np.ndarray
    """(images,) int64, `NO_CLASS` for an image without a label."""
    class_names: tuple[str, ...] | None
    """By number; None if the classes have no names."""
    label_sets: np.ndarray | None = None
    """See `Labelled`."""


def read_labels(path: str, root: str, names: Sequence[str]) -> Labels:
    """Return the labels of images.

    The log says how many images have no class, and how many lines have no image.

    Args:
        path: the file. If there is none, it is looked for in `root`.
        root: the folder of the images, for messages.
        names: (images,) paths of the images below their folder. The file may have these, or only
            the last part of each, and both without their endings.

    Raises:
        InputError: the file is missing or no such table, a name stands for several images, an image
            has two lines that differ, or no line has an image.
    """
    finder = ImageFinder(names)
    table = read_table(find_file(path, root), finder)
    name_column, class_columns = choose_columns(table, finder)
    names_there = [row[name_column] for row in table.rows]
    places = np.array([finder.find(name) for name in names_there])
    check_places(table, root, names_there, places)
    has_image = places != NO_IMAGE
    table = table._replace(rows=list(compress(table.rows, has_image)))
    names_there = list(compress(names_there, has_image))
    of_rows = numbered_classes(table, class_columns)
    labels = np.full(len(names), NO_CLASS, dtype=np.int64)
    twice = []
    places_there = places[has_image].tolist()
    numbers = of_rows.numbers.tolist()
    for name, place, number in zip(names_there, places_there, numbers, strict=True):
        if number == NO_CLASS:
            continue
        if labels[place] not in (NO_CLASS, number):
            twice.append(name)
        labels[place] = number
    if (labels == NO_CLASS).all():
        raise InputError(f"{table.path}: no image below {printable(root)} has a class in there")
    if twice:
        raise InputError(
            f"{table.path}: {len(twice):,} images have a second line with another class: "
            f"{first_few(twice)}"
        )
    unlabelled = np.flatnonzero(labels == NO_CLASS).tolist()
    if unlabelled:
        log.warning(
            "%s: %s of %s images have no class, and are only trained on: %s",
            table.path,
            f"{len(unlabelled):,}",
            f"{len(names):,}",
            first_few(names[place] for place in unlabelled[: NUM_NAMED + 1]),
        )
    return of_rows._replace(numbers=labels)


def first_few(names: Iterable[str], most: int = NUM_NAMED) -> str:
    """Return the first names of many, for a message."""
    shown: list[str] = []
    for name in names:
        if len(shown) == most:
            shown.append("...")
            break
        shown.append(printable(name))
    return ", ".join(shown)


def find_file(path: str, root: str) -> str:
    """Return the path of the file, as it is given or below the folder of the images."""
    for candidate in (path, os.path.join(root, path)):
        if os.path.isfile(candidate):
            return candidate
    raise InputError(
        f"data.labels={path}: no such file, also not in {printable(root)}{near_path(candidate)}"
    )


class ImageFinder:
    """Finds images by a path below their folder, or by the last part of it, if only one has it.

    Both may lack the ending.

    Args:
        names: (images,) paths below the folder.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.levels: list[Mapping[str, int]] = []

    def find(self, name: str) -> int:
        """Return the place of an image, `NO_IMAGE`, or `SEVERAL_IMAGES`."""
        name = name.removeprefix("./")
        for number in range(4):
            place = self._level(number).get(name, NO_IMAGE)
            if place != NO_IMAGE:
                return place
        return NO_IMAGE

    def _level(self, number: int) -> Mapping[str, int]:
        """Return the places by path, by last part, and by both without their endings."""
        # Most files need the first one alone, and a million names take a second.
        while number >= len(self.levels):
            self.levels.append(self._places(len(self.levels)))
        return self.levels[number]

    def _places(self, number: int) -> dict[str, int]:
        places: dict[str, int] = {}
        for place, name in enumerate(self.names):
            if number in (1, 3):
                name = os.path.basename(name)
            if number >= 2:
                name, _ = os.path.splitext(name)
            places[name] = SEVERAL_IMAGES if name in places else place
        return places


def read_table(path: str, finder: ImageFinder) -> Table:
    """Read the cells of a file, without empty lines and without spaces around the cells.

    Raises:
        InputError: it is no text, has no lines, or lines of several lengths.
    """
    file = io.StringIO(read_text(path), newline="")
    first = file.readline()
    file.seek(0)
    separator = max(SEPARATORS, key=first.count)
    rows = []
    line_numbers = []
    try:
        lines = csv.reader(file, delimiter=separator, strict=True)
        for number, line in enumerate(lines, start=1):
            row = [cell.strip() for cell in line]
            if any(row):
                rows.append(row)
                line_numbers.append(number)
    except csv.Error as error:
        raise InputError(f"{path}: no table of text ({printable(str(error))})") from error
    if not rows:
        raise InputError(f"{path}: empty; {EXPECTED}")
    width = len(rows[0])
    for number, row in zip(line_numbers, rows, strict=True):
        if len(row) != width:
            raise InputError(
                f"{path}: line {number} has {len(row)} cells, and the first line has {width}"
            )
    header = None
    if not any(names_an_image(cell, finder) for cell in rows[0]):
        header = rows.pop(0)
        if not rows:
            raise InputError(f"{path}: one line; {EXPECTED}")
    return Table(path, header, rows)


def names_an_image(cell: str, finder: ImageFinder) -> bool:
    """Return whether a cell is the name of an image, be it there or not."""
    return ending_of(cell) in FORMAT_OF_ENDING or finder.find(cell) != NO_IMAGE


def choose_columns(table: Table, finder: ImageFinder) -> tuple[int, list[int]]:
    """Return the column of names, and that of the classes or one for each class.

    Raises:
        InputError: there is one column alone, or several could hold the classes.
    """
    name_column, class_column = 0, None
    if table.header is None:
        are_names = [names_an_image(cell, finder) for cell in table.rows[0]]
        name_column = are_names.index(True)
    else:
        named = columns_named(NAME_COLUMNS, table.header)
        if named:
            name_column = named[0]
        # Without such a name the names are in the first column, even if it is called label.
        for column in columns_named(CLASS_COLUMNS, table.header):
            if column != name_column:
                class_column = column
                break
    others = list(range(len(table.rows[0])))
    others.remove(name_column)
    if not others:
        raise InputError(f"{table.path}: one column; {EXPECTED}")
    if class_column is not None:
        return name_column, [class_column]
    if len(others) > 1 and not all(is_zero_or_one(row, others) for row in table.rows):
        columns = f"{len(others) + 1} columns without names"
        if table.header is not None:
            columns = f"the columns {', '.join(map(printable, table.header))}"
        raise InputError(
            f"{table.path}: {columns}; expected a column named class, or columns of 0 and 1"
        )
    return name_column, others


def columns_named(names: Iterable[str], header: Iterable[str]) -> list[int]:
    """Return the columns that have these names, in any case, in the order of `names`."""
    lowered = [name.lower() for name in header]
    return [lowered.index(name) for name in names if name in lowered]


def is_zero_or_one(row: Sequence[str], columns: Iterable[int]) -> bool:
    """Return whether all these cells of a row are 0 or 1."""
    return all(row[column] in ("0", "1", "0.0", "1.0") for column in columns)


def check_places(table: Table, root: str, names: Sequence[str], places: np.ndarray) -> None:
    """Warn of names without an image.

    Raises:
        InputError: no name has an image, or a name has several.
    """
    several = list(compress(names, places == SEVERAL_IMAGES))
    if several:
        raise InputError(
            f"{table.path}: {len(several):,} names stand for several images each: "
            f"{first_few(several)}; give their paths below {printable(root)}"
        )
    unknown = list(compress(names, places == NO_IMAGE))
    if len(unknown) == len(names):
        raise InputError(
            f"{table.path}: none of its {len(names):,} names is an image below {printable(root)}: "
            f"{first_few(unknown)}"
        )
    if unknown:
        log.warning(
            "%s: %s of %s names are no images below %s: %s",
            table.path,
            f"{len(unknown):,}",
            f"{len(names):,}",
            printable(root),
            first_few(unknown),
        )


def numbered_classes(table: Table, columns: Sequence[int]) -> Labels:
    """Return the label of each row.

    Class names are numbered in natural order. Whole numbers stay as they are, and have no names;
    an empty cell or a negative number is no class.

    Raises:
        InputError: the classes are numbers with decimals.
    """
    if len(columns) > 1:
        return one_or_several(table, columns)
    (column,) = columns
    values = [row[column] for row in table.rows]
    given = set(values) - {""}
    if given and all(map(WHOLE_NUMBER.fullmatch, given)):
        numbers = np.array([int(value or NO_CLASS) for value in values], dtype=np.int64)
        return Labels(numbers.clip(min=NO_CLASS), None)
    for value in values:
        if DECIMAL_NUMBER.fullmatch(value):
            raise InputError(
                f"{table.path}: a class is {value}; expected names of classes or whole numbers"
            )
    class_names = tuple(sorted(given, key=natural_order))
    number_of_class = {"": NO_CLASS}
    for number, name in enumerate(class_names):
        number_of_class[name] = number
    numbers = np.array([number_of_class[value] for value in values], dtype=np.int64)
    return Labels(numbers, class_names)


def one_or_several(table: Table, columns: Sequence[int]) -> Labels:
    """Return the classes of each row, by columns of 0 and 1.

    If no row has several classes, a row without any has no label. Otherwise it has the label that
    stands for no class, since an X-ray without findings is labelled, too.
    """
    cells = []
    for row in table.rows:
        cells.append([float(row[column]) for column in columns])
    is_class = np.array(cells) == 1  # (rows, columns)
    class_names = None
    if table.header is not None:
        class_names = tuple(table.header[column] for column in columns)
    num_classes = is_class.sum(axis=1)  # (rows,)
    if (num_classes <= 1).all():
        numbers = np.where(num_classes == 1, is_class.argmax(axis=1), NO_CLASS)
        return Labels(numbers, class_names)
    numbers, label_sets = numbered_sets(is_class)
    return Labels(numbers, class_names, label_sets)
