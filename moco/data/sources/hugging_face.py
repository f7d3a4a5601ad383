"""Folders that Hugging Face's `datasets` wrote with ``save_to_disk``: Arrow tables, mapped into memory.

They are data: their columns' types come from JSON, images are taken as encoded bytes, and no code in a folder is run.
"""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moco.data.files.decoding import EncodedImage, encoded
from moco.data.files.images import UnreadableImage
from moco.data.sources.registry import DataSource, Labelled
from moco.errors import InputError, printable, unknown_name

log = logging.getLogger(__name__)

HELD_OUT = ("validation", "val", "test")


class TableImages:
    """Images in a column of a `datasets.Dataset`.

    Args:
        table: the data set, that column alone, its rows as Arrow gives them.
        what: the data set's name for messages.
    """

    def __init__(self, table: Any, column: str, what: str, max_image_pixels: int) -> None:
        self.table = table
        self.column = column
        self.what = what
        self.max_image_pixels = max_image_pixels

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(self.opened(index).pixels())

    def opened(self, index: int) -> EncodedImage:
        """See `Images`; raises UnreadableImage also where a row holds a path instead of an image."""
        name = self.name(index)
        content = (self.table[index][self.column][0].as_py() or {}).get("bytes")
        if content is None:
            raise UnreadableImage(f"{printable(name)}: no image in the table")
        return encoded(content, name, self.max_image_pixels)

    def name(self, index: int) -> str:
        return f"{self.what}[{index}]"


def hugging_face(
    root: str, image_column: str | None, label_column: str | None, max_image_pixels: int
) -> DataSource:
    """A Dataset, or a DatasetDict whose split ``train`` is trained on and whose validation or test split is held out.

    Args:
        image_column: None: the only column of type Image.
        label_column: None: the only column of type ClassLabel, if there is one.

    Raises:
        InputError: the library is missing, or the folder is something else; for columns it names the choices.
    """
    found = _loaded(root)
    splits = found if isinstance(found, dict) else {"train": found}
    if "train" not in splits:
        raise InputError(
            f"data.root={root}: no split train in there (found {printable(', '.join(sorted(splits)))})"
        )
    held_out = next((name for name in HELD_OUT if name in splits), None)
    train, bank = _images(
        root, "train", splits["train"], image_column, label_column, max_image_pixels
    )
    queries = None
    if held_out is not None and bank is not None:
        _, queries = _images(
            root, held_out, splits[held_out], image_column, label_column, max_image_pixels
        )
        if queries is not None:
            there, here = (
                _class_names(root, name, splits[name], label_column) for name in ("train", held_out)
            )
            queries = Labelled(
                queries.images,
                _renumbered(queries.labels, here, there, f"{root}, split {held_out}"),
            )
    return DataSource(train, bank, queries, image_size=224)


