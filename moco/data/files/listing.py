"""Folder trees to sorted lists of images: walked once, kept in a file, walked again when a folder has changed.

Letters: M images.
"""

import logging
import os
import resource
import time
from bisect import bisect
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moco.data.files.images import EXTENSIONS, UnreadableImage, opened, pillow_warnings_ignored
from moco.errors import InputError, printable

log = logging.getLogger(__name__)

# A thread that lists a folder lets go of Python's lock at each entry, so that several of them are two to three times slower
# than one where the system has the answers at hand; where it has to fetch them, from a network say, they wait together.
NUM_THREADS = 16
BATCH = 64  # folders between two looks at the clock
PROGRESS_SECONDS = 10.0


@dataclass(frozen=True)
class PathList(Sequence[str]):
    """Paths as two arrays, since a list of millions of str takes gigabytes."""

    text: np.ndarray
    """uint8: the bytes of all paths, a zero after each."""
    ends: np.ndarray
    """(M,) int64: where in `text` the next path starts."""

    @classmethod
    def of(cls, paths: Iterable[str]) -> "PathList":
        return cls.of_bytes(os.fsencode(path) + b"\0" for path in paths)

    @classmethod
    def of_bytes(cls, parts: Iterable[bytes]) -> "PathList":
        """Of paths with a zero after each."""
        text = np.frombuffer(bytearray().join(parts), dtype=np.uint8)
        return cls(text, np.flatnonzero(text == 0) + 1)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.text[start : int(self.ends[index]) - 1].tobytes())

    def __iter__(self) -> Iterator[str]:
        return iter(os.fsdecode(self.text.tobytes()).split("\0")[:-1])

    def below(self, root: str) -> list[bytes]:
        """The paths from root on, in which all of them have to be."""
        start = len(os.fsencode(os.path.join(root, "")))
        return [path[start:] for path in self.text.tobytes().split(b"\0")[:-1]]

    def where(self, chosen: np.ndarray) -> "PathList":
        """Those of them for which `chosen`, (M,) bool, is true."""
        lengths = np.diff(self.ends, prepend=0)
        return PathList(self.text[np.repeat(chosen, lengths)], np.cumsum(lengths[chosen]))


class Folder(NamedTuple):
    """What one folder holds."""

    path: str
    identity: tuple[int, int]
    """The same for all the paths that lead to it."""
    mtime_ns: int
    """When an entry was last added, removed or renamed."""
    folders: list[str]
    links: list[str]
    """Paths of the folders in it, and of the symbolic links to folders."""
    runs: list[tuple[str, bytes]]
    """Images between which nothing of a sub-folder comes in sorted order: path of the first, all their paths."""
    num_files: int
    """Images in `runs`."""


def list_images(root: str | Path) -> list[str]:
    """Paths of all images below a folder, by extension, in sorted order.

    Symbolic links are followed, but not up to a folder that holds root; a folder that several paths lead to is listed once,
    under its own name if that is below root. A link to nowhere counts as an image that cannot be read. A folder that
    cannot be read is left out with a warning.

    Raises:
        InputError: the folder does not exist or holds no images.
    """
    return list(walked(str(root))[0])


def walked(root: str) -> tuple[PathList, list[Folder], bool]:
    """`list_images` as a PathList; then the folders that were listed, and whether all could be."""
    check_folder(root)
    folders, is_complete = folders_below(root)
    runs = sorted(run for folder in folders for run in folder.runs)
    if not runs:
        raise InputError(
            f"data.root={root}: no images in there (looked for {', '.join(EXTENSIONS)} at any depth)"
        )
    return PathList.of_bytes(text for _, text in runs), folders, is_complete


def check_folder(root: str) -> None:
    """Raises InputError where there is none."""
    if not os.path.isdir(root):
        raise InputError(f"data.root={root}: no such folder")


def folders_below(root: str) -> tuple[list[Folder], bool]:
    """Root and everything below it, each folder once; and whether all could be read.

    Not `os.walk`, which recurses in Python 3.11 and older, and takes a folder by the first of its names that comes up.
    """
    pending, linked = deque([root]), deque[str]()  # what links lead to waits until the rest is done
    seen = {
        identity(folder) for folder in Path(root).resolve().parents
    }  # a link up there leads to what is beside root
    found: list[Folder] = []
    is_complete, num_files, said = True, 0, time.perf_counter()
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        scanner = Scanner(pool)
        while pending or linked:
            batch = [pending.popleft() for _ in range(min(BATCH, len(pending)))] or [
                linked.popleft()
            ]
            for path, folder in zip(batch, scanner.scan(batch), strict=True):
                if isinstance(folder, OSError):
                    log.warning(
                        "left out a folder that cannot be read: %s (%s)",
                        printable(path),
                        folder.strerror,
                    )
                    is_complete = False
                elif folder.identity not in seen:
                    seen.add(folder.identity)
                    found.append(folder)
                    pending += folder.folders
                    linked += folder.links
                    num_files += folder.num_files
            if time.perf_counter() - said > PROGRESS_SECONDS:
                said = time.perf_counter()
                log.info("listing %s: %s images so far", printable(root), f"{num_files:,}")
    return found, is_complete


