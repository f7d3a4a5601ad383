"""What a run that waits for its images can change, by how it reads them."""

import math
import os

from moco.data.loading.streams import Streams, divisors
from moco.data.sources.hugging_face import TableImages
from moco.data.sources.packed_copy import PIXELS, PackedImages
from moco.data.sources.source import FileImages
from moco.errors import printable

MOST_REMEDIES = 2
PACKED_LARGER = 8 / 7  # side of a packed image over that of a view: 256 px for 224


def cores_of(num_processes: int) -> int:
    """Cores for each of this machine's processes that train."""
    return max(1, len(os.sched_getaffinity(0)) // num_processes)


def remedies(
    images: object,
    share: float,
    *,
    num_workers: int,
    num_cores: int,
    image_size: int,
    has_gpu: bool,
    engine: str | None = None,
    streams: Streams | None = None,
) -> list[str]:
    """What would have training wait less for images that are not in the device's memory, most effective first.

    Args:
        images: any data set's, those with masks too.
        share: of the time that goes into waiting, 0 to 1.
        num_cores: that this process and its `num_workers` may use.
        image_size: side of a view, px.
        engine: worker or batch; None where there is no choice.
        streams: of this process, where the images come from tar shards.
    """
    wanted = min(num_cores, workers_that_suffice(num_workers, share))
    has_idle_cores = wanted > num_workers and (num_cores > 1 or has_gpu)
    found = [
        _more_workers(streams, num_workers, wanted, num_cores) if has_idle_cores else "",
        _other_engine(engine, has_gpu),
        _copy(images, image_size),
    ]
    said = [remedy for remedy in found if remedy][:MOST_REMEDIES]
    if said:
        return said
    if has_idle_cores:  # and too few shards
        return [
            f"more and smaller shards: {num_workers} loader processes are the most that these can feed"
        ]
    return [
        f"more than the {num_cores} cores that this process may use, or an augmentation with less to do"
    ]


def workers_that_suffice(num_workers: int, share: float) -> int:
    """Loader processes with which training would not wait, if each had a core.

    With L the work on a batch and S the rest of its step, w processes take L / w: equal to S at w = L / S. With none the
    share is L / (L + S), with some that cannot keep up S / (1 - share) = L / w.
    """
    busy = max(1 - share, 0.01)
    return math.ceil(round((num_workers / busy) if num_workers else share / busy, 6))


def _more_workers(streams: Streams | None, num_workers: int, wanted: int, num_cores: int) -> str:
    """More of them, as many as the streams allow; empty where there are too few shards."""
    said = f"{num_workers} now; this process may use {num_cores} cores"
    if streams is None:
        return f"data.num_workers={wanted} ({said})"
    possible = [
        number for number in divisors(streams.num_streams) if num_workers < number <= num_cores
    ]
    if possible:
        return f"data.num_workers={next((number for number in possible if number >= wanted), possible[-1])} ({said})"
    wanted = min(wanted, len(streams.shards) // streams.world_size)
    return (
        f"data.streams={wanted} data.num_workers={wanted} ({said})" if wanted > num_workers else ""
    )


def _other_engine(engine: str | None, has_gpu: bool) -> str:
    if has_gpu and engine == "worker":
        return "data.engine=batch (the GPU then does the colours and the blur)"
    if not has_gpu and engine == "batch":
        return "data.engine=worker (the loader processes then do the colours and the blur)"
    return ""


def _copy(images: object, image_size: int) -> str:
    """A copy that is faster to read; empty where moco.pack makes none."""
    if isinstance(images, (FileImages, TableImages)):
        size = math.ceil(image_size * PACKED_LARGER)
        return (
            f"a smaller, packed copy (python -m moco.pack with this run's data settings, data.resize={size} and output=DIR; "
            "then data=packed data.root=DIR)"
        )
    if not isinstance(images, PackedImages) or images.files == [PIXELS]:
        return ""
    root = printable(images.folder)
    return (
        f"a copy that needs no decoding (python -m moco.pack data=packed data.root={root} format=array output=DIR; then "
        "data.root=DIR)"
    )
