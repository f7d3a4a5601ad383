"""Folders that Hugging Face's `datasets` wrote with ``save_to_disk``: memory-mapped Arrow tables.

Nothing in such a folder is run: column types come from JSON, and images are encoded bytes.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moco.data.files.images import EncodedImage, UnreadableImage, encoded
from moco.data.sources.label_sets import is_matrix_of_classes, shared_numbers
from moco.data.sources.source import DataSource, Images, Labelled, warn_of_missing_classes
from moco.errors import InputError, printable, said
from moco.extras import install_command

log = logging.getLogger(__name__)

HELD_OUT_SPLITS = ("validation", "val", "test")  # the first one that exists is taken
IMAGE_SIZE = 224  # px
NO_LABEL = -1


@dataclass(eq=False)
class TableImages(Images):
    """Images in a column of a `datasets.Dataset`."""

    table: Any
    """The dataset with this column alone, in the format ``arrow``."""
    column: str
    what: str
    """The dataset's name for messages."""
    max_image_pixels: int

    def __len__(self) -> int:
        return len(self.table)

    def opened(self, index: int) -> EncodedImage:
        """See `Images`; a row with a path in place of an image is unreadable too."""
        name = self.name(index)
        row = self.table[index][self.column][0].as_py()
        content = None
        if row:
            content = row.get("bytes")
        if content is None:
            raise UnreadableImage(f"{printable(name)}: no image in the table")
        return encoded(content, name, self.max_image_pixels, raw=self.reading.raw)

    def name(self, index: int) -> str:
        """See `Images`."""
        return f"{self.what}[{index}]"


class Split:
    """One split of a saved folder, and which of its columns are used.

    Args:
        image_column: None takes the only column of type Image.
        label_column: None takes the only column of type ClassLabel, or of lists of it for images
            with several classes, if there is one.

    Raises:
        InputError: the split is empty or has no such columns; the message names the choices.
    """

    def __init__(
        self, root: str, name: str, dataset: Any, image_column: str | None, label_column: str | None
    ) -> None:
        from datasets import ClassLabel, Image

        self.name = f"{root}[{name}]"
        self.where = f"{root}, split {name}"
        self.dataset = dataset
        if len(dataset) == 0:
            raise InputError(f"data.root={self.where}: no rows in there")
        columns = []
        for column, kind in dataset.features.items():
            columns.append(f"{column}: {type(kind).__name__}")
        self.columns = printable(", ".join(columns))
        found = self._choose_column(image_column, "data.image_column", Image)
        if found is None:
            raise InputError(
                f"data.root={self.where}: no column of type Image in there ({self.columns})"
            )
        self.image_column = found
        self.label_column = self._choose_column(label_column, "data.label_column", ClassLabel)
        kind = dataset.features.get(self.label_column)
        self.has_lists = element_of(kind) is not None
        names = getattr(element_of(kind) or kind, "names", None)
        if names is not None:
            names = tuple(names)
        self.class_names: tuple[str, ...] | None = names
        """In the order of their numbers; None for plain numbers."""

    def _choose_column(self, given: str | None, key: str, column_type: type) -> str | None:
        """Return the given column, or the only one of a type; None if there is none."""
        features = self.dataset.features
        columns = []
        for name, kind in features.items():
            if isinstance(element_of(kind) or kind, column_type):
                columns.append(name)
        if given is None and len(columns) <= 1:
            return next(iter(columns), None)
        # A label can also be a plain number, or a list of plain numbers.
        kind = features.get(given)
        dtype = getattr(element_of(kind) or kind, "dtype", "")
        is_number = "int" in str(dtype)
        if given not in columns and not (key == "data.label_column" and is_number):
            raise InputError(
                f"{key}={given}: expected one column of type {column_type.__name__} "
                f"({self.where} has {self.columns})"
            )
        return given

    def images(self, max_image_pixels: int) -> TableImages:
        """Return the split's images."""
        from datasets import Image

        # Undecoded, so that an image is read in the loader process as files are.
        column = self.image_column
        table = self.dataset.select_columns([column])
        table = table.cast_column(column, Image(decode=False))
        return TableImages(table.with_format("arrow"), column, self.name, max_image_pixels)

    def labels(self) -> np.ndarray | None:
        """Return the labels; None if there are none or some rows have none.

        Published test splits often have no labels.

        Returns:
            (rows,) int64; or (rows, classes) bool, if an image may have several classes.

        Raises:
            InputError: a label is no class; the message names the row.
        """
        if self.label_column is None:
            return None
        table = self.dataset.select_columns([self.label_column]).with_format("arrow")
        column = table[:][self.label_column]
        if self.has_lists:
            return self._rows_of_classes(column)
        labels: np.ndarray = column.cast("int64").fill_null(NO_LABEL).to_numpy()
        self._check_classes(labels, np.arange(len(labels)), NO_LABEL, ", or -1 (no label)")
        if NO_LABEL in labels:
            log.info("%s has rows without a label: its labels are not used", printable(self.where))
            return None
        return labels

    def _rows_of_classes(self, column: Any) -> np.ndarray | None:
        """Return (rows, classes) bool of a column of lists; None if some rows have no list.

        The lists hold the numbers of an image's classes; or, without class names, 0 and 1 for each
        class.
        """
        import pyarrow.compute as pc

        if column.null_count:
            log.info("%s has rows without a label: its labels are not used", printable(self.where))
            return None
        rows = pc.list_parent_indices(column).to_numpy()
        values: np.ndarray = pc.list_flatten(column).cast("int64").fill_null(NO_LABEL).to_numpy()
        if self.class_names is not None:
            self._check_classes(values, rows, 0, "")
            is_class = np.zeros((len(column), len(self.class_names)), bool)
            is_class[rows, values] = True
            return is_class
        lengths = np.bincount(rows, minlength=len(column))
        if len(set(lengths)) == 1:
            matrix = values.reshape(len(column), -1)
            if is_matrix_of_classes(matrix, len(column)):
                return matrix.astype(bool)
        raise InputError(
            f"data.root={self.where}: column {printable(str(self.label_column))} has lists of "
            "numbers; expected 0 and 1 for each of two or more classes, or lists of ClassLabel"
        )

    def _check_classes(
        self, labels: np.ndarray, rows: np.ndarray, smallest: int, also: str
    ) -> None:
        """Check that labels (M,) of rows (M,) are numbers of classes.

        Args:
            smallest: the smallest number that is allowed.
            also: what else is expected, for the message.

        Raises:
            InputError: one is not.
        """
        is_wrong = labels < smallest
        expected = "0 or more"
        if self.class_names is not None:
            num_classes = len(self.class_names)
            is_wrong |= labels >= num_classes
            expected = f"0 to {num_classes - 1}, its {num_classes} classes"
        # `datasets` checks labels when a table is written, and not when it is read.
        for place in np.flatnonzero(is_wrong).tolist():
            raise InputError(
                f"data.root={self.where}: column {printable(str(self.label_column))} holds "
                f"{labels[place]} in row {rows[place]}; expected {expected}{also}"
            )


