"""Training from tar shards: endless streams of samples in a reproducible order, batches from them, and their loader.

Batch b of an epoch comes whole from stream b modulo the number of streams. What a stream holds depends on (seed, epoch,
process, stream), and a loader's worker serves whole streams, so the batches are the same for any number of workers.
"""

import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils.data import Dataset

from moco.data.augment.draws import derived_seed
from moco.data.files.bad_fraction import check_bad_fraction
from moco.data.files.decoding import EncodedImage
from moco.data.loading.lost_workers import LastRead, WatchedImage, WatchedLoader
from moco.data.loading.samplers import StreamSampler, images_handed_out
from moco.data.sources.shards import Problem, Sample, ShardedImages, images_in
from moco.errors import InputError, printable

log = logging.getLogger(__name__)

T = TypeVar("T")
MakeBatch = Callable[[Sequence[tuple[int, EncodedImage, str]], int], Any]
"""From (position in the epoch, image, name) of each row and the epoch to a batch, whose field ``unreadable``, (N,) bool,
says which rows' images could not be decoded."""


def build_streams(
    images: ShardedImages, seed: int, rank: int = 0, world_size: int = 1
) -> "Streams":
    """Return this process's share of the streams over the shards.

    Raises:
        InputError: there are fewer shards than processes.
    """
    shards_per_process = len(images.shards) // world_size
    if shards_per_process == 0:
        raise InputError(
            f"data.root: {len(images.shards)} shards for {world_size} processes; "
            "expected at least one for each"
        )
    # A divisor, since the number of loader processes was chosen to divide data.streams.
    num_streams = max(
        number for number in divisors(images.num_streams) if number <= shards_per_process
    )
    if num_streams < images.num_streams:
        log.info(
            "%d streams instead of data.streams=%d, for %d shards a process",
            num_streams,
            images.num_streams,
            shards_per_process,
        )
    return Streams(
        images.shards,
        num_streams,
        images.shuffle_buffer,
        images.max_image_pixels,
        seed,
        rank,
        world_size,
    )


