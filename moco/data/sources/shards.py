"""Tar shards in webdataset's layout: which shards there are, and the images in each of them.

A sample is a run of members whose names agree up to the first dot of their last part. Its image is
the first member with an image's extension; the other members are not read.
"""

import glob
import logging
import lzma
import os
import re
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

from moco.data.files.formats import endings_not_read_by
from moco.data.files.images import EncodedImage, UnreadableImage, encoded
from moco.data.sources.folders import list_of_paths
from moco.data.sources.packed_copy import INDEX, read_finished_index, read_index
from moco.data.sources.source import DataSource, Images
from moco.errors import InputError, near_path, printable, said
from moco.extras import install_command
from moco.phases import counted

log = logging.getLogger(__name__)

# What tarfile, the decompressors and pipes raise on damaged archives.
TAR_ERRORS = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)
# Arrays in a sample are features or masks of its image as often as images.
ENDINGS = endings_not_read_by("numpy")
MAX_ENCODED_BYTES = 2**28  # a larger encoded image is unreadable
IMAGE_SIZE = 224  # px
NO_LIBRARY = "data=webdataset needs another package: "
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
    """What could not be read: a sample, or the rest of a shard."""

    name: str
    reason: str
    is_shard: bool


@dataclass(eq=False)
class ShardedImages(Images):
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

    def opened(self, index: int) -> EncodedImage:
        """Raise InputError: a stream has no images by number."""
        raise InputError(NO_INDEX)

    def name(self, index: int) -> str:
        """See `Images`."""
        return f"sample {index} of {len(self.shards)} shards"

    def samples(
        self, shard: str, note: Callable[[str], None] = lambda name: None
    ) -> Iterator["Sample | Problem"]:
        """Yield the images of a shard as the model gets them; see `images_in`."""
        for found in images_in(shard, self.max_image_pixels, note, raw=self.reading.raw):
            if isinstance(found, Sample) and self.values is not None:
                found = Sample(self.values.of(found.image, found.name), found.name)
            yield found


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
        raise InputError(NO_LIBRARY + install_command("webdataset")) from error
    shards = list_shards(root)
    if num_images is None:
        num_images = find_num_images(root, shards)
    images = ShardedImages(shards, num_images, streams, shuffle_buffer, max_image_pixels)
    return DataSource(images, None, None, IMAGE_SIZE)


def find_num_images(root: Any, shards: Sequence[str]) -> int:
    """Return the number of images by the index of a packed copy, or by counting local shards.

    Raises:
        InputError: a shard is not local, or there are no images.
    """
    if isinstance(root, str) and os.path.isfile(os.path.join(root, INDEX)):
        return int(read_index(root)["num_images"])
    for shard in shards:
        if not is_local(shard):
            raise InputError(f"data.num_images: missing; {printable(shard)} is not a local file")
    # Threads help: reading the headers of a shard is mostly waiting for the disk.
    with ThreadPoolExecutor() as pool:
        found = pool.map(count_images, shards)
        counts = list(counted(found, "counting images", len(shards), "shards"))
    num_images = num_left_out = 0
    first_left_out = ""
    for of_shard in counts:
        num_images += of_shard.samples
        num_left_out += of_shard.others
        first_left_out = first_left_out or of_shard.first_other
    if num_images == 0:
        raise InputError(f"data.root={root}: no images in the {len(shards)} shards")
    if num_left_out > 0:
        log.warning(
            "%s of %s images are left out: names that are equal up to the first dot are one "
            "sample, and only its first image is used; the first one left out is %s",
            f"{num_left_out:,}",
            f"{num_images + num_left_out:,}",
            printable(first_left_out),
        )
    log.info("data.num_images=%d saves counting them at each start", num_images)
    return num_images


def list_shards(root: Any) -> list[str]:
    """Return the shards of `root`.

    Braces and lists keep their order; what a wildcard or a folder stands for is sorted by name.

    Args:
        root: a path, with or without braces or wildcards; a folder of .tar files or of moco.pack;
            an address that webdataset opens, such as ``pipe:COMMAND``; or a list of these.

    Raises:
        InputError: it is something else, or there is no such file.
    """
    from braceexpand import braceexpand

    roots = list_of_paths(root)
    if roots is None:
        raise InputError(
            f"data.root={root}: expected tar shards: a pattern, a folder, pipe:COMMAND, "
            "or a list of these"
        )
    shards = []
    for root_pattern in roots:
        try:
            patterns = list(braceexpand(root_pattern))
        except ValueError as error:
            raise InputError(f"data.root={root_pattern}: {error}") from error
        for pattern in patterns:
            shards += shards_of_pattern(pattern)
    return shards


def shards_of_pattern(pattern: str) -> list[str]:
    """Return the shards of one address, folder, pattern with wildcards, or path."""
    if not is_local(pattern) or os.path.isfile(pattern):
        return [pattern]
    if os.path.isdir(pattern):
        return shards_of_folder(pattern)
    found = sorted(glob.glob(pattern))
    if not found:
        what = f"no such file{near_path(pattern)}"
        if glob.has_magic(pattern):
            what = "no file matches"
        raise InputError(f"data.root={pattern}: {what}")
    return found


