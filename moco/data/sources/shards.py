"""Tar shards in the layout of webdataset: which there are, and the images in each, from its start to its end.

A sample is a run of members whose names agree up to the first dot of their last part; its first member with an image's
extension is the image, and the others are not read.
"""

import glob
import logging
import lzma
import os
import re
import subprocess
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple

from PIL import Image

from moco.data.files.decoding import EncodedImage, encoded
from moco.data.files.images import EXTENSIONS, UnreadableImage
from moco.data.sources.packed_index import INDEX, check_finished, read_index
from moco.data.sources.registry import DataSource
from moco.errors import InputError, printable

log = logging.getLogger(__name__)

# What tarfile, the decompressors and pipes raise on damaged archives.
TAR_ERRORS = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)
LARGEST_IMAGE = (
    2**28
)  # bytes; an encoded image of more is unreadable, whatever a header or a compressed shard makes of it
NO_LIBRARY = "data=webdataset needs another package: pip install 'moco-ssl[webdataset]'"

NO_INDEX = (
    "data=webdataset is a stream to train on and has no images by number; "
    "data=packed reads the shards of moco.pack, data=images files"
)


class Sample(NamedTuple):
    """An image of a shard."""

    image: EncodedImage
    name: str
    """SHARD/MEMBER, for messages."""


class Problem(NamedTuple):
    """What could not be read: a sample, or all of a shard from some place on."""

    name: str
    reason: str
    is_shard: bool


@dataclass(frozen=True)
class ShardedImages:
    """Training images in shards: their number is known, and they arrive as a stream.

    `moco.data.loading.streams` makes the streams.
    """

    shards: Sequence[str]
    num_images: int
    num_streams: int
    """Streams of each process; fewer if there are fewer shards."""
    shuffle_buffer: int
    """Number of samples of a stream from which the next one is drawn."""
    max_image_pixels: int

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> Image.Image:
        raise InputError(NO_INDEX)

    def opened(self, index: int) -> EncodedImage:
        """Raise InputError: a stream has no images by number."""
        raise InputError(NO_INDEX)

    def name(self, index: int) -> str:
        """See `Images`."""
        return f"sample {index} of {len(self.shards)} shards"


def sharded_source(
    root: Any, streams: int, shuffle_buffer: int, num_images: int | None, max_image_pixels: int
) -> DataSource:
    """Return tar shards without labels.

    Args:
        root: see `list_shards`.
        num_images: number of samples in all shards; None counts those of local shards.

    Raises:
        InputError: the library is missing, or there are no shards, or no images in them.
    """
    try:
        import webdataset  # noqa: F401
    except ImportError as error:
        raise InputError(NO_LIBRARY) from error
    shards = list_shards(root)
    if num_images is None:
        num_images = find_num_images(root, shards)
    images = ShardedImages(shards, num_images, streams, shuffle_buffer, max_image_pixels)
    return DataSource(images, None, None, 224)


def find_num_images(root: Any, shards: Sequence[str]) -> int:
    """Return the number of images by the index of a packed copy, or by counting local shards.

    Raises:
        InputError: a shard is not local, or there are no images.
    """
    if isinstance(root, str) and os.path.isfile(os.path.join(root, INDEX)):
        return int(read_index(root)["num_images"])
    for shard in shards:
        if not is_local(shard):
            raise InputError(
                f"data.num_images: missing; {printable(shard)} is not a local file "
                "whose samples can be counted"
            )
    started = time.monotonic()
    num_images, problems = count_images(shards)
    for problem in problems:
        log.warning("%s", problem.reason)
    if num_images == 0:
        raise InputError(f"data.root={root}: no images in the {len(shards)} shards")
    log.info(
        "%s images in %d shards, counted in %.1f s; data.num_images=%d saves that",
        f"{num_images:,}",
        len(shards),
        time.monotonic() - started,
        num_images,
    )
    return num_images


