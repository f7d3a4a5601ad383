"""Write a copy of a data set that trains faster.

``python -m moco.pack data=images data.root=PATH output=FOLDER data.resize=256``
"""

import dataclasses
import errno
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from moco.cli.launch import launch, save_hydra_files
from moco.config.pack import PackConfig
from moco.errors import InputError, Interrupted, RunError, printable
from moco.runs.folder_lock import locked
from moco.runs.interrupts import ENDING, held_back

if TYPE_CHECKING:
    from torch import Tensor

    from moco.data.sources.packing import Pool
    from moco.data.sources.registry import DataSource, Images

log = logging.getLogger("moco.pack")  # __name__ is __main__ under python -m

SECONDS_BETWEEN_LINES = 10.0
SAMPLE = 512  # images that are timed,
BLOCK = 16  # so many at once


def run(config: PackConfig, folder: Path) -> None:
    """Write the copy, or with `check` look whether it is as it was written. `folder` keeps a record of the config.

    Raises:
        InputError: the source cannot be read, or the output folder holds something else.
        RunError: the disk is full, or images of the copy differ.
    """
    from moco.data.loading.streams import NO_INDEX, ShardedImages
    from moco.data.sources.packing import Pool
    from moco.data.sources.registry import build_source
    from moco.runs.run_folder import claimed

    data = dataclasses.asdict(config.data)
    max_bad_fraction, resize = data.pop("max_bad_fraction"), data.pop("resize")
    source = build_source(**data)
    if isinstance(source.train, ShardedImages):
        raise InputError(NO_INDEX)
    pool = Pool(source)
    output = Path(config.output)
    if config.check:
        check(output, pool)
    else:
        with taken(output), interruptible(), full_disk_named(output):
            index = begun(output, config, pool, source)
            if index["complete"]:
                log.info("%s is complete; check=true compares it with its checksums", output)
            else:
                write(config, index, pool, max_bad_fraction)
                report(config, index, source, pool, resize)
    with claimed(folder, dataclasses.asdict(config)):
        save_hydra_files(folder)


def taken(output: Path) -> AbstractContextManager[None]:
    """Make the folder if it isn't there; inside, no other process packs there. Errors of `locked`."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output={output}: {error.strerror}") from error
    return locked(output / ".lock", f"output={output}")


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM end the program at once with a line that says how to go on."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(
            number, "the parts that are whole are kept; the same command goes on there"
        )

    before = {number: signal.signal(number, stop) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def full_disk_named(output: Path) -> Iterator[None]:
    """Inside, a full disk is a RunError that says how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(
            f"output={output}: {error.strerror}; with room there the same command goes on"
        ) from error


def begun(output: Path, config: PackConfig, pool: "Pool", source: "DataSource") -> dict[str, Any]:
    """The index of the copy in `output`, or that of a new one.

    Raises:
        InputError: the folder holds a copy of something else, or no copy.
    """
    from moco.data.sources.packed_index import INDEX, read_index
    from moco.data.sources.packed_writer import temporary_of, write_index
    from moco.runs.config_changes import differences

    here = settings(config)
    fingerprint = pool.fingerprint()
    if (output / INDEX).exists():
        index = read_index(str(output))
        if config.format == "auto":
            here["format"] = index["format"]
        there = index["settings"]
        if index["format"] == "array":  # which has no use for it
            here["quality"] = there["quality"]
        different = differences(there, here)
        if not different and index["source"] != fingerprint:
            different = [
                f"the source: {index['source']['images']} images there, {fingerprint['images']} here, or others"
            ]
        if different:
            raise InputError(
                f"output={output}: holds another copy: {'; '.join(different)}; choose another folder"
            )
        return index
    if {*output.iterdir()} - {temporary_of(output / INDEX)}:
        raise InputError(
            f"output={output}: holds other files; choose an empty folder or one that is not there"
        )
    here["format"] = chosen_format(config, pool)
    image_size = (
        source.image_size
        if config.data.resize is None
        else min(source.image_size, config.data.resize)
    )
    index = {
        "version": 1,
        "format": here["format"],
        "complete": False,
        "num_images": None,
        "image_size": image_size,
        "settings": here,
        "source": fingerprint,
        "parts": [],
    }
    write_index(output, index)
    return index