@dataclass(frozen=True)
class Streams:
    """This process's endless streams over all shards.

    In each epoch the shards' order is drawn anew; process r of R takes every R-th, its stream l of L every L-th of those. A
    stream hands out all its samples before it begins again, in another order.
    """

    shards: Sequence[str]
    num_streams: int
    shuffle_buffer: int
    max_image_pixels: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def shards_of(self, epoch: int, stream: int) -> list[str]:
        """The shards of a stream, in the order of its first pass."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, epoch))
        order = torch.randperm(len(self.shards), generator=generator)
        return [
            self.shards[number]
            for number in order[self.rank :: self.world_size][stream :: self.num_streams]
        ]

    def samples(
        self, epoch: int, stream: int, note: Callable[[str], None] = lambda name: None
    ) -> Iterator[Sample | Problem]:
        """One stream, without end.

        Args:
            note: told the name of each sample before it is read.

        Raises:
            InputError: no shard of it holds an image, or a shard is refused.
        """
        shards = self.shards_of(epoch, stream)
        for number in itertools.count():
            draws = random.Random(derived_seed(self.seed, epoch, self.rank, stream, number))
            if number:
                # By sorting: of Python's generator only random() is promised to give the same in every version.
                shards = sorted(shards, key=lambda shard: draws.random())
            is_empty = True
            for found in self._shuffled(shards, draws, note):
                is_empty = is_empty and isinstance(found, Problem)
                yield found
            if is_empty:
                raise InputError(
                    f"data.root: no images in {', '.join(map(printable, shards[:10]))}"
                )

    def _shuffled(
        self, shards: Iterable[str], draws: random.Random, note: Callable[[str], None]
    ) -> Iterator[Sample | Problem]:
        """Every sample of the shards once, the next one always drawn from a buffer; problems as they come up."""
        waiting: list[Sample] = []
        for shard in shards:
            for found in images_in(shard, self.max_image_pixels, note):
                if isinstance(found, Problem):
                    yield found
                elif len(waiting) < self.shuffle_buffer:
                    waiting.append(found)
                else:
                    place = int(draws.random() * len(waiting))
                    yield waiting[place]
                    waiting[place] = found
        while waiting:
            place = int(draws.random() * len(waiting))
            waiting[place], waiting[-1] = waiting[-1], waiting[place]
            yield waiting.pop()


class StreamBatch(NamedTuple):
    """What a worker hands to the training process."""

    batch: Any
    """What `MakeBatch` returned; None where a shard was refused."""
    problems: list[Problem]
    """Met on the way to these rows, or in them."""
    refused: str
    """Why training cannot go on; empty if it can."""


class StreamDataset(Dataset[StreamBatch]):
    """Batches by (epoch, batch). A worker keeps its streams open; one that it is not at yet is read forward, undecoded.

    A row's position in the epoch counts the rows of all processes: it is what augmentation draws depend on.

    Args:
        batch_size: N, rows of each batch in this process.
        num_workers: processes that will read from this object at the same time.
    """

    def __init__(
        self, streams: Streams, batch_size: int, make_batch: MakeBatch, num_workers: int = 0
    ) -> None:
        self.last_read = LastRead(num_workers)
        self.streams = streams
        self.batch_size = batch_size
        self.make_batch = make_batch
        self.opened: dict[int, OpenStream] = {}

    def __getitem__(self, place: tuple[int, int]) -> StreamBatch:
        epoch, number = place
        try:
            samples, problems = self._stream(epoch, number).take(self.batch_size)
        except InputError as error:  # raised in a worker it would arrive as a traceback
            return StreamBatch(None, [], str(error))
        first = (number * self.streams.world_size + self.streams.rank) * self.batch_size
        note = self.last_read.note
        watched = [WatchedImage(sample.image, sample.name, note) for sample in samples]
        rows = [(first + row, image, image.name) for row, image in enumerate(watched)]
        batch = self.make_batch(rows, epoch)
        for row in batch.unreadable.nonzero().flatten().tolist():
            name = samples[row].name
            problems.append(Problem(name, f"{printable(name)}: cannot be decoded", is_shard=False))
        return StreamBatch(batch, problems, "")

    def _stream(self, epoch: int, number: int) -> "OpenStream":
        """The stream that holds a batch, at that batch."""
        turn, stream = divmod(number, self.streams.num_streams)
        # After a resume within an epoch a worker serves other streams in the next one: what it no longer reads is closed.
        self.opened = {
            place: opened for place, opened in self.opened.items() if opened.epoch == epoch
        }
        opened = self.opened.get(stream)
        if opened is None or opened.num_taken > turn * self.batch_size:
            opened = self.opened[stream] = OpenStream(
                epoch, self.streams.samples(epoch, stream, self.last_read.note)
            )
        opened.take(turn * self.batch_size - opened.num_taken)
        return opened


class OpenStream:
    """A stream in an epoch, and how many samples were taken from it."""

    def __init__(self, epoch: int, samples: Iterator[Sample | Problem]) -> None:
        self.epoch = epoch
        self.num_taken = 0
        self.samples = samples

    def take(self, number: int) -> tuple[list[Sample], list[Problem]]:
        """The next samples, and the problems before and between them."""
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


class StreamLoader(WatchedLoader):
    """Yields what `MakeBatch` makes. Lightning keeps its position in the checkpoint, so that a resumed epoch goes on there.

    Args:
        num_batches: of an epoch, in each process.
        unreadable: gets the names of samples that could not be read.
        options: of `moco.data.loading.workers.loader_options`.

    Raises:
        InputError: the number of workers does not divide that of the streams. While iterating: unreadable samples are more
            than `max_bad_fraction` of `num_images`, or a shard is refused.
    """

    sampler: StreamSampler
    dataset: StreamDataset

    def __init__(
        self,
        dataset: StreamDataset,
        num_batches: int,
        *,
        num_images: int,
        max_bad_fraction: float,
        unreadable: set[str],
        **options: Any,
    ) -> None:
        check_num_workers(options["num_workers"], dataset.streams.num_streams)
        super().__init__(
            dataset,
            batch_size=None,
            sampler=StreamSampler(num_batches),
            collate_fn=unchanged,
            **options,
        )
        self.num_images = num_images
        self.max_bad_fraction = max_bad_fraction
        self.unreadable = unreadable
        self.damaged_shards: set[str] = set()
        self.batches_done = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.batches_done = self.sampler.start
        for handed in super().__iter__():
            if handed.refused:
                raise InputError(handed.refused)
            self._note(handed.problems)
            self.batches_done += 1
            yield handed.batch

    def _note(self, problems: Sequence[Problem]) -> None:
        for problem in problems:
            known = self.damaged_shards if problem.is_shard else self.unreadable
            if problem.name not in known:
                known.add(problem.name)
                log.warning("%s: %s", "damaged" if problem.is_shard else "skipped", problem.reason)
        check_bad_fraction(self.unreadable, self.num_images, self.max_bad_fraction)

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its images were handed out, by all processes together."""
        return {"epoch": self.sampler.epoch, "images": self.batches_done * self._images_at_once}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there when that epoch is iterated next."""
        self.sampler.resume_at = (state["epoch"], images_handed_out(state) // self._images_at_once)

    @property
    def _images_at_once(self) -> int:
        return self.dataset.batch_size * self.dataset.streams.world_size


def check_num_workers(num_workers: int, num_streams: int) -> None:
    """Raises InputError if workers would have to share a stream: both would have to read all of it."""
    if num_workers and num_streams % num_workers:
        choices = ", ".join(map(str, [0, *divisors(num_streams)]))
        raise InputError(
            f"data.num_workers={num_workers}: expected a divisor of the {num_streams} streams: {choices}"
        )


def divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def unchanged(batch: T) -> T:
    """Instead of collating: the data set hands out whole batches."""
    return batch