class Scanner:
    """Lists folders one after the other, or in several threads once it has had to wait for more than half of them."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.pool = pool
        self.num_folders = self.num_waits = 0

    def scan(self, paths: Sequence[str]) -> list[Folder | OSError]:
        if self.num_folders > BATCH and self.num_waits > self.num_folders / 2:
            return list(self.pool.map(scanned, paths))
        before = num_waits()
        folders = [scanned(path) for path in paths]
        self.num_waits += num_waits() - before
        self.num_folders += len(paths)
        return folders


def num_waits() -> int:
    """How often this process has left the processor of its own accord; being put aside for others does not count."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw


def scanned(path: str) -> Folder | OSError:
    """What is in a folder, or why it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            status = os.fstat(descriptor)
            names, folders, links = contents(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        return error
    prefix = os.path.join(path, "")
    return Folder(
        path,
        (status.st_dev, status.st_ino),
        status.st_mtime_ns,
        [prefix + name for name in folders],
        [prefix + name for name in links],
        runs_of(prefix, names, [*folders, *links]),
        len(names),
    )


def contents(descriptor: int) -> tuple[list[str], list[str], list[str]]:
    """Names of images, folders and links to folders, in sorted order each.

    Args:
        descriptor: an open folder; of its path `os.scandir` would make one for each entry, which takes a tenth of the time.
    """
    with os.scandir(descriptor) as listed:
        entries = list(listed)
    try:
        names = [
            entry.name for entry in entries if not entry.is_dir()
        ]  # asks the file system about links alone
    except OSError:  # a link to itself
        names = [entry.name for entry in entries if not is_folder(entry)]
    folders, links = [], []
    if len(names) < len(entries):
        below = sorted((entry.name, entry.is_symlink()) for entry in entries if is_folder(entry))
        folders, links = (
            [name for name, is_link in below if is_link == wanted] for wanted in (False, True)
        )
    return images_among(sorted(names)), folders, links


def images_among(names: list[str]) -> list[str]:
    """The names with one of the extensions, in any case."""
    _, ending = os.path.splitext(names[0] if names else "")
    if ending.lower() in EXTENSIONS and "\0".join([*names, ""]).count(f"{ending}\0") == len(names):
        return names  # all end as the first one does, which is found much faster than asking each
    return [name for name in names if name.lower().endswith(EXTENSIONS)]


def runs_of(prefix: str, names: list[str], folders: list[str]) -> list[tuple[str, bytes]]:
    """Sorted names of images, cut where a sub-folder's images come in the order of whole paths: see `Folder.runs`."""
    cuts = [0, *(bisect(names, f"{folder}/") for folder in folders), len(names)]
    return [
        (prefix + names[start], os.fsencode(prefix + f"\0{prefix}".join(names[start:end]) + "\0"))
        for start, end in pairwise(sorted(cuts) if folders else cuts)
        if start < end
    ]


def identity(path: str | Path) -> tuple[int, int]:
    """The same for all the paths that lead to a file or folder."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Also what a link leads to; without asking the file system for plain files, as `os.path.isdir` would."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def count_pages(paths: PathList) -> np.ndarray:
    """Images in each file, (M,) int64: those of a TIFF file, by its name; 1 of all others and of what cannot be read."""
    num_pages = np.ones(len(paths), dtype=np.int64)
    stacks = [index for index, path in enumerate(paths) if path.lower().endswith((".tif", ".tiff"))]
    with pillow_warnings_ignored(), ThreadPoolExecutor(NUM_THREADS) as pool:
        num_pages[stacks] = list(pool.map(lambda index: pages_of(paths[index]), stacks))
    return num_pages


def pages_of(path: str) -> int:
    """For threads; the caller has to ignore Pillow's warnings around all of them."""
    try:
        with opened(path, 2**62) as image:  # the limit holds when a page is decoded
            return getattr(image, "n_frames", 1)
    except UnreadableImage:
        return 1