def element_of(kind: Any) -> Any:
    """Return the type of the elements of a column of lists, or None for another column."""
    return getattr(kind, "feature", None)


def hugging_face_source(
    root: str, image_column: str | None, label_column: str | None, max_image_pixels: int
) -> DataSource:
    """Return a Dataset, or a DatasetDict: it trains on the split ``train``.

    The validation or test split is the queries.

    Args:
        image_column, label_column: see `Split`.

    Raises:
        InputError: the library is missing, or the folder is something else.
    """
    splits = load_splits(root)
    if "train" not in splits:
        found = printable(", ".join(sorted(splits)))
        raise InputError(f"data.root={root}: no split train in there (found {found})")
    train = Split(root, "train", splits["train"], image_column, label_column)
    images = train.images(max_image_pixels)
    labels = train.labels()
    if labels is None:
        return DataSource(images, None, None, IMAGE_SIZE)
    sides = {"bank": (images, labels)}
    for name in HELD_OUT_SPLITS:
        if name in splits:
            held_out = Split(root, name, splits[name], image_column, label_column)
            query_labels = held_out.labels()
            if query_labels is not None:
                other_classes = held_out.class_names != train.class_names
                if other_classes or query_labels.shape[1:] != labels.shape[1:]:
                    raise InputError(f"data.root={held_out.where}: other classes than split train")
                sides["queries"] = (held_out.images(max_image_pixels), query_labels)
            break
    all_labels = [side_labels for _, side_labels in sides.values()]
    label_sets = None
    if labels.ndim == 2:
        all_labels, label_sets = shared_numbers(all_labels)
    labelled = {}
    for (key, (side, _)), numbers in zip(sides.items(), all_labels, strict=True):
        labelled[key] = Labelled(side, numbers, train.class_names, label_sets)
    queries = labelled.get("queries")
    if queries is not None:
        warn_of_missing_classes(labelled["bank"], queries)
    return DataSource(images, labelled["bank"], queries, IMAGE_SIZE)


def load_splits(root: str) -> dict[str, Any]:
    """Return the datasets of a saved folder by split; a single Dataset is the split ``train``.

    Raises:
        InputError: the library is missing, or the folder is something else.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"data=hf needs another package: {install_command('hf')}") from error
    if not Path(root).is_dir():
        raise InputError(f"data.root={root}: no such folder")
    try:
        found = datasets.load_from_disk(root)
    except Exception as error:  # its parsers and Arrow's raise nearly anything on damaged folders
        raise InputError(
            f"data.root={root}: not a folder of datasets' save_to_disk ({said(error)})"
        ) from error
    if isinstance(found, dict):
        return found
    return {"train": found}
