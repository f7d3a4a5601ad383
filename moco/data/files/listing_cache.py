"""Lists of images that are kept in a file for the next start, as long as no folder changes."""

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
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
    list_tree,
    start_of,
)
from moco.errors import printable

log = logging.getLogger(__name__)

SETTLED_SECONDS = 2  # file systems count time in steps of up to this
FOLDERS_PER_TASK = 256
ARRAYS = (
    "key",
    "text",
    "ends",
    "files_below",
    "num_pages",
    "folder_text",
    "folder_ends",
    "folder_times",
    "folder_files",
)


@dataclass(frozen=True)
class Listing:
    """Image files in sorted order."""

    paths: PathList
    num_pages: np.ndarray | None
    """(files,) int64, the number of images in each file; None if each holds one."""

    @classmethod
    def of_all(cls, parts: Sequence["Listing"]) -> "Listing":
        """Return several listings as one."""
        texts = []
        ends = []
        pages = []
        num_bytes = 0
        for part in parts:
            texts.append(part.paths.text)
            ends.append(part.paths.ends + num_bytes)
            num_bytes += len(part.paths.text)
            if part.num_pages is not None:
                pages.append(part.num_pages)
        paths = PathList(np.concatenate(texts), np.concatenate(ends))
        return cls(paths, np.concatenate(pages) if pages else None)

    def split(self, files_below: np.ndarray) -> list["Listing"]:
        """Return this listing in parts with so many files each; the opposite of `of_all`."""
        parts = []
        start = 0
        for end in np.cumsum(files_below).tolist():
            parts.append(self._between(start, end))
            start = end
        return parts

    def _between(self, start: int, end: int) -> "Listing":
        text_start = start_of(self.paths.ends, start)
        text_end = start_of(self.paths.ends, end)
        text = self.paths.text[text_start:text_end]
        paths = PathList(text, self.paths.ends[start:end] - text_start)
        num_pages = self.num_pages
        if num_pages is not None:
            num_pages = num_pages[start:end]
        return Listing(paths, num_pages)

    def where(self, chosen: np.ndarray) -> "Listing":
        """Return the files for which `chosen`, (files,) bool, is true."""
        num_pages = self.num_pages
        if num_pages is not None:
            num_pages = num_pages[chosen]
        return Listing(self.paths.where(chosen), num_pages)

    def of_images(self, values: np.ndarray) -> np.ndarray:
        """Return one value for each image, given one for each file."""
        if self.num_pages is None:
            return values
        return np.repeat(values, self.num_pages)


class Outdated(Exception):
    """A kept listing cannot be used; the message says why."""


def listed(roots: Sequence[str], pages: str = "first", cache: Path | None = None) -> list[Listing]:
    """Return the images below each folder; see `moco.data.files.listing.list_images`.

    Args:
        pages: ``first``: every file is one image; ``each``: every page of a TIFF file is one.
        cache: file that keeps the listing. It is used instead of listing the folders until one of
            them changes: when an entry is added, removed or renamed, not when a file is rewritten.

    Raises:
        InputError: a folder does not exist or holds no images.
    """
    for root in roots:
        check_folder(root)
    if cache is not None and cache.exists():
        try:
            return read_listing(cache, roots, pages)
        except Outdated as reason:
            log.info("listing the images below %s anew: %s", printable(", ".join(roots)), reason)
    now = time.time_ns()
    parts: list[Listing] = []
    folders: list[Folder] = []
    # A folder that could not be read is listed at each start, to name it in a warning.
    may_be_kept = True
    for root in roots:
        paths, folders_below, is_complete = list_tree(root)
        num_pages = None
        if pages == "each":
            num_pages = count_pages(paths)
        parts.append(Listing(paths, num_pages))
        folders += folders_below
        may_be_kept = may_be_kept and is_complete
    # A folder that has just changed could change again within a step of the file system's clock.
    newest_change = max(folder.mtime_ns for folder in folders)
    is_settled = newest_change < now - SETTLED_SECONDS * 10**9
    if cache is not None and is_settled and may_be_kept:
        write_listing(cache, key_of(roots, pages), parts, folders)
    return parts


