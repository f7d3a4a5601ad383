"""Lists of the images below a folder, in sorted order, which a file can keep for the next start.

A file's ending says whether it is an image. If the ending is unknown, its first bytes say so. All
other files are counted by kind.

Trees of millions of files are listed in seconds, so this code avoids questions to the file system.
"""

import itertools
import json
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moco.data.files.archives import DAMAGED, read_arrays
from moco.data.files.formats import (
    FIRST_BYTES,
    FORMATS,
    Format,
    endings_not_read_by,
    recognised,
)
from moco.data.files.images import UnreadableImage, header, pillow_warnings_ignored
from moco.data.files.written_files import (
    NAMES_OF_FOLDERS,
    SYSTEM_FOLDERS,
    is_written_file,
    is_written_folder,
)
from moco.errors import InputError, near_path, printable
from moco.extras import install_command
from moco.phases import counted, phase

log = logging.getLogger(__name__)

NUM_THREADS = 16  # a file system on a network answers slowly, but many requests at a time
FOLDERS_PER_BATCH = 64  # progress is reported between two batches
SETTLED_SECONDS = 2  # file systems count time in steps of up to this
ARRAYS = (
    "key",
    "counts",
    "text",
    "ends",
    "num_pages",
    "folder_text",
    "folder_ends",
    "folder_stamps",
)
MOST_KINDS = 6
"""Kinds of left out files that the log names."""
MOST_LOOKED_INTO = 10_000
"""Up to so many .png and .npz files are opened to find those that our programs wrote. Among more
images these do not matter, and to open all files would take longer than to list them."""
NO_ENDING = "no ending"
HIDDEN = "hidden"
WRITTEN = "written by moco"
OTHER_ENDINGS = frozenset(
    (  # noqa: SIM905
        ".txt .md .rst .csv .tsv .json .jsonl .geojson .xml .yaml .yml .toml .ini .cfg .log .html "
        ".htm .css .js .py .ipynb .sh .bat .m .r .c .cpp .h .pdf .doc .docx .xls .xlsx .ppt .pptx "
        ".zip .tar .gz .tgz .bz2 .xz .zst .7z .rar .h5 .hdf5 .zarr .nc .parquet .arrow .feather "
        ".pkl .pickle .mat .db .sqlite .lmdb .mdb .idx .bin .dat .raw .pt .pth .ckpt .safetensors "
        ".onnx .faiss .lnk .url .exe .dll .so .tmp .part .bak .lock .swp .md5 .sha1 .sha256 "
        ".svg .eps .ps .ai .psd .xcf .ico .cur .icns .exr .hdr "
        ".dng .nef .cr2 .cr3 .crw .arw .orf .rw2 .raf .srw .pef "
        ".mp4 .avi .mov .mkv .webm .mpg .mpeg .wmv .m4v .mp3 .wav .flac .ogg .ttf .otf "
        ".nii .mha .mhd .nrrd .czi .nd2 .lif .vsi .ets .mrxs "
        ".shp .shx .dbf .prj .cpg .sbn .sbx .qpj .kml .kmz .gpkg .vrt .tfw .jgw .pgw .wld "
        ".aux .ovr .rrd .las .laz .ply .obj .stl"
    ).split()
)
"""Endings of files that are no images of a dataset, or that nothing here reads. These files are not
opened. Raw photographs are among them: they begin like a TIFF file whose first image is a
thumbnail."""


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

    def places(self, paths: Iterable[str]) -> list[int]:
        """Return the place of each of these paths; all of them have to be here."""
        place_of: dict[str, int] = {}
        for place, path in enumerate(self):
            place_of[path] = place
        return [place_of[path] for path in paths]

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
    formats: Mapping[str, int]
    """Number of these images by ending."""
    left_out: Mapping[str, int]
    """Number of other entries by kind, see `Listing`."""


