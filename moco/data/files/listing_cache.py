"""Lists of images that are kept in a file from one start to the next, and checked by the folders' times.

Letters: M images.
"""

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
from moco.data.files.listing import NUM_THREADS, Folder, PathList, check_folder, count_pages, walked
from moco.errors import printable

log = logging.getLogger(__name__)

SETTLED_SECONDS = (
    2  # file systems count time in steps up to this: a folder may change again and keep its time
)
CHUNK = 256  # folders that one thread asks for in a row
NAMES = (
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
    """(files,) int64: how many images each holds; None: one."""

    @classmethod
    def of_all(cls, parts: Sequence["Listing"]) -> "Listing":
        """One after the other."""
        text = np.concatenate([part.paths.text for part in parts])
        sizes = np.cumsum([0, *(len(part.paths.text) for part in parts)])
        ends = np.concatenate(
            [part.paths.ends + start for part, start in zip(parts, sizes, strict=False)]
        )
        pages = [part.num_pages for part in parts if part.num_pages is not None]
        return cls(PathList(text, ends), np.concatenate(pages) if pages else None)

    def split(self, files_below: np.ndarray) -> Iterator["Listing"]:
        """The opposite of `of_all`, with as many files in each part."""
        start = 0
        for end in np.cumsum(files_below):
            text_start, text_end = (
                int(self.paths.ends[place - 1]) if place else 0 for place in (start, end)
            )
            paths = PathList(
                self.paths.text[text_start:text_end], self.paths.ends[start:end] - text_start
            )
            yield Listing(paths, None if self.num_pages is None else self.num_pages[start:end])
            start = end

    def where(self, chosen: np.ndarray) -> "Listing":
        """Those of the files for which `chosen`, (files,) bool, is true."""
        return Listing(
            self.paths.where(chosen), None if self.num_pages is None else self.num_pages[chosen]
        )

    def of_images(self, of_files: np.ndarray) -> np.ndarray:
        """A value for each file as one for each image, (M,)."""
        return of_files if self.num_pages is None else np.repeat(of_files, self.num_pages)


class Outdated(Exception):
    """A kept listing cannot be used; the message says why."""


def listed(roots: Sequence[str], pages: str = "first", cache: Path | None = None) -> list[Listing]:
    """The images below each of the folders, as of `moco.data.files.listing.list_images`.

    Args:
        pages: ``first``: every file is one image; ``each``: every page of a TIFF file.
        cache: a file that keeps the listing. It stands in for walking the folders as long as none of them has changed, which
            a folder does when something in it is added, removed or renamed, and not when a file is written anew.

    Raises:
        InputError: a folder does not exist or holds no images.
    """
    for root in roots:
        check_folder(root)
    if cache is not None and cache.exists():
        try:
            return read(cache, roots, pages)
        except Outdated as reason:
            log.info("listing the images below %s anew: %s", printable(", ".join(roots)), reason)
    now = time.time_ns()
    walks = [walked(root) for root in roots]
    parts = [
        Listing(paths, count_pages(paths) if pages == "each" else None) for paths, _, _ in walks
    ]
    folders = [folder for _, below, _ in walks for folder in below]
    is_settled = max(folder.mtime_ns for folder in folders) < now - SETTLED_SECONDS * 10**9
    # A folder that could not be read is named in a warning, at each start, until it can.
    if cache is not None and is_settled and all(is_complete for _, _, is_complete in walks):
        write(cache, key_of(roots, pages), parts, folders)
    return parts


def key_of(roots: Sequence[str], pages: str) -> np.ndarray:
    """What a listing is of, as uint8."""
    key = json.dumps({"format": 1, "roots": list(roots), "pages": pages, "extensions": EXTENSIONS})
    return np.frombuffer(key.encode(), dtype=np.uint8)


def write(
    cache: Path, key: np.ndarray, parts: Sequence[Listing], folders: Sequence[Folder]
) -> None:
    """Put the listing in place of an older one, at once."""
    everything, below = Listing.of_all(parts), PathList.of(folder.path for folder in folders)
    arrays: dict[str, Any] = {
        "key": key,
        "text": everything.paths.text,
        "ends": everything.paths.ends,
        "files_below": np.array([len(part.paths) for part in parts]),
        "num_pages": np.zeros(0, np.int64)
        if everything.num_pages is None
        else everything.num_pages,
        "folder_text": below.text,
        "folder_ends": below.ends,
        "folder_times": np.array(
            [stamp(folder.identity[1], folder.mtime_ns) for folder in folders]
        ),
        "folder_files": np.array([folder.num_files for folder in folders]),
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


def read(cache: Path, roots: Sequence[str], pages: str) -> list[Listing]:
    """The listing in a file.

    Raises:
        Outdated: it is damaged, or of other folders, or one of the folders has changed.
    """
    try:
        arrays, present = read_arrays(cache, NAMES)
        if missing := set(NAMES) - set(present):
            raise ValueError(f"it does not hold {', '.join(sorted(missing))}")
        paths = PathList(arrays["text"], arrays["ends"])
        folders = PathList(arrays["folder_text"], arrays["folder_ends"])
        if len(paths) != arrays["folder_files"].sum() or len(paths) != arrays["files_below"].sum():
            raise ValueError("its parts do not fit each other")
    except DAMAGED as error:
        raise Outdated(f"{cache} cannot be read ({error})") from error
    if not np.array_equal(arrays["key"], key_of(roots, pages)):
        raise Outdated(f"{cache} is of other folders or settings")
    for path in changed(list(folders), arrays["folder_times"]):
        raise Outdated(f"{printable(path)} has changed")
    num_pages = arrays["num_pages"] if pages == "each" else None
    return list(Listing(paths, num_pages).split(arrays["files_below"]))


def changed(folders: list[str], times: np.ndarray) -> Iterator[str]:
    """Those of the folders that are not the ones they were, a stamp each, or that have changed since."""

    def now(start: int) -> list[tuple[int, int]]:
        return [stamp_of(path) for path in folders[start : start + CHUNK]]

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for start, found in zip(
            range(0, len(folders), CHUNK), pool.map(now, range(0, len(folders), CHUNK)), strict=True
        ):
            is_other = (np.array(found) != times[start : start + CHUNK]).any(axis=1)
            yield from (folders[start + place] for place in np.flatnonzero(is_other))


def stamp_of(path: str) -> tuple[int, int]:
    """Zeros where there is nothing."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return stamp(status.st_ino, status.st_mtime_ns)


def stamp(inode: int, mtime_ns: int) -> tuple[int, int]:
    """Tells a folder from others and from what it was before; fits into int64, as an inode need not."""
    return inode % 2**63, mtime_ns
