"""Images whose classes are the names of folders.

Letters: M images.
"""

import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from moco.data.files.listing_cache import Listing
from moco.errors import InputError, printable

HASHES = 2**32  # of zlib.crc32


@dataclass(frozen=True)
class ClassFolders:
    """Files below root/CLASS."""

    root: str
    files: Listing

    @classmethod
    def of(cls, root: str, files: Listing) -> "ClassFolders":
        """Of what lies below root, without the files beside the class folders.

        Raises:
            InputError: there are no others.
        """
        in_folder = np.array([b"/" in name for name in files.paths.below(root)])
        if not in_folder.any():
            raise InputError(
                f"data.root={root}: no class sub-folders with images; data=images takes a plain folder tree"
            )
        return cls(root, files.where(in_folder))

    def where(self, chosen: np.ndarray) -> "ClassFolders":
        """Those of the files for which `chosen`, (files,) bool, is true."""
        return ClassFolders(self.root, self.files.where(chosen))

    def names(self) -> list[bytes]:
        """The files' paths below root."""
        return self.files.paths.below(self.root)

    def classes(self) -> list[str]:
        """The names of the folders, each once, in sorted order."""
        return sorted({os.fsdecode(name) for name in {class_of(path) for path in self.names()}})

    def labels(self, classes: list[str]) -> np.ndarray:
        """Each image's place in `classes`, (M,) int64.

        Raises:
            InputError: there are classes that are not among them.
        """
        unknown = sorted(set(self.classes()) - set(classes))
        if unknown:
            raise InputError(
                f"data.root={self.root}: classes that the training images do not have: {printable(', '.join(unknown))}"
            )
        place = {os.fsencode(name): number for number, name in enumerate(classes)}
        return self.files.of_images(np.array([place[class_of(path)] for path in self.names()]))


def class_of(path: bytes) -> bytes:
    """The first folder in a path."""
    return path.partition(b"/")[0]


def is_held_out(names: Iterable[bytes], share: float) -> np.ndarray:
    """(M,) bool: about that share of the names, whichever others there are beside them.

    A larger share holds out all that a smaller one does: a hash gives every name a place between 0 and 1, and those below
    `share` are held out. The hash's last decimal digit counts most, so that a tenth are the names whose hash ends in 0.
    """
    of_each_digit = HASHES // 10 + 1
    hashes = np.fromiter(map(zlib.crc32, names), dtype=np.int64)
    return hashes % 10 * of_each_digit + hashes // 10 < round(share * 10 * of_each_digit)
