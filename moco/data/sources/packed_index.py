"""The two index files of a packed copy, ``index.json`` and ``index.npz``, held to their form before anything relies on it.

A copy may come from elsewhere. What passes here has all its keys and arrays, of the right types, whose numbers go together
and whose files lie in the copy's folder.

Letters: M images.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moco.data.files.archives import DAMAGED, read_arrays
from moco.errors import InputError, printable

INDEX = "index.json"
TABLE = "index.npz"
COLUMNS = {
    "rows": np.int64,  # of the source: first the images to train on, then the others
    "offsets": np.int64,  # bytes from the start of the file
    "lengths": np.int64,  # bytes
    "heights": np.int32,
    "widths": np.int32,
    "checksums": np.int64,  # CRC-32 of the bytes
}
SIDES = ("bank", "queries")
ARRAYS = COLUMNS | {"names": np.uint8, "name_ends": np.int64}
SIDE_ARRAYS = {f"{side}_{what}": np.int64 for side in SIDES for what in ("rows", "labels")}


def is_count(value: Any) -> bool:
    return type(value) is int and value >= 0  # True is an int, too


def is_file_name(value: Any) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and not {"/", "\0"} & set(value)


def is_skipped(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, list) and len(one) == 2 and is_count(one[0]) and isinstance(one[1], str)
        for one in value
    )


Form = Mapping[str, tuple[str, Callable[[Any], bool]]]
"""Of each key what is expected there, in words and as a check."""
INDEX_FORM: Form = {
    "format": ("array or shards", lambda value: value in ("array", "shards")),
    "complete": ("true or false", lambda value: isinstance(value, bool)),
    "num_images": ("a number of images, or null", lambda value: value is None or is_count(value)),
    "image_size": ("a number of px, 1 or more", lambda value: is_count(value) and value > 0),
    "settings": (
        "settings, quality among them",
        lambda value: isinstance(value, dict) and "quality" in value,
    ),
    "source": (
        "its number of images",
        lambda value: isinstance(value, dict) and is_count(value.get("images")),
    ),
    "parts": (
        "a list",
        lambda value: isinstance(value, list) and all(isinstance(part, dict) for part in value),
    ),
}
PART_FORM: Form = {
    "file": ("the name of a file in this folder", is_file_name),
    "stop": ("a number, 0 or more", is_count),
    "images": ("a number, 0 or more", is_count),
    "bytes": ("a number, 0 or more", is_count),
    "skipped": ("a list of rows and reasons", is_skipped),
}


def read_index(root: str) -> dict[str, Any]:
    """``index.json`` of a copy, finished or not.

    Raises:
        InputError: the folder holds no copy, or one of another version, or one whose index is damaged.
    """
    path = Path(root, INDEX)
    try:
        index: dict[str, Any] = json.loads(path.read_text())
        version = index["version"]
    except FileNotFoundError as error:
        raise InputError(
            f"{root}: no packed copy there ({path} is missing); moco.pack writes one"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path}: not the index of a packed copy ({printable(str(error))})"
        ) from error
    if version != 1:
        raise InputError(
            f"{path}: version {printable(str(version))} of a packed copy; this program reads version 1"
        )
    rename_old_keys(index)
    check_form(path, index, INDEX_FORM)
    for number, part in enumerate(index["parts"]):
        check_form(path, part, PART_FORM, f"parts[{number}].")
    num_images = sum(part["images"] for part in index["parts"])
    if index["complete"] and (index["num_images"] is None or index["num_images"] > num_images):
        raise InputError(
            f"{path}: num_images={index['num_images']}, and its parts hold {num_images}; pack it anew"
        )
    return index


def rename_old_keys(index: dict[str, Any]) -> None:
    """Give the keys of a copy that was packed by an earlier version, which said "pictures", today's names."""
    parts = index.get("parts")
    for section in [index.get("source"), *(parts if isinstance(parts, list) else [])]:
        if isinstance(section, dict) and "pictures" in section:
            section["images"] = section.pop("pictures")
    if "num_pictures" in index:
        index["num_images"] = index.pop("num_pictures")


def check_form(path: Path, found: dict[str, Any], form: Form, prefix: str = "") -> None:
    """Raises InputError for the first key that is missing or holds something else; it names the file and the key."""
    for key, (expected, is_right) in form.items():
        if key not in found:
            raise InputError(f"{path}: {prefix}{key} is missing; pack it anew")
        if not is_right(found[key]):
            got = printable(json.dumps(found[key]))[:80]
            raise InputError(f"{path}: {prefix}{key}={got}: expected {expected}; pack it anew")


def check_finished(root: str, index: dict[str, Any]) -> None:
    """Raises InputError if the copy is not complete."""
    if not index["complete"]:
        raise InputError(
            f"data.root={root}: not finished; start the same moco.pack again, which goes on where it stopped"
        )


def read_table(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an ``index.npz``, or of one part of it.

    Raises:
        InputError: missing or damaged.
    """
    try:
        table, _ = read_arrays(path, (*ARRAYS, *SIDE_ARRAYS))
        check_arrays(table)
    except DAMAGED as error:
        reason = (
            error.strerror
            if isinstance(error, OSError) and error.strerror
            else printable(str(error))
        )
        raise InputError(f"{path}: damaged ({reason}); pack it anew") from error
    return table


def check_arrays(table: Mapping[str, np.ndarray]) -> None:
    """Hold the arrays' types and shapes, and the numbers in them, to what `moco.data.sources.packed` does with them.

    Raises:
        ValueError: for the first that is otherwise.
    """
    for name, dtype in ARRAYS.items():
        if name not in table:
            raise ValueError(f"{name} is missing")
        check_array(
            name, table[name], dtype, None if name in ("rows", "names") else len(table["rows"])
        )
    for name in ("lengths", "heights", "widths"):
        check_range(name, table[name], 1)
    check_range("rows", table["rows"], 0)
    check_range("offsets", table["offsets"], 0)
    name_lengths = np.diff(table["name_ends"], prepend=0)
    if (name_lengths < 0).any() or name_lengths.sum() != len(table["names"]):
        raise ValueError("name_ends does not go with names")
    for side in SIDES:
        rows, labels = table.get(f"{side}_rows"), table.get(f"{side}_labels")
        if rows is None and labels is None:
            continue
        if rows is None or labels is None:
            raise ValueError(f"{side}_{'rows' if rows is None else 'labels'} is missing")
        check_array(f"{side}_rows", rows, np.int64)
        check_array(f"{side}_labels", labels, np.int64, len(rows))
        check_range(f"{side}_rows", rows, 0, len(table["rows"]))
        check_range(f"{side}_labels", labels, 0)


def check_array(name: str, array: np.ndarray, dtype: Any, length: int | None = None) -> None:
    """Raises ValueError if it is not one-dimensional, of that type and, unless None, length."""
    if array.dtype != dtype or array.ndim != 1 or length not in (None, len(array)):
        expected = f"{np.dtype(dtype)} ({'any' if length is None else length},)"
        raise ValueError(f"{name} is {array.dtype} {array.shape}, expected {expected}")


def check_range(name: str, array: np.ndarray, least: int, stop: int | None = None) -> None:
    """Raises ValueError for numbers below `least`, or from `stop` on."""
    if (array < least).any() or (stop is not None and (array >= stop).any()):
        raise ValueError(
            f"{name} has numbers below {least}" + ("" if stop is None else f" or above {stop - 1}")
        )
