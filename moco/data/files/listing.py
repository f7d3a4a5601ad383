"""Lists of the images below a folder, in sorted order, which a file can keep for the next start.

Trees of millions of files are listed in seconds, so this code avoids questions to the file system.
"""

import itertools
import json
import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moco.data.files.archives import DAMAGED, read_arrays
from moco.data.files.images import EXTENSIONS, UnreadableImage, header, pillow_warnings_ignored
from moco.errors import InputError, printable

log = logging.getLogger(__name__)

NUM_THREADS = 16  # a file system on a network answers slowly, but many requests at a time
FOLDERS_PER_BATCH = 64  # progress is reported between two batches
PROGRESS_SECONDS = 10.0
SETTLED_SECONDS = 2  # file systems count time in steps of up to this
ARRAYS = ("key", "text", "ends", "num_pages", "folder_text", "folder_ends", "folder_stamps")


@dataclass(frozen=True)
class PathList(Sequence[str]):
    """Paths in two arrays; a list of millions of str would take gigabytes."""

    text: np.ndarray
    """uint8, the bytes of all paths with a zero after each."""
    ends: np.ndarray
    """(paths,) int64, the place in `text` where the next path starts."""

    @classmethod
    def of(cls, paths: Iterable[str]) -> "PathList":
        """Return these paths as a PathList."""
        joined = "\0".join([*paths, ""])
        text = np.frombuffer(bytearray(os.fsencode(joined)), dtype=np.uint8)
        return cls(text, np.flatnonzero(text == 0) + 1)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        start = start_of(self.ends, index)
        # Without the zero after it.
        end = int(self.ends[index]) - 1
        return os.fsdecode(self.text[start:end].tobytes())

    def __iter__(self) -> Iterator[str]:
        paths = os.fsdecode(self.text.tobytes()).split("\0")
        return iter(paths[:-1])

    def below(self, root: str) -> list[bytes]:
        """Return the paths relative to `root`; all of them have to be below it."""
        start = len(os.fsencode(os.path.join(root, "")))
        paths = self.text.tobytes().split(b"\0")[:-1]
        return [path[start:] for path in paths]

    def where(self, chosen: np.ndarray) -> "PathList":
        """Return the paths for which `chosen`, (paths,) bool, is true."""
        lengths = np.diff(self.ends, prepend=0)
        is_chosen_byte = np.repeat(chosen, lengths)
        return PathList(self.text[is_chosen_byte], np.cumsum(lengths[chosen]))


def start_of(ends: Any, index: int) -> int:
    """Return where an entry starts, which is where the entry before it ends."""
    if index == 0:
        return 0
    return int(ends[index - 1])


class Folder(NamedTuple):
    """What one folder holds."""

    path: str
    status: os.stat_result
    folders: list[str]
    """Paths of the sub-folders."""
    links: list[str]
    """Paths of the symbolic links to folders."""
    images: list[str]
    """Paths of the images in the folder itself."""


def list_images(root: str | Path) -> list[str]:
    """Return the paths of all images below a folder in sorted order; the extension decides.

    Symbolic links are followed, but not to a folder that contains `root`. A folder that several
    paths lead to is listed once, under its own name if it is below `root`. A broken link counts as
    an image that cannot be read. A folder that cannot be read is left out with a warning.

    Raises:
        InputError: the folder does not exist or holds no images.
    """
    paths, _, _ = list_trees([str(root)])
    return list(paths)


def list_trees(roots: Sequence[str]) -> tuple[PathList, list[Folder], bool]:
    """Return the images of `list_images`, the listed folders, and whether all could be read."""
    paths: list[str] = []
    folders: list[Folder] = []
    is_complete = True
    for root in roots:
        check_folder(root)
        found, could_be_read = list_folders(root)
        images = sorted(itertools.chain.from_iterable(folder.images for folder in found))
        if not images:
            looked_for = ", ".join(EXTENSIONS)
            raise InputError(f"data.root={root}: no images in there (looked for {looked_for})")
        paths += images
        folders += found
        is_complete = is_complete and could_be_read
    return PathList.of(paths), folders, is_complete


def check_folder(root: str) -> None:
    """Raise InputError if there is no such folder."""
    if not os.path.isdir(root):
        raise InputError(f"data.root={root}: no such folder")