def settings(config: PackConfig) -> dict[str, Any]:
    """What must not change while a copy is written."""
    data = dataclasses.asdict(config.data)
    if isinstance(data["root"], str):
        data["root"] = os.path.abspath(data["root"])
    return {
        "data": data,
        "format": config.format,
        "max_shard_bytes": config.max_shard_bytes,
        "quality": config.quality,
    }


def chosen_format(config: PackConfig, pool: "Pool") -> str:
    """Array or shards; auto is array where that takes less than half of the disk space that is free.

    Raises:
        InputError: an array was asked for and there is no room for it.
    """
    from moco.data.sources.packing import array_bytes

    free = shutil.disk_usage(config.output).free
    needed = array_bytes(pool, config.data.resize)
    room = f"an array takes about {needed / 1e9:,.2f} GB, and {free / 1e9:,.1f} GB are free"
    if config.format == "array" and needed > free:
        raise InputError(
            f"output={config.output}: {room}; format=shards or a smaller data.resize takes less"
        )
    if config.format != "auto":
        return config.format
    name = "array" if needed < free / 2 else "shards"
    log.info("format=%s: %s", name, room)
    return name


def write(config: PackConfig, index: dict[str, Any], pool: "Pool", max_bad_fraction: float) -> None:
    """Write what is missing.

    Raises:
        InputError: too many images cannot be read.
    """
    from moco.data.files.bad_fraction import check_bad_fraction
    from moco.data.sources.packed_writer import Writer
    from moco.data.sources.packing import chunks

    quality = config.quality if index["format"] == "shards" else None
    with Writer(Path(config.output), index, pool, config.max_shard_bytes) as writer:
        if writer.done:
            log.info("going on after %s of %s images", f"{writer.done:,}", f"{len(pool):,}")
        skipped = [pool.name(row) for row, _ in writer.skipped]
        check_bad_fraction(skipped, len(pool), max_bad_fraction)
        progress = Progress(writer.done, len(pool))
        loader = chunks(pool, writer.done, config.data.resize, quality, config.num_workers)
        with held_back(
            ENDING
        ):  # a loader that is interrupted while it starts complains about itself when it goes
            arriving = iter(loader)
        for chunk in arriving:
            for row, reason in chunk.skipped:
                log.warning("skipped an unreadable image: %s", reason)
                skipped.append(pool.name(row))
            writer.add(chunk)
            check_bad_fraction(skipped, len(pool), max_bad_fraction)
            progress.say(chunk.stop)
        writer.finish()


class Progress:
    """A line every few seconds: how far, how fast, how long still."""

    def __init__(self, start: int, total: int) -> None:
        self.start, self.total = start, total
        self.began = self.said = time.monotonic()

    def say(self, done: int) -> None:
        now = time.monotonic()
        if now - self.said < SECONDS_BETWEEN_LINES:
            return
        self.said = now
        rate = (done - self.start) / (now - self.began)
        minutes = (self.total - done) / rate / 60
        log.info(
            "%s of %s images, %.0f a second, %.0f minutes left",
            f"{done:,}",
            f"{self.total:,}",
            rate,
            minutes,
        )