@dataclass(frozen=True)
class Listing:
    """Image files, those of one folder after another, in sorted order each."""

    paths: PathList
    num_pages: np.ndarray
    """(files,) int64, the number of images in each file."""
    formats: Mapping[str, int] = field(default_factory=dict)
    """Number of the image files below the folders, by ending in lower case or ``no ending``."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Number of the other files below the folders, by kind: an ending, also with what has to be
    installed to read it; ``no ending``, ``hidden`` or ``written by moco``. A kind that ends in a
    slash is the name of folders."""

    def where(self, chosen: np.ndarray) -> "Listing":
        """Return the files for which `chosen`, (files,) bool, is true; the counts stay."""
        return Listing(
            self.paths.where(chosen), self.num_pages[chosen], self.formats, self.left_out
        )

    def describe(self) -> str:
        """Return how many files there are, and how many images by ending: ``9 files: .png 8``."""
        number = num_files(self.formats) + num_files(self.left_out)
        counts = []
        for ending, count in by_count(self.formats):
            counts.append(f"{ending} {count:,}")
        num_left_out = num_files(self.left_out)
        if num_left_out:
            counts.append(f"others {num_left_out:,}")
        return f"{number:,} files: {', '.join(counts)}"


def num_files(counts: Mapping[str, int]) -> int:
    """Return the number of files in a count by kind, without folders."""
    number = 0
    for kind, count in counts.items():
        if not kind.endswith("/"):
            number += count
    return number


