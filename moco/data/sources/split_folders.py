"""The folders of a dataset that are for training and for validation, by their names.

torch is not imported, so that a wrong folder shows at once.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from moco.data.files.listing import is_folder, is_left_out_folder
from moco.data.sources.label_files import first_few
from moco.errors import printable

log = logging.getLogger(__name__)

# In lower case. The first one that exists is taken.
TRAINING_FOLDERS = ("train", "training")
VALIDATION_FOLDERS = ("val", "valid", "validation", "test", "testing")
SPLIT_FOLDERS = (*TRAINING_FOLDERS, *VALIDATION_FOLDERS)
MOST_NAMED = 10
"""Folders in one line of the log."""


class Split(NamedTuple):
    """The names of the folders of a split; None where there is no such folder."""

    train: str | None
    validation: str | None


def find_split(parent: str | Path, has_classes: bool = True) -> Split:
    """Return which folders in `parent` are for training and validation, in any case.

    The log says what is taken for what.

    Args:
        parent: the folder.
        has_classes: the folders of the split hold a folder for each class. Then a folder called
            train without sub-folders is a class itself if others are beside it.
    """
    folders = folders_in(parent)
    train = first_of(folders, TRAINING_FOLDERS)
    validation = first_of(folders, VALIDATION_FOLDERS)
    others = [name for name in folders if name not in (train, validation)]
    where = printable(str(parent))
    shown = first_few(others, MOST_NAMED)
    if train is not None:
        are_splits = all(name.lower() in SPLIT_FOLDERS for name in others)
        if has_classes and not are_splits and not folders_in(Path(parent, train)):
            return Split(None, None)
        taken = f"{train} is trained on"
        if validation is not None:
            taken += f", {validation} is held out"
        if others:
            level = logging.WARNING
            if are_splits:  # a test folder beside the validation folder is usual
                level = logging.INFO
            log.log(level, "%s: %s, and the other folders are not used: %s", where, taken, shown)
        else:
            log.info("%s: %s", where, taken)
        return Split(train, validation)
    if has_classes and validation is not None and folders_in(Path(parent, validation)):
        log.warning(
            "%s: there is a folder %s, but none to train on (%s); it is a class as the others: %s",
            where,
            validation,
            " or ".join(TRAINING_FOLDERS),
            shown,
        )
    return Split(None, validation)


def folders_in(parent: str | Path) -> list[str]:
    """Return the names of the folders in a folder, in alphabetical order, without hidden ones."""
    names = []
    try:
        with os.scandir(parent) as entries:
            for entry in entries:
                if is_folder(entry) and not is_left_out_folder(entry.name):
                    names.append(entry.name)
    except OSError:  # what is wrong is said where its images are listed
        return []
    return sorted(names)


def first_of(folders: Sequence[str], wanted: Sequence[str]) -> str | None:
    """Return the first folder that has one of the wanted names, in their order and in any case."""
    for name in wanted:
        if name in folders:  # the lower case is the usual one
            return name
        for folder in folders:
            if folder.lower() == name:
                return folder
    return None