def report(
    config: PackConfig,
    index: dict[str, Any],
    source: "DataSource",
    pool: "Pool",
    resize: int | None,
) -> None:
    """Print what was written, and how fast it reads."""
    from rich.console import Console

    from moco.cli.progress import print_table
    from moco.data.sources.packed import packed

    copy = packed(config.output, config.data.max_image_pixels)
    num_bytes = sum(part["bytes"] for part in index["parts"])
    num_skipped = sum(len(part["skipped"]) for part in index["parts"])
    before, after = seconds_per_image(source, copy)
    kept = [name for name in ("bank", "queries") if getattr(copy, name) is not None]
    times = f"{before * 1e3:.2f} ms an image from the source, {after * 1e3:.2f} from the copy"
    rows = [
        ("images", f"{len(copy.train):,} to train on, {num_skipped} unreadable left out"),
        ("labels", ", ".join(kept) or "none"),
        ("format", f"{index['format']}, {num_bytes / 1e9:,.2f} GB in {len(index['parts'])} parts"),
        ("size", "as it was" if resize is None else f"shorter side at most {resize} px"),
        ("one epoch reads", f"{before / after:.1f} x as fast: {times}"),
    ]
    console = Console()
    print_table(console, "Packed", rows)
    console.print(
        f"train with data=packed data.root={config.output}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


def seconds_per_image(source: "DataSource", copy: "DataSource") -> tuple[float, float]:
    """The time to decode and cut two views, from the source and from the copy, over the same images in turn.

    Both come from the page cache as far as that holds them: this is computing, without waiting for a disk.
    """
    import torch

    from moco.data.augment.views import ViewPair
    from moco.data.sources.packed import PackedImages

    assert isinstance(copy.train, PackedImages)
    crop = {"random_resized_crop": {"scale": [0.2, 1]}}
    pair = ViewPair(crop, crop, [0.5] * 3, [0.5] * 3, copy.image_size, seed=0)
    places = torch.linspace(0, len(copy.train) - 1, min(SAMPLE, len(copy.train))).long()
    rows = copy.train.table["rows"][places]

    def seconds(images: "Images", indices: "Tensor") -> float:
        views = pair.empty_views(len(indices))
        began = time.perf_counter()
        pair.on_images([images.opened(index) for index in indices.tolist()], 0, indices, views)
        return time.perf_counter() - began

    seconds(source.train, rows[:1])  # the first one also pays for what is loaded once
    blocks = zip(rows.split(BLOCK), places.split(BLOCK), strict=True)
    times = [(seconds(source.train, there), seconds(copy.train, here)) for there, here in blocks]
    before, after = (sum(spent) / len(places) for spent in zip(*times, strict=True))
    return before, after


def check(output: Path, pool: "Pool") -> None:
    """Compare the copy with its checksums, its names with the source's.

    Raises:
        InputError: there is no finished copy.
        RunError: something differs; it names the first ten.
    """
    from moco.data.sources.packed import read_copy
    from moco.data.sources.packed_index import read_index
    from moco.data.sources.packed_writer import damaged_shards, verify

    index = read_index(str(output))
    if not index["complete"]:
        raise InputError(
            f"output={output}: not finished; start the same command without check, then check"
        )
    copy, table = read_copy(str(output), index, max_image_pixels=1)
    num_skipped = sum(len(part["skipped"]) for part in index["parts"])
    if len(copy) + num_skipped != len(pool):
        raise RunError(
            f"{output}: made of {len(copy) + num_skipped} images, and the source has {len(pool)}; pack it anew"
        )
    progress = Progress(0, len(copy))
    differing = []
    for number, (name, is_right) in enumerate(verify(copy, pool, table["rows"]), start=1):
        if not is_right:
            differing.append(name)
        progress.say(number)
    if differing:
        first = ", ".join(map(printable, differing[:10]))
        raise RunError(
            f"{output}: {len(differing)} of {len(copy)} images are not as they were written: {first}"
        )
    shards = damaged_shards(output, index)
    if shards:
        raise RunError(
            f"{output}: between its images other than it was written: {', '.join(shards[:10])}"
        )
    log.info(
        "%s: all %s images are as they were written, and the source's by name and number",
        output,
        f"{len(copy):,}",
    )


def main() -> None:
    """Entry point of ``moco-pack``; ``--check`` is another way to say ``check=true``."""
    sys.argv = ["check=true" if argument == "--check" else argument for argument in sys.argv]
    launch(run, PackConfig, "pack")


if __name__ == "__main__":
    main()