def by_count(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Return kinds and their numbers, the largest number first."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def list_images(root: str | Path) -> list[str]:
    """Return the paths of all images below a folder in sorted order.

    The ending decides. A file without an ending, or with an unknown one, is an image if its first
    bytes say so. Hidden files and folders, those of the system, and what the programs of this
    project wrote are left out, but not `root` itself. The log counts what is left out by kind.

    Symbolic links are followed, but not to a folder that contains `root`. A folder that several
    paths lead to is listed once, under its own name if it is below `root`. A broken link counts as
    an image that cannot be read. A folder that cannot be read is left out with a warning.

    Raises:
        InputError: the folder does not exist or holds no images.
    """
    files, _, _ = list_trees([str(root)])
    log_left_out([str(root)], files.left_out)
    return list(files.paths)


def list_trees(roots: Sequence[str]) -> tuple[Listing, list[Folder], bool]:
    """Return the images of `list_images`, the listed folders, and whether all could be read.

    Each file counts as one image.
    """
    kinds = kinds_of_endings()
    paths: list[str] = []
    folders: list[Folder] = []
    formats: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    is_complete = True
    for root in roots:
        check_folder(root)
        found, could_be_read = list_folders(root, kinds)
        images = sorted(itertools.chain.from_iterable(folder.images for folder in found))
        for folder in found:
            formats.update(folder.formats)
            left_out.update(folder.left_out)
        written = files_written_by_us(images, formats)
        if written:
            images = [path for path in images if path not in written]
            formats -= Counter(map(ending_of, written))
            left_out[WRITTEN] += len(written)
        if not images:
            there = described(left_out) or f"looked for {', '.join(readable_endings(kinds))}"
            raise InputError(printable(f"data.root={root}: no images in there ({there})"))
        paths += images
        folders += found
        is_complete = is_complete and could_be_read
    paths_of_all = PathList.of(paths)
    files = Listing(paths_of_all, np.ones(len(paths_of_all), np.int64), formats, left_out)
    return files, folders, is_complete


def kinds_of_endings() -> dict[str, str | None]:
    """Return what each known ending is: None for images, or the kind of what is left out."""
    kinds: dict[str, str | None] = {}
    for ending in OTHER_ENDINGS:
        kinds[ending] = ending
    for known in FORMATS:
        for ending in known.endings:
            kinds[ending] = kind_of_format(known, ending)
    return kinds


def kind_of_format(known: Format, ending: str) -> str | None:
    """Return None if the format can be read, or the kind that says what to install."""
    if known.package is None or known.extra is None or find_spec(known.package) is not None:
        return None
    return f"{ending or NO_ENDING} ({install_command(known.extra)})"


def readable_endings(kinds: Mapping[str, str | None]) -> list[str]:
    """Return the endings of images that can be read, in alphabetical order."""
    endings = [ending for ending, kind in kinds.items() if kind is None]
    return sorted(endings)


def files_written_by_us(images: Sequence[str], formats: Mapping[str, int]) -> set[str]:
    """Return which of the images our programs wrote; see `MOST_LOOKED_INTO`."""
    num_suspects = formats.get(".png", 0) + formats.get(".npz", 0)
    if not 0 < num_suspects <= MOST_LOOKED_INTO:
        return set()
    suspects = [path for path in images if path.lower().endswith((".png", ".npz"))]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        are_written = pool.map(is_written_file, suspects)
        return set(itertools.compress(suspects, are_written))


def ending_of(path: str) -> str:
    """Return the ending of a file's name in lower case, with its dot; empty without a dot."""
    _, dot, ending = os.path.basename(path).rpartition(".")
    if not dot:
        return ""
    return (dot + ending).lower()


def log_left_out(roots: Sequence[str], left_out: Mapping[str, int]) -> None:
    """Log what is left out, if there is anything: a warning if a package is missing for images."""
    if not left_out:
        return
    level = logging.INFO
    for kind in left_out:
        if "pip install" in kind:
            level = logging.WARNING
    log.log(level, "%s", printable(f"{', '.join(roots)}: {described(left_out)}"))


def described(left_out: Mapping[str, int]) -> str:
    """Return ``left out 3 files: .txt 2, hidden 1; 1 folder: __MACOSX``, or nothing."""
    # What could be read after an installation comes first.
    kinds = sorted(by_count(left_out), key=lambda item: "pip install" not in item[0])
    files = []
    folders = []
    for kind, count in kinds:
        if kind.endswith("/"):
            folders.append(kind.removesuffix("/"))
        else:
            files.append(f"{kind} {count:,}")
    num_left_out = num_files(left_out)
    num_folders = sum(left_out.values()) - num_left_out
    parts = []
    if files:
        parts.append(f"{number_of(num_left_out, 'file')}: {first_kinds(files)}")
    if folders:
        parts.append(f"{number_of(num_folders, 'folder')}: {first_kinds(folders)}")
    if not parts:
        return ""
    return f"left out {'; '.join(parts)}"


def number_of(count: int, what: str) -> str:
    """Return ``1 file`` or ``2 files``."""
    if count == 1:
        return f"1 {what}"
    return f"{count:,} {what}s"


def first_kinds(named: Sequence[str]) -> str:
    """Return the kinds that the log names, for one line."""
    shown = ", ".join(named[:MOST_KINDS])
    if len(named) > MOST_KINDS:
        shown += ", ..."
    return shown


def check_folder(root: str) -> None:
    """Raise InputError if there is no such folder."""
    if not os.path.isdir(root):
        raise InputError(f"data.root={root}: no such folder{near_path(root)}")


def list_folders(root: str, kinds: Mapping[str, str | None]) -> tuple[list[Folder], bool]:
    """Return `root` and each folder below it once, and whether all could be read.

    Args:
        kinds: see `kinds_of_endings`.

    This is not `os.walk`, which recurses in Python 3.11 and older, and which takes a folder by the
    first of its names that it meets.
    """
    pending = deque([root])
    linked: deque[str] = deque()  # links wait until all folders are listed by their own names
    # A link to a folder above root would lead to what is beside root.
    seen = set()
    for parent in Path(root).resolve().parents:
        seen.add(identity(os.stat(parent)))
    found: list[Folder] = []
    is_complete = True
    num_images = 0
    title = f"listing {printable(root)}"
    with phase(title) as say, ThreadPoolExecutor(NUM_THREADS) as pool:
        while pending or linked:
            if not pending:
                pending.append(linked.popleft())
            size = min(FOLDERS_PER_BATCH, len(pending))
            batch = [pending.popleft() for _ in range(size)]
            is_root = [path == root for path in batch]
            for folder in pool.map(scan_folder, batch, itertools.repeat(kinds), is_root):
                if folder is None:
                    is_complete = False
                elif identity(folder.status) not in seen:
                    seen.add(identity(folder.status))
                    found.append(folder)
                    pending += folder.folders
                    linked += folder.links
                    num_images += len(folder.images)
            say(num_images)
    return found, is_complete


def identity(status: os.stat_result) -> tuple[int, int]:
    """Return what is the same for all paths that lead to a folder."""
    return status.st_dev, status.st_ino


def scan_folder(path: str, kinds: Mapping[str, str | None], is_root: bool = False) -> Folder | None:
    """Return a folder's content; warn if it cannot be read, and return None.

    A folder that a program of this project wrote has no content, except the root.
    """
    prefix = os.path.join(path, "")
    folders: list[str] = []
    links: list[str] = []
    images: list[str] = []
    left_out: Counter[str] = Counter()
    told: set[str] = set()  # the names that may tell who wrote the folder
    seen: tuple[str, ...] = ()  # endings of images in this folder, in their own case
    are_all_seen = True
    try:
        # Before its entries are read, so that a change in between counts as a later one.
        status = os.stat(path)
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                if not is_folder(entry):
                    # This is the case of nearly all of a million files.
                    if name.endswith(seen) and name[0] != ".":
                        images.append(prefix + name)
                        continue
                    kind = kind_of_file(entry, prefix + name, kinds)
                    if kind is None:
                        images.append(prefix + name)
                        ending = name[name.rfind(".") :]
                        # A name that ends in .npz may tell who wrote the folder.
                        if ending.lower() in kinds and ending.lower() != ".npz":
                            seen = (*seen, ending)
                        else:
                            are_all_seen = False
                    else:
                        left_out[kind] += 1
                elif is_left_out_folder(name):
                    left_out[f"{name}/"] += 1
                elif entry.is_symlink():
                    links.append(prefix + name)
                else:
                    folders.append(prefix + name)
                if name in NAMES_OF_FOLDERS:
                    told.add(name)
    except OSError as error:
        shown = printable(path)
        log.warning("left out a folder that cannot be read: %s (%s)", shown, error.strerror)
        return None
    if not is_root and is_written_folder(told):
        return Folder(path, status, [], [], [], {}, {f"{os.path.basename(path)}/": 1})
    formats: Mapping[str, int]
    if are_all_seen and len(seen) == 1:
        formats = {seen[0].lower(): len(images)}
    else:
        formats = Counter(ending_of(image) or NO_ENDING for image in images)
    return Folder(path, status, sorted(folders), sorted(links), images, formats, left_out)


def kind_of_file(entry: os.DirEntry[str], path: str, kinds: Mapping[str, str | None]) -> str | None:
    """Return None if a file is an image, or its kind if it is none; see `Listing`."""
    if entry.name[0] == ".":
        return HIDDEN
    ending = ending_of(entry.name)
    if ending in kinds:
        return kinds[ending]
    return kind_of_content(entry, path, ending)


def is_left_out_folder(name: str) -> bool:
    """Return whether a folder of this name is hidden or of a system, and holds no images."""
    return name[0] == "." or name in SYSTEM_FOLDERS


def kind_of_content(entry: os.DirEntry[str], path: str, ending: str) -> str | None:
    """Return None if a file with an unknown ending is an image, or its kind if it is none."""
    known = None
    with suppress(OSError):  # such as of a link to itself
        # A pipe would wait for a writer.
        if entry.is_file():
            with open(path, "rb") as file:
                known = recognised(file.read(FIRST_BYTES))
    if known is None:
        return ending or NO_ENDING
    return kind_of_format(known, ending)


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

    TIFF, NumPy and DICOM files may hold several; other files and unreadable files count as one.
    """
    num_pages = np.ones(len(paths), dtype=np.int64)
    endings = endings_not_read_by("pillow")
    stacks = []
    for index, path in enumerate(paths):
        if path.lower().endswith(endings):
            stacks.append(index)
    with pillow_warnings_ignored(), ThreadPoolExecutor(NUM_THREADS) as pool:
        found = pool.map(pages_of, map(paths.__getitem__, stacks))
        num_pages[stacks] = list(counted(found, "counting pages", len(stacks), "files"))
    return num_pages


def pages_of(path: str) -> int:
    """Return the number of images in a file; the caller ignores Pillow's warnings."""
    try:
        return header(path).pages
    except UnreadableImage:
        return 1


class Outdated(Exception):
    """A kept listing cannot be used; the message says why."""


def listed(roots: Sequence[str], pages: str = "first", cache: Path | None = None) -> Listing:
    """Return the images below the folders; see `moco.data.files.listing.list_images`.

    The log counts what is left out.

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
            files = read_listing(cache, key)
            log_left_out(roots, files.left_out)
            return files
        except Outdated as reason:
            log.info("listing the images below %s anew: %s", printable(", ".join(roots)), reason)
    now = time.time_ns()
    files, folders, is_complete = list_trees(roots)
    if pages == "each":
        files = replace(files, num_pages=count_pages(files.paths))
    log_left_out(roots, files.left_out)
    # A folder that has just changed could change again within a step of the file system's clock.
    newest_change = 0
    for folder in folders:
        newest_change = max(newest_change, folder.status.st_mtime_ns)
    is_settled = newest_change < now - SETTLED_SECONDS * 10**9
    # A folder that could not be read is listed at each start, to name it in a warning.
    if cache is not None and is_settled and is_complete:
        write_listing(cache, key, files, folders)
    return files


def key_of(roots: Sequence[str], pages: str) -> np.ndarray:
    """Return what a listing depends on, as uint8."""
    # A package that is installed makes more files readable.
    readable = readable_endings(kinds_of_endings())
    key = json.dumps({"format": 3, "roots": list(roots), "pages": pages, "readable": readable})
    return np.frombuffer(key.encode(), dtype=np.uint8)


def write_listing(cache: Path, key: np.ndarray, files: Listing, folders: Sequence[Folder]) -> None:
    """Write a listing as a whole or not at all; warn if that fails."""
    paths = []
    stamps = []
    for folder in folders:
        paths.append(folder.path)
        stamps.append(stamp(folder.status))
    folder_paths = PathList.of(paths)
    counts = json.dumps({"formats": files.formats, "left_out": files.left_out})
    # Two programs may write the listing at the same time.
    temporary = cache.with_name(f".{cache.name}.{os.getpid()}")
    try:
        try:
            with open(temporary, "wb") as file:
                np.savez(
                    file,
                    key=key,
                    counts=np.frombuffer(counts.encode(), dtype=np.uint8),
                    text=files.paths.text,
                    ends=files.paths.ends,
                    num_pages=files.num_pages,
                    folder_text=folder_paths.text,
                    folder_ends=folder_paths.ends,
                    folder_stamps=np.array(stamps),
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
        paths = PathList(arrays["text"], arrays["ends"])
        num_pages = arrays["num_pages"]
        folders = PathList(arrays["folder_text"], arrays["folder_ends"])
        stamps = arrays["folder_stamps"]
        key_there = arrays["key"]
        counted = json.loads(arrays["counts"].tobytes())
    except DAMAGED as error:
        raise Outdated(f"{cache} cannot be read ({error})") from error
    if not np.array_equal(key_there, key):
        raise Outdated(f"{cache} is of other folders or settings")
    # On a network each question takes milliseconds, but many can be asked at a time.
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        now = np.array(list(pool.map(stamp_of, folders)))
    for place in np.flatnonzero((now != stamps).any(axis=1)).tolist():
        raise Outdated(f"{printable(folders[place])} has changed")
    return Listing(paths, num_pages, **counted)


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