def shards_of_folder(folder: str) -> list[str]:
    """Return the .tar files of a folder; of a packed copy only those to train on."""
    pattern = "*.tar"
    if os.path.isfile(os.path.join(folder, INDEX)):
        read_finished_index(folder)
        pattern = "train-*.tar"
    # Without `escape` a folder named data[1] would be a pattern.
    shards = sorted(glob.glob(os.path.join(glob.escape(folder), pattern)))
    if not shards:
        raise InputError(f"data.root={folder}: no .tar files to train on in there")
    return shards


def is_local(shard: str) -> bool:
    """Return whether a shard is a path and not an address or a command."""
    return not re.match(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://", shard)


class CheckedHeader(tarfile.TarInfo):
    """A member's header; only a block of zeros ends the archive.

    tarfile takes any block that is no header for the end, and would not notice damage.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "CheckedHeader":
        """Raise ReadError for a block that is neither a header nor the archive's end."""
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise
            raise tarfile.ReadError(str(error)) from error


def images_in(
    shard: str,
    max_image_pixels: int,
    note: Callable[[str], None] = lambda name: None,
    *,
    raw: bool = False,
) -> Iterator[Sample | Problem]:
    """Yield the images of a shard in their order, not decoded, and what could not be read.

    Args:
        note: called with the name of each image before it is read.
        raw: see `moco.data.files.images.encoded`.
    """
    num_images = 0
    try:
        with (
            open_shard(shard) as stream,
            tarfile.open(fileobj=stream, mode="r|*", tarinfo=CheckedHeader) as archive,
        ):
            for member, is_first in image_members(archive):
                if not is_first:
                    continue
                name = f"{shard}/{member.name}"
                note(name)
                yield read_sample(archive, member, name, max_image_pixels, raw=raw)
                num_images += 1
    except TAR_ERRORS as error:
        where = f"{printable(shard)}: cannot be read beyond its first {num_images} images"
        yield Problem(shard, f"{where} ({said(error)})", is_shard=True)


def read_sample(
    archive: tarfile.TarFile,
    member: tarfile.TarInfo,
    name: str,
    max_image_pixels: int,
    *,
    raw: bool,
) -> Sample | Problem:
    """Return a member as a sample, or what is wrong with it."""
    if member.size > MAX_ENCODED_BYTES:
        reason = f"{printable(name)}: {member.size:,} bytes, more than {MAX_ENCODED_BYTES:,}"
        return Problem(name, reason, is_shard=False)
    file = archive.extractfile(member)
    assert file is not None  # it is None for folders and links only
    try:
        return Sample(encoded(file.read(), name, max_image_pixels, raw=raw), name)
    except UnreadableImage as error:
        return Problem(name, str(error), is_shard=False)


def image_members(archive: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, bool]]:
    """Yield the header of each image, and whether it is the first one of its sample.

    A sample may have several images, and the first one stands for it.
    """
    previous_key: str | None = None
    for member in archive:
        archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
        key = sample_key(member.name)
        is_image = member.isreg() and member.name.lower().endswith(ENDINGS)
        if is_image:
            yield member, key != previous_key
            previous_key = key


def sample_key(name: str) -> str:
    """Return the part of a member's name that all members of its sample share."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


@contextmanager
def open_shard(shard: str) -> Iterator[IO[bytes]]:
    """Open a shard as a stream of bytes.

    Raises:
        OSError: the command that writes the shard has failed.
    """
    from webdataset.gopen import gopen

    # gopen would take the file run1:x.tar for an address.
    stream: Any
    if is_local(shard):
        stream = open(shard, "rb")  # noqa: SIM115
    else:
        stream = gopen(shard)
    try:
        yield stream
        # Read to the end, since the command that writes the archive might fail on a closed pipe.
        while stream.read(2**20):
            pass
        stream.close()
    except TAR_ERRORS as error:
        # A failed command cuts its output short, which tarfile reports as damage.
        process = getattr(stream, "proc", None)  # None for a file
        with suppress(subprocess.TimeoutExpired):
            if process is not None and process.wait(timeout=1) != 0:
                raise OSError("its command failed") from error
        raise
    finally:
        # Closing a pipe early is an error of the command, which is not interesting here.
        with suppress(OSError):
            stream.close()


class Counted(NamedTuple):
    """How many images a shard has."""

    samples: int
    others: int
    """Images that are not the first one of their sample."""
    first_other: str
    """SHARD/MEMBER of the first of these."""


def count_images(shard: str) -> Counted:
    """Count the images in a local shard; reading it says whether it is damaged.

    The members' headers are read, and the images are not: the last one may be cut off.
    """
    num_samples, num_others = 0, 0
    first_other = ""
    with suppress(*TAR_ERRORS), tarfile.open(shard, mode="r:*", tarinfo=CheckedHeader) as archive:
        for member, is_first in image_members(archive):
            if is_first:
                num_samples += 1
                continue
            num_others += 1
            first_other = first_other or f"{shard}/{member.name}"
    return Counted(num_samples, num_others, first_other)
