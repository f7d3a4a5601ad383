"""Lists of images that are kept in a file for the next start, as long as no folder changes."""

import json
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moco.data.files.archives import DAMAGED, read_arrays
from moco.data.files.images import EXTENSIONS
from moco.data.files.listing import (
    NUM_THREADS,
    Folder,
    PathList,
    check_folder,
    count_pages,
    list_trees,
)
from moco.errors import printable

log = logging.getLogger(__name__)

SETTLED_SECONDS = 2  # file systems count time in steps of up to this
ARRAYS = (
    "key",
    "text",
    "ends",
    "num_pages",
    "folder_text",
    "folder_ends",
    "folder_stamps",
)


@dataclass(frozen=True)
class Listing:
    """Image files, those of one folder after another, in sorted order each."""

    paths: PathList
    num_pages: np.ndarray
    """(files,) int64, the number of images in each file."""

    def where(self, chosen: np.ndarray) -> "Listing":
        """Return the files for which `chosen`, (files,) bool, is true."""
        return Listing(self.paths.where(chosen), self.num_pages[chosen])


class Outdated(Exception):
    """A kept listing cannot be used; the message says why."""


def listed(roots: Sequence[str], pages: str = "first", cache: Path | None = None) -> Listing:
    """Return the images below the folders; see `moco.data.files.listing.list_images`.

    Args:
        pages: ``first``: every file is one image; ``each``: every page of a TIFF file is one.
        cache: file that keeps the listing. It is used instead of listing the folders until one of
            them changes: when an entry is added, removed or renamed, not when a file is rewritten.

    Raises:
        InputError: a folder does not exist or holds no images.
    """
    for root in roots:
        check_folder(root)
    key = key_of(roots, pages)
    if cache is not None and cache.exists():
        try:
            return read_listing(cache, key)
        except Outdated as reason:
            log.info("listing the images below %s anew: %s", printable(", ".join(roots)), reason)
    now = time.time_ns()
    paths, folders, is_complete = list_trees(roots)
    num_pages = np.ones(len(paths), np.int64)
    if pages == "each":
        num_pages = count_pages(paths)
    files = Listing(paths, num_pages)
    # A folder that has just changed could change again within a step of the file system's clock.
    newest_change = max(folder.mtime_ns for folder in folders)
    is_settled = newest_change < now - SETTLED_SECONDS * 10**9
    # A folder that could not be read is listed at each start, to name it in a warning.
    if cache is not None and is_settled and is_complete:
        write_listing(cache, key, files, folders)
    return files


def key_of(roots: Sequence[str], pages: str) -> np.ndarray:
    """Return what a listing depends on, as uint8."""
    key = json.dumps({"format": 2, "roots": list(roots), "pages": pages, "extensions": EXTENSIONS})
    return np.frombuffer(key.encode(), dtype=np.uint8)


def write_listing(cache: Path, key: np.ndarray, files: Listing, folders: Sequence[Folder]) -> None:
    """Write a listing as a whole or not at all; warn if that fails."""
    folder_paths = PathList.of(folder.path for folder in folders)
    stamps = [stamp(folder.identity[1], folder.mtime_ns) for folder in folders]
    arrays: dict[str, Any] = {
        "key": key,
        "text": files.paths.text,
        "ends": files.paths.ends,
        "num_pages": files.num_pages,
        "folder_text": folder_paths.text,
        "folder_ends": folder_paths.ends,
        "folder_stamps": np.array(stamps),
    }
    temporary = cache.with_name(f".{cache.name}.{os.getpid()}")
    try:
        try:
            with open(temporary, "wb") as file:
                np.savez(file, **arrays)
            os.replace(temporary, cache)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        log.warning(
            "the list of images is not kept for the next start: %s: %s", cache, error.strerror
        )


def read_listing(cache: Path, key: np.ndarray) -> Listing:
    """Return the listing in a file.

    Raises:
        Outdated: it is damaged or of other folders, or a folder has changed.
    """
    try:
        arrays, _ = read_arrays(cache, ARRAYS)
        is_of_key = np.array_equal(arrays["key"], key)
        folders = PathList(arrays["folder_text"], arrays["folder_ends"])
        listing = Listing(PathList(arrays["text"], arrays["ends"]), arrays["num_pages"])
        stamps = arrays["folder_stamps"]
    except DAMAGED as error:
        raise Outdated(f"{cache} cannot be read ({error})") from error
    if not is_of_key:
        raise Outdated(f"{cache} is of other folders or settings")
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        now = np.array(list(pool.map(stamp_of, folders)))
    for place in np.flatnonzero((now != stamps).any(axis=1)).tolist():
        raise Outdated(f"{printable(folders[place])} has changed")
    return listing


def stamp_of(folder: str) -> tuple[int, int]:
    """Return the stamp of a folder as it is now; zeros if it is gone."""
    try:
        status = os.stat(folder)
    except OSError:
        return 0, 0
    return stamp(status.st_ino, status.st_mtime_ns)


def stamp(inode: int, mtime_ns: int) -> tuple[int, int]:
    """Return two numbers that tell a folder from others and from its earlier content.

    They fit into int64, as an inode need not.
    """
    return inode % 2**63, mtime_ns
