"""Files and folders among images that are no images of the dataset.

They were written by the programs of this project, or by the system. A run inside of a data folder
must not train on its own plots.
"""

import os
import zipfile
from collections.abc import Collection

from moco.data.files.archives import DAMAGED

SOFTWARE = "moco"
"""What the plots of this project have in the text chunk ``Software`` of their PNG file."""
PNG_MARK = b"tEXtSoftware\0" + SOFTWARE.encode()
NUM_BYTES_OF_MARK = 512
"""The chunk stands in so many first bytes: writers put it before the pixels."""
ARCHIVES = (
    {"features.npy", "names.npy"},  # moco.embed
    {"confusion.npy", "classes.npy"},  # moco.evaluate
    {"text.npy", "ends.npy", "folder_stamps.npy"},  # a kept list of images
)
"""Members of the .npz files that the programs write."""
FOLDERS = (
    {".hydra", "checkpoints"},  # a run
    {".hydra", "status.json"},
    {"metrics.json", "confusion.npz"},  # moco.evaluate
    {"index.json", "index.npz"},  # a packed copy
    {"predict.json", "classes.json"},  # moco.predict
)
"""Names that tell a folder that the programs wrote."""
NAMES_OF_FOLDERS = frozenset().union(*FOLDERS)
SYSTEM_FOLDERS = frozenset(
    {
        "__MACOSX",
        "@eaDir",
        "#recycle",
        "@Recycle",
        "$RECYCLE.BIN",
        "System Volume Information",
        "lost+found",
    }
)
"""Folders of archivers, network stores and systems. Their other folders are hidden ones."""


def is_written_folder(names: Collection[str]) -> bool:
    """Return whether the names in a folder tell that a program of this project wrote it."""
    return any(told.issubset(names) for told in FOLDERS)


def is_written_file(path: str) -> bool:
    """Return whether a .png or .npz file is a plot or a table that our programs wrote.

    A file that cannot be read is not.
    """
    # A pipe would wait for a writer.
    if not os.path.isfile(path):
        return False
    try:
        if path.lower().endswith(".npz"):
            with zipfile.ZipFile(path) as archive:
                members = archive.namelist()
            return any(told.issubset(members) for told in ARCHIVES)
        with open(path, "rb") as file:
            return PNG_MARK in file.read(NUM_BYTES_OF_MARK)
    except DAMAGED:
        return False