def key_of(roots: Sequence[str], pages: str) -> np.ndarray:
    """Return what a listing depends on, as uint8."""
    key = json.dumps({"format": 1, "roots": list(roots), "pages": pages, "extensions": EXTENSIONS})
    return np.frombuffer(key.encode(), dtype=np.uint8)


def write_listing(
    cache: Path, key: np.ndarray, parts: Sequence[Listing], folders: Sequence[Folder]
) -> None:
    """Write a listing as a whole or not at all; warn if that fails."""
    files = Listing.of_all(parts)
    folder_paths = PathList.of(folder.path for folder in folders)
    stamps = []
    files_in_folder = []
    for folder in folders:
        stamps.append(stamp(folder.identity[1], folder.mtime_ns))
        files_in_folder.append(folder.num_files)
    num_pages = files.num_pages
    if num_pages is None:
        num_pages = np.zeros(0, np.int64)
    arrays: dict[str, Any] = {
        "key": key,
        "text": files.paths.text,
        "ends": files.paths.ends,
        "files_below": np.array([len(part.paths) for part in parts]),
        "num_pages": num_pages,
        "folder_text": folder_paths.text,
        "folder_ends": folder_paths.ends,
        "folder_times": np.array(stamps),
        "folder_files": np.array(files_in_folder),
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


def read_listing(cache: Path, roots: Sequence[str], pages: str) -> list[Listing]:
    """Return the listing in a file.

    Raises:
        Outdated: it is damaged or of other folders, or a folder has changed.
    """
    try:
        arrays, _ = read_arrays(cache, ARRAYS)
        check_listing(arrays)
    except DAMAGED as error:
        raise Outdated(f"{cache} cannot be read ({error})") from error
    if not np.array_equal(arrays["key"], key_of(roots, pages)):
        raise Outdated(f"{cache} is of other folders or settings")
    folders = PathList(arrays["folder_text"], arrays["folder_ends"])
    for path in changed_folders(list(folders), arrays["folder_times"]):
        raise Outdated(f"{printable(path)} has changed")
    paths = PathList(arrays["text"], arrays["ends"])
    num_pages = arrays["num_pages"] if pages == "each" else None
    return Listing(paths, num_pages).split(arrays["files_below"])


def check_listing(arrays: dict[str, np.ndarray]) -> None:
    """Raise ValueError if an array is missing, or if their lengths do not fit each other."""
    missing = sorted(set(ARRAYS) - set(arrays))
    if missing:
        raise ValueError(f"it does not hold {', '.join(missing)}")
    num_files = len(arrays["ends"])
    if num_files != arrays["folder_files"].sum() or num_files != arrays["files_below"].sum():
        raise ValueError("its parts do not fit each other")


def changed_folders(folders: list[str], times: np.ndarray) -> Iterator[str]:
    """Yield the folders that have changed or were replaced, given their stamps, (folders, 2)."""
    starts = range(0, len(folders), FOLDERS_PER_TASK)
    tasks = [folders[start : start + FOLDERS_PER_TASK] for start in starts]
    # Threads, since a file system on a network answers slowly, but many requests at a time.
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for start, stamps in zip(starts, pool.map(stamps_of, tasks), strict=True):
            expected = times[start : start + FOLDERS_PER_TASK]
            is_changed = (np.array(stamps) != expected).any(axis=1)
            for place in np.flatnonzero(is_changed):
                yield folders[start + place]


def stamps_of(folders: list[str]) -> list[tuple[int, int]]:
    """Return the stamp of each folder as it is now; zeros if it is gone."""
    stamps = []
    for path in folders:
        try:
            status = os.stat(path)
        except OSError:
            stamps.append((0, 0))
        else:
            stamps.append(stamp(status.st_ino, status.st_mtime_ns))
    return stamps


def stamp(inode: int, mtime_ns: int) -> tuple[int, int]:
    """Return two numbers that tell a folder from others and from its earlier content.

    They fit into int64, as an inode need not.
    """
    return inode % 2**63, mtime_ns