def list_folders(root: str) -> tuple[list[Folder], bool]:
    """Return `root` and each folder below it once, and whether all could be read.

    This is not `os.walk`, which recurses in Python 3.11 and older, and which takes a folder by the
    first of its names that it meets.
    """
    pending = deque([root])
    linked: deque[str] = deque()  # links wait until all folders are listed by their own names
    # A link to a folder above root would lead to what is beside root.
    seen = {identity(os.stat(parent)) for parent in Path(root).resolve().parents}
    found: list[Folder] = []
    is_complete = True
    num_files = 0
    last_report = time.perf_counter()
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        while pending or linked:
            if not pending:
                pending.append(linked.popleft())
            size = min(FOLDERS_PER_BATCH, len(pending))
            batch = [pending.popleft() for _ in range(size)]
            for folder in pool.map(scan_folder, batch):
                if folder is None:
                    is_complete = False
                elif identity(folder.status) not in seen:
                    seen.add(identity(folder.status))
                    found.append(folder)
                    pending += folder.folders
                    linked += folder.links
                    num_files += len(folder.images)
            if time.perf_counter() - last_report > PROGRESS_SECONDS:
                last_report = time.perf_counter()
                log.info("listing %s: %s images so far", printable(root), f"{num_files:,}")
    return found, is_complete


def identity(status: os.stat_result) -> tuple[int, int]:
    """Return what is the same for all paths that lead to a folder."""
    return status.st_dev, status.st_ino


def scan_folder(path: str) -> Folder | None:
    """Return a folder's content; warn if it cannot be read, and return None."""
    prefix = os.path.join(path, "")
    folders: list[str] = []
    links: list[str] = []
    images: list[str] = []
    try:
        # Before its entries are read, so that a change in between counts as a later one.
        status = os.stat(path)
        with os.scandir(path) as entries:
            for entry in entries:
                if not is_folder(entry):
                    if entry.name.lower().endswith(EXTENSIONS):
                        images.append(prefix + entry.name)
                elif entry.is_symlink():
                    links.append(prefix + entry.name)
                else:
                    folders.append(prefix + entry.name)
    except OSError as error:
        shown = printable(path)
        log.warning("left out a folder that cannot be read: %s (%s)", shown, error.strerror)
        return None
    return Folder(path, status, sorted(folders), sorted(links), images)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a link to one.

    `os.path.isdir` would ask the file system about plain files too.
    """
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def count_pages(paths: PathList) -> np.ndarray:
    """Return the number of images in each file, (files,) int64.

    A TIFF file may hold several; other files and unreadable files count as one image.
    """
    num_pages = np.ones(len(paths), dtype=np.int64)
    endings = (".tif", ".tiff")
    tiff_files = [index for index, path in enumerate(paths) if path.lower().endswith(endings)]
    with pillow_warnings_ignored(), ThreadPoolExecutor(NUM_THREADS) as pool:
        num_pages[tiff_files] = list(pool.map(pages_of, map(paths.__getitem__, tiff_files)))
    return num_pages


def pages_of(path: str) -> int:
    """Return the number of images in a file; the caller ignores Pillow's warnings."""
    try:
        return header(path).pages
    except UnreadableImage:
        return 1


log = logging.getLogger(__name__)


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
    num_pages = count_pages(paths) if pages == "each" else np.ones(len(paths), np.int64)
    files = Listing(paths, num_pages)
    # A folder that has just changed could change again within a step of the file system's clock.
    newest_change = max(folder.status.st_mtime_ns for folder in folders)
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
    # Two programs may write the listing at the same time.
    temporary = cache.with_name(f".{cache.name}.{os.getpid()}")
    try:
        try:
            with open(temporary, "wb") as file:
                np.savez(
                    file,
                    key=key,
                    text=files.paths.text,
                    ends=files.paths.ends,
                    num_pages=files.num_pages,
                    folder_text=folder_paths.text,
                    folder_ends=folder_paths.ends,
                    folder_stamps=np.array([stamp(folder.status) for folder in folders]),
                )
            os.replace(temporary, cache)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror
        log.warning("the list of images is not kept for the next start: %s: %s", cache, reason)


def read_listing(cache: Path, key: np.ndarray) -> Listing:
    """Return the listing in a file.

    Raises:
        Outdated: it is damaged or of other folders, or a folder has changed.
    """
    try:
        arrays, _ = read_arrays(cache, ARRAYS)
        key_there, text, ends, num_pages, *of_folders, stamps = [arrays[name] for name in ARRAYS]
    except DAMAGED as error:
        raise Outdated(f"{cache} cannot be read ({error})") from error
    folders = PathList(*of_folders)
    if not np.array_equal(key_there, key):
        raise Outdated(f"{cache} is of other folders or settings")
    # On a network each question takes milliseconds, but many can be asked at a time.
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        now = np.array(list(pool.map(stamp_of, folders)))
    for place in np.flatnonzero((now != stamps).any(axis=1)).tolist():
        raise Outdated(f"{printable(folders[place])} has changed")
    return Listing(PathList(text, ends), num_pages)


def stamp_of(folder: str) -> tuple[int, int]:
    """Return the stamp of a folder as it is now; zeros if it is gone."""
    try:
        return stamp(os.stat(folder))
    except OSError:
        return 0, 0


def stamp(status: os.stat_result) -> tuple[int, int]:
    """Return two numbers that tell a folder from others and from its earlier content.

    They fit into int64, as an inode need not.
    """
    return status.st_ino % 2**63, status.st_mtime_ns