class CheckedHeader(tarfile.TarInfo):
    """A member's header. tarfile takes whatever is none for the archive's end; only zeros are one."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "CheckedHeader":
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise
            raise tarfile.ReadError(str(error)) from error


def list_shards(root: Any) -> list[str]:
    """The shards that `root` stands for, braces and lists in their order, wildcards and folders sorted by name.

    Args:
        root: a path, with braces or wildcards or without; a folder of .tar files; an address that webdataset opens, such as
            ``pipe:COMMAND``; or a list of these. Of a folder that moco.pack wrote, the shards to train on.

    Raises:
        InputError: it is something else, or there is no such file.
    """
    roots = [root] if isinstance(root, str) else root
    if not isinstance(roots, list) or not roots or not all(isinstance(one, str) for one in roots):
        raise InputError(
            f"data.root={root}: expected tar shards: a pattern, a folder, pipe:COMMAND, or a list of these"
        )
    return [
        shard for one in roots for pattern in _without_braces(one) for shard in _matching(pattern)
    ]


def is_local(shard: str) -> bool:
    """Whether it is the path of a file, and not an address or a command."""
    return not re.match(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://", shard)


def images_in(
    shard: str, max_image_pixels: int, note: Callable[[str], None] = lambda name: None
) -> Iterator[Sample | Problem]:
    """The images of a shard in their order, and what could not be read. Pixels are not decoded.

    Args:
        note: told the name of each image before it is read.

    Raises:
        InputError: a member's path is absolute or leads out of the archive.
    """
    number = 0
    try:
        with (
            _opened(shard) as stream,
            tarfile.open(fileobj=stream, mode="r|*", tarinfo=CheckedHeader) as archive,
        ):
            for member in _image_members(archive, shard):
                name = f"{shard}/{member.name}"
                note(name)
                try:
                    sample = Sample(
                        encoded(_content(archive, member, name), name, max_image_pixels), name
                    )
                except UnreadableImage as error:
                    yield Problem(name, str(error), is_shard=False)
                else:
                    yield sample
                number += 1
    except TAR_ERRORS as error:
        yield Problem(shard, _cut_short(shard, number, error), is_shard=True)


def count_images(shards: Sequence[str]) -> tuple[int, list[Problem]]:
    """How many images local shards hold, by the headers of their members, and which shards are damaged or empty.

    Raises:
        InputError: as of `images_in`.
    """
    with ThreadPoolExecutor() as pool:
        counted = list(pool.map(_counted, shards))
    return sum(number for number, _ in counted), [problem for _, problem in counted if problem]


def _without_braces(pattern: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise InputError(f"data.root={pattern}: {error}") from error


def _matching(pattern: str) -> list[str]:
    if not is_local(pattern):
        return [pattern]
    if os.path.isdir(pattern):
        return _shards_of_folder(pattern)
    if glob.has_magic(pattern) and not os.path.exists(pattern):
        found = sorted(glob.glob(pattern))
        if not found:
            raise InputError(f"data.root={pattern}: no file matches")
        return found
    if not os.path.isfile(pattern):
        raise InputError(f"data.root={pattern}: no such file")
    return [pattern]


def _shards_of_folder(folder: str) -> list[str]:
    if os.path.isfile(os.path.join(folder, INDEX)):
        index = read_index(folder)
        if index["format"] != "shards":
            raise InputError(
                f"data.root={folder}: holds a packed array and no shards; data=packed reads it"
            )
        check_finished(folder, index)
        names = [part["file"] for part in index["parts"] if part["file"].startswith("train-")]
    else:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".tar"))
    if not names:
        raise InputError(f"data.root={folder}: no .tar files in there")
    return [os.path.join(folder, name) for name in names]


@contextmanager
def _opened(shard: str) -> Iterator[IO[bytes]]:
    """The shard as a stream of bytes; OSError where the command that should have written it has failed."""
    from webdataset.gopen import gopen

    # gopen would take run1:x.tar for an address.
    stream: Any = open(shard, "rb") if is_local(shard) else gopen(shard)  # noqa: SIM115 (closed below)
    try:
        yield stream
        while stream.read(2**20):  # past the archive's end, or its writer might fail
            pass
        stream.close()
    except TAR_ERRORS as error:
        if _has_failed(stream):
            raise OSError("its command failed") from error
        raise
    finally:
        with suppress(OSError):  # of a command that is not to be read to its end
            stream.close()


def _has_failed(stream: Any) -> bool:
    """Whether the command behind a stream of webdataset's has ended with an error; files have none."""
    process = getattr(stream, "proc", None)
    if process is None:
        return False
    try:
        return process.wait(timeout=1) != 0
    except subprocess.TimeoutExpired:
        return False


def _counted(shard: str) -> tuple[int, Problem | None]:
    number, last = 0, None
    try:
        with tarfile.open(shard, mode="r:*", tarinfo=CheckedHeader) as archive:
            try:
                for member in _image_members(archive, shard):
                    number, last = number + 1, member
            except TAR_ERRORS as error:
                number -= last is not None and not _is_whole(archive, last)
                return number, Problem(shard, _cut_short(shard, number, error), is_shard=True)
    except TAR_ERRORS as error:  # on opening it, which reads the first header
        return 0, Problem(shard, _cut_short(shard, 0, error), is_shard=True)
    return number, None if number else Problem(
        shard, f"{printable(shard)}: no images in there", is_shard=True
    )


def _is_whole(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bool:
    """Whether a member's content is there to its last byte."""
    assert archive.fileobj is not None
    try:
        archive.fileobj.seek(member.offset_data + member.size - 1)
        return bool(archive.fileobj.read(1))
    except TAR_ERRORS:
        return False


def _cut_short(shard: str, number: int, error: Exception) -> str:
    reason = printable(" ".join(str(error).split())) or type(error).__name__
    return f"{printable(shard)}: cannot be read beyond its first {number} images ({reason})"


def _image_members(archive: tarfile.TarFile, shard: str) -> Iterator[tarfile.TarInfo]:
    """The headers of the samples' images."""
    sample: str | None = None
    for member in archive:
        archive.members = []  # type: ignore[attr-defined]  # it would keep every header
        _check_path(member.name, shard)
        key = sample_key(member.name)
        if member.isreg() and key != sample and member.name.lower().endswith(EXTENSIONS):
            sample = key
            yield member


def _check_path(name: str, shard: str) -> None:
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise InputError(
            f"{printable(shard)}: refused, since its member {printable(name)} lies outside of the archive; pack it anew"
        )


def sample_key(name: str) -> str:
    """What a member's name has in common with the others of its sample."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> bytes:
    if member.size > LARGEST_IMAGE:
        raise UnreadableImage(
            f"{printable(name)}: {member.size:,} bytes, more than {LARGEST_IMAGE:,}"
        )
    file = archive.extractfile(member)
    assert file is not None  # of a regular file it never is
    return file.read()