def _loaded(root: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError("data=hf needs another package: pip install 'moco-ssl[hf]'") from error
    if not Path(root).is_dir():
        raise InputError(f"data.root={root}: no such folder")
    scripts = sorted(path.name for path in Path(root).glob("*.py"))
    if scripts:
        raise InputError(
            f"data.root={root}: holds a loading script ({printable(scripts[0])}), and no code is run from there"
        )
    try:
        empty = _empty_splits(root)
        found = None if empty else datasets.load_from_disk(root)
    except Exception as error:  # on damaged folders its parsers and Arrow's raise nearly anything
        reason = printable(" ".join(str(error).split())) or type(error).__name__
        raise InputError(
            f"data.root={root}: not a folder of datasets' save_to_disk ({reason})"
        ) from error
    if empty:
        raise InputError(f"data.root={root}: no rows in {printable(', '.join(empty))}")
    return found


def _empty_splits(root: str) -> list[str]:
    """Folders that hold a table without any file, which the library writes and does not read."""
    states = [
        path
        for pattern in ("state.json", "*/state.json")
        for path in sorted(Path(root).glob(pattern))
    ]
    return [
        path.parent.name for path in states if json.loads(path.read_text()).get("_data_files") == []
    ]


def _images(
    root: str,
    split: str,
    dataset: Any,
    image_column: str | None,
    label_column: str | None,
    max_image_pixels: int,
) -> tuple[TableImages, Labelled | None]:
    import datasets

    features = dataset.features
    where = f"{root}, split {split}"
    if not len(dataset):
        raise InputError(f"data.root={where}: no rows in there")
    column = _chosen(features, image_column, "data.image_column", datasets.Image, where)
    if column is None:
        raise InputError(
            f"data.root={where}: no column of type Image in there ({_described(features)})"
        )
    undecoded = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    images = TableImages(
        undecoded.with_format("arrow"), column, f"{root}[{split}]", max_image_pixels
    )
    label = _chosen(features, label_column, "data.label_column", datasets.ClassLabel, where)
    labels = None if label is None else _labels(dataset, label, where)
    return images, None if labels is None else Labelled(images, labels)


def _chosen(features: Any, given: str | None, key: str, kind: type, where: str) -> str | None:
    """The column of a type: the given one, or the only one; None without any."""
    columns = [name for name, feature in features.items() if isinstance(feature, kind)]
    if given is None:
        if len(columns) > 1:
            choices = printable(", ".join(columns))
            raise InputError(
                f"{key}: missing; {where} has several columns of type {kind.__name__}: {choices}"
            )
        return columns[0] if columns else None
    if given not in features:
        raise InputError(f"{key}: {unknown_name('column', given, features)}")
    is_number = key == "data.label_column" and str(
        getattr(features[given], "dtype", "")
    ).startswith(("int", "uint"))
    if given not in columns and not is_number:
        raise InputError(
            f"{key}={given}: expected a column of type {kind.__name__} ({where} has {_described(features)})"
        )
    return given


def _described(features: Any) -> str:
    return (
        printable(", ".join(f"{name}: {_kind(feature)}" for name, feature in features.items()))
        or "no columns"
    )


def _kind(feature: Any) -> str:
    kind = type(feature).__name__
    return str(feature.dtype) if kind == "Value" else kind


def _labels(dataset: Any, column: str, where: str) -> np.ndarray | None:
    """(M,) int64; None where some are missing, as in test splits that were published without.

    Raises:
        InputError: a label is no class; it names the row.
    """
    # `datasets` looks at labels when they are put into a table, and not when the table is read.
    given: Iterable[int | None] = (
        dataset.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    )
    values = [-1 if value is None else value for value in given]
    names = getattr(dataset.features[column], "names", None)
    end = len(names) if names is not None else 2**63
    row = next((row for row, value in enumerate(values) if not -1 <= value < end), None)
    if row is not None:
        expected = "0 or more" if names is None else f"0 to {end - 1}, its {end} classes"
        raise InputError(
            f"data.root={where}: column {printable(column)} holds {values[row]} in row {row}; expected {expected}, "
            "or -1 (no label)"
        )
    labels = np.array(values, dtype=np.int64)
    if (labels < 0).any():
        log.info("%s has rows without a label: its labels are not used", printable(where))
        return None
    return labels


def _class_names(root: str, split: str, dataset: Any, label_column: str | None) -> list[str] | None:
    """Of a split that has labels, in the order of their numbers; None where the labels are plain numbers."""
    import datasets

    column = _chosen(
        dataset.features,
        label_column,
        "data.label_column",
        datasets.ClassLabel,
        f"{root}, split {split}",
    )
    feature = dataset.features[column]
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _renumbered(
    labels: np.ndarray, here: list[str] | None, there: list[str] | None, where: str
) -> np.ndarray:
    """The labels, (M,) int64, of classes called `here`, as numbers of the training split, which calls them `there`.

    Raises:
        InputError: that split does not have one of the names, or only one of the two has names.
    """
    if here == there:
        return labels
    if here is None or there is None:
        raise InputError(
            f"data.root={where}: one of its labels and those of the split train has class names, the other none"
        )
    if unknown := sorted(set(here) - set(there)):
        raise InputError(
            f"data.root={where}: classes that the split train does not have: {printable(', '.join(unknown))}"
        )
    return np.array([there.index(name) for name in here])[labels]
