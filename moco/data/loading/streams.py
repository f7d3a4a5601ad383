"""Training from tar shards: endless streams of samples, batches of them, and their loader.

Batch b of an epoch comes from stream b modulo the number of streams. What a stream holds depends on
(seed, epoch, process, stream), and each loader process reads whole streams. So the batches are the
same for any number of loader processes.
"""

import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from moco.data.augment.draws import derived_seed
from moco.data.files.images import check_bad_fraction
from moco.data.loading.loaders import NamedImage, ResumableLoader, StreamSampler
from moco.data.loading.workers import note_read, unchanged
from moco.data.sources.shards import Problem, Sample, ShardedImages
from moco.errors import InputError, printable

log = logging.getLogger(__name__)

MakeBatch = Callable[[Sequence[NamedImage], int], Any]
"""From (position in the epoch, image, name) of each row and the epoch to a batch.

The batch has a field ``unreadable``, (batch,) bool: the images that cannot be decoded."""


@dataclass(frozen=True)
class Streams:
    """The endless streams of this process over all shards.

    The shards get a new order in each epoch. Of R processes, process r reads every R-th shard, and
    of L streams, stream l reads every L-th of those. When a stream has handed out all its samples,
    it starts again in another order.
    """

    images: ShardedImages
    num_streams: int
    """Never more than the shards of a process."""
    seed: int
    rank: int
    world_size: int

    def shards_of(self, epoch: int, stream: int) -> list[str]:
        """Return the shards of a stream, in the order in which it reads them first."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, epoch))
        order = torch.randperm(len(self.images.shards), generator=generator)
        of_process = order[self.rank :: self.world_size]
        of_stream = of_process[stream :: self.num_streams].tolist()
        return [self.images.shards[number] for number in of_stream]

    def samples(self, epoch: int, stream: int) -> Iterator[Sample | Problem]:
        """Yield the samples of one stream, without end.

        Raises:
            InputError: its shards hold no image.
        """
        shards = self.shards_of(epoch, stream)
        for number in itertools.count():
            draws = random.Random(derived_seed(self.seed, epoch, self.rank, stream, number))
            if number > 0:
                # Sorting by random() shuffles: Python promises the same numbers in every version
                # only for random().
                shards = sorted(shards, key=lambda shard: draws.random())
            is_empty = True
            for found in self._shuffled(shards, draws):
                if isinstance(found, Sample):
                    is_empty = False
                yield found
            if is_empty:
                names = ", ".join(map(printable, shards[:10]))
                raise InputError(f"data.root: no images in {names}")

    def _shuffled(self, shards: Iterable[str], draws: random.Random) -> Iterator[Sample | Problem]:
        """Yield every sample of the shards once, drawn from a buffer, and problems at once."""
        buffer: list[Sample] = []
        for shard in shards:
            for found in self.images.samples(shard, note_read):
                if isinstance(found, Problem):
                    yield found
                elif len(buffer) < self.images.shuffle_buffer:
                    buffer.append(found)
                else:
                    place = int(draws.random() * len(buffer))
                    yield buffer[place]
                    buffer[place] = found
        while buffer:
            place = int(draws.random() * len(buffer))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            yield buffer.pop()


def build_streams(images: ShardedImages, seed: int, rank: int = 0, world_size: int = 1) -> Streams:
    """Build the streams of this process.

    Raises:
        InputError: there are fewer shards than processes.
    """
    shards_per_process = len(images.shards) // world_size
    if shards_per_process == 0:
        raise InputError(
            f"data.root: {len(images.shards)} shards for {world_size} processes; "
            "expected at least one for each"
        )
    # Every stream needs a shard. A divisor of the wanted number keeps the numbers of loader
    # processes possible that divide it.
    wanted = images.num_streams
    num_streams = 1
    for divisor in divisors(wanted):
        if divisor <= shards_per_process:
            num_streams = divisor  # they come in ascending order
    if num_streams < wanted:
        log.info(
            "%d streams instead of data.streams=%d, for %d shards a process",
            num_streams,
            wanted,
            shards_per_process,
        )
    return Streams(images, num_streams, seed, rank, world_size)


class StreamBatch(NamedTuple):
    """What a loader process hands to the training process."""

    batch: Any
    """The result of `MakeBatch`."""
    problems: list[Problem]
    """Problems found while reading up to the last row of the batch."""


@dataclass
class StreamDataset(Dataset[StreamBatch]):
    """Batches by (epoch, batch).

    A loader process keeps its streams open. It reads a stream forward to the batch that it is asked
    for, without decoding.
    """

    streams: Streams
    batch_size: int
    """Rows of each batch in this process."""
    make_batch: MakeBatch
    """Gets the position of each row in the epoch, on which its draws depend. The positions count
    the rows of all processes."""
    opened: "dict[int, OpenStream]" = field(default_factory=dict)
    """The open streams by number."""

    def __getitem__(self, place: tuple[int, int]) -> StreamBatch:
        epoch, number = place
        samples, problems = self._stream_at(epoch, number).take(self.batch_size)
        first = (number * self.streams.world_size + self.streams.rank) * self.batch_size
        rows = []
        for position, sample in enumerate(samples, start=first):
            rows.append((position, sample.image, sample.name))
        batch = self.make_batch(rows, epoch)
        for row in batch.unreadable.nonzero().flatten().tolist():
            name = samples[row].name
            problems.append(Problem(name, f"{printable(name)}: cannot be decoded", is_shard=False))
        return StreamBatch(batch, problems)

    def _stream_at(self, epoch: int, number: int) -> "OpenStream":
        """Return the stream of a batch, read forward to that batch."""
        turn, stream = divmod(number, self.streams.num_streams)
        # After a resume in the middle of an epoch, a loader process reads other streams in the next
        # epoch. Close those of the last one.
        for other, opened in list(self.opened.items()):
            if opened.epoch != epoch:
                del self.opened[other]
        num_before = turn * self.batch_size
        if stream not in self.opened or self.opened[stream].num_taken > num_before:
            self.opened[stream] = OpenStream(epoch, self.streams.samples(epoch, stream))
        opened = self.opened[stream]
        opened.take(num_before - opened.num_taken)
        return opened


@dataclass
class OpenStream:
    """A stream in an epoch, and the number of samples taken from it."""

    epoch: int
    samples: Iterator[Sample | Problem]
    num_taken: int = 0

    def take(self, number: int) -> tuple[list[Sample], list[Problem]]:
        """Return the next samples, and the problems before and between them."""
        samples: list[Sample] = []
        problems: list[Problem] = []
        while len(samples) < number:
            found = next(self.samples)
            if isinstance(found, Problem):
                problems.append(found)
            else:
                samples.append(found)
        self.num_taken += number
        return samples, problems


class StreamLoader(ResumableLoader):
    """Yield the batches of `MakeBatch`.

    Args:
        num_batches: batches of an epoch in each process.
        unreadable: gets the names of samples that cannot be read.
        options: of `moco.data.loading.workers.loader_options`.

    Raises:
        InputError: the number of loader processes does not divide that of the streams. While
            iterating: more than `max_bad_fraction` of the images are unreadable, or a shard is
            refused.
    """

    def __init__(
        self,
        dataset: StreamDataset,
        num_batches: int,
        *,
        max_bad_fraction: float,
        unreadable: set[str],
        **options: Any,
    ) -> None:
        streams = dataset.streams
        check_num_workers(options["num_workers"], streams.num_streams)
        sampler = StreamSampler(num_batches, dataset.batch_size, streams.rank, streams.world_size)
        # The dataset hands out whole batches.
        options |= {"batch_size": None, "collate_fn": unchanged}
        super().__init__(dataset, sampler, dataset.batch_size, **options)
        self.num_images = len(streams.images)
        self.max_bad_fraction = max_bad_fraction
        self.unreadable = unreadable
        self.damaged_shards: set[str] = set()

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for result in super().__iter__():
            for problem in result.problems:
                seen, what = self.unreadable, "skipped"
                if problem.is_shard:
                    seen, what = self.damaged_shards, "damaged"
                if problem.name not in seen:  # a stream that starts again meets it again
                    seen.add(problem.name)
                    log.warning("%s: %s", what, problem.reason)
            check_bad_fraction(self.unreadable, self.num_images, self.max_bad_fraction)
            yield result.batch


def check_num_workers(num_workers: int, num_streams: int) -> None:
    """Refuse a number of loader processes that would have to share a stream.

    Each of them would read all of it.

    Raises:
        InputError: the number does not divide that of the streams.
    """
    if num_workers and num_streams % num_workers:
        choices = ", ".join(map(str, [0, *divisors(num_streams)]))
        raise InputError(
            f"data.num_workers={num_workers}: "
            f"expected a divisor of the {num_streams} streams: {choices}"
        )


def divisors(number: int) -> list[int]:
    """Return all divisors, the smallest first."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
