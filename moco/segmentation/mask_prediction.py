"""The long pass of ``moco.predict``: a mask for every image of a dataset, batch after batch.

A batch is always made of the same images, whatever was done before: the bits of a result may depend
on what is computed together. So a batch of which some masks are missing is computed as a whole.
"""

import logging
import math
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler

from moco.data.augment.views import as_planes
from moco.data.files.images import UnreadableImage, check_bad_fraction
from moco.data.loading.every_image import ImageKey, ImageSet, KeyReader, ReadImage, every_image
from moco.data.loading.workers import unchanged
from moco.data.sources.pixel_values import PreparedImage
from moco.data.sources.shards import Problem
from moco.errors import InputError, RunError, printable
from moco.phases import phase
from moco.segmentation.image_parts import ImageParts
from moco.segmentation.mask_files import Arrays, MaskFolder, overlay_of
from moco.segmentation.mask_names import mask_name, same_mask
from moco.segmentation.pixel_classifier import PixelClassifier

log = logging.getLogger(__name__)

LONGEST_OVERLAY = 2048
"""Longer side of an overlay, px; a larger image is shown with every n-th pixel."""


@dataclass
class Outcome:
    """What became of the images of a dataset."""

    written: int = 0
    """Images whose files were written now."""
    kept: int = 0
    """Images whose files were there."""
    unreadable: list[str] = field(default_factory=list)
    """Names of the images that cannot be read."""

    @property
    def num_done(self) -> int:
        """The number of images that need no more work."""
        return self.written + self.kept + len(self.unreadable)


@dataclass(frozen=True)
class DecodeSmall:
    """Decode an image in a loader process, unless it is large.

    Args:
        most_pixels: of a small image. Larger ones are decoded in the program's own process, because
            the shared memory of the loader processes may be small.
    """

    most_pixels: int

    def __call__(self, image: PreparedImage) -> Tensor | None:
        """Return (bands, height, width), 8-bit or from 0 to 1; None for a large image."""
        if math.prod(image.size) > self.most_pixels:
            return None
        return as_planes(image.pixels())


@contextmanager
def error_named(images: Sequence[ReadImage]) -> Iterator[None]:
    """Begin a `RunError` of the block with the name of the first of these images."""
    try:
        yield
    except RunError as error:
        raise RunError(f"{printable(images[0].name)}: {error}") from error


@dataclass
class MaskPass:
    """Predict the masks of an image set, and write them.

    Args:
        images: the images.
        roots: their folders, see `mask_name`.
        folder: takes the masks, inside `MaskFolder.taken`.
        classifiers: one for each device. They share the work.
        batch_size: neighbouring images that are taken together.
        num_workers: loader processes.
        max_bad_fraction: the share of unreadable images that is accepted.
    """

    images: ImageSet
    roots: Sequence[str]
    folder: MaskFolder
    classifiers: Sequence[PixelClassifier]
    batch_size: int
    num_workers: int
    max_bad_fraction: float

    def __post_init__(self) -> None:
        self.outcome = Outcome()
        self.reader = KeyReader(self.images.images, self.images.values)
        self.names: dict[str, str] = {}
        """The image of each mask, as far as they are known."""
        self.is_ended = threading.Event()

    def run(self, show_progress: Callable[[int], None]) -> Outcome:
        """Predict and write everything that is not there yet.

        Args:
            show_progress: called with the number of images that are done.

        Raises:
            InputError: two images have the same mask, or more images than `max_bad_fraction` are
                unreadable.
            RunError: a score is not a number.
        """
        how = self.classifiers[0].how
        loader = every_image(
            self.reader,
            DecodeSmall(how.max_forward_pixels),
            unchanged,
            self.missing_batches(),
            self.num_workers,
            self.classifiers[0].device,
        )
        outcome = self.outcome
        for problems, num_written in self.results(loader):
            outcome.written += num_written
            for problem in problems:
                if problem.is_shard:
                    log.warning("damaged: %s", problem.reason)
                    continue
                log.warning("skipped: %s", problem.reason)
                outcome.unreadable.append(problem.name)
            if problems:
                check_bad_fraction(outcome.unreadable, len(self.images), self.max_bad_fraction)
            show_progress(outcome.num_done)
        return outcome

    def missing_batches(self) -> Iterator[list[ImageKey]]:
        """Yield the batches of which a file is missing."""
        keys: Any = self.images.keys_from(self.images.start)
        batches: Any = BatchSampler(keys, self.batch_size, drop_last=False)
        for batch in batches:
            num_missing = 0
            for key in batch:
                if isinstance(key.source, Problem) or not self.folder.is_done(self.name_of(key)):
                    num_missing += 1
            if num_missing == 0:
                self.outcome.kept += len(batch)
            else:
                yield batch

    def name_of(self, key: ImageKey) -> str:
        """Return the name of an image's mask, once for each image.

        Raises:
            InputError: another image has the same.
        """
        name = mask_name(key.name, self.roots)
        # Images by number were checked before the pass. The names in shards are known only now.
        if not isinstance(key.source, int):
            if name in self.names:
                raise InputError(same_mask(self.names[name], key.name, name))
            self.names[name] = key.name
        return name

    def results(self, loader: Iterable[list[ReadImage]]) -> Iterator[tuple[list[Problem], int]]:
        """Yield for each batch what cannot be read of it, and how many images were written."""
        if len(self.classifiers) == 1:
            for batch in loader:
                yield self.predict_batch(self.classifiers[0], batch)
            return
        free: SimpleQueue[PixelClassifier] = SimpleQueue()
        for classifier in self.classifiers:
            free.put(classifier)

        def predict(batch: list[ReadImage]) -> tuple[list[Problem], int]:
            classifier = free.get()
            try:
                return self.predict_batch(classifier, batch)
            finally:
                free.put(classifier)

        running: deque[Future[tuple[list[Problem], int]]] = deque()
        with ThreadPoolExecutor(len(self.classifiers)) as pool:
            try:
                for batch in loader:
                    running.append(pool.submit(predict, batch))
                    # One batch waits for each device, and no more: they are in memory.
                    if len(running) > 2 * len(self.classifiers):
                        yield running.popleft().result()
                while running:
                    yield running.popleft().result()
            finally:
                # After an error or a signal the threads stop at the next part of an image.
                self.is_ended.set()
                pool.shutdown(wait=False, cancel_futures=True)

    def predict_batch(
        self, classifier: PixelClassifier, batch: Sequence[ReadImage]
    ) -> tuple[list[Problem], int]:
        """Predict the images of a batch and write their files; see `results`."""
        problems = []
        of_size: dict[tuple[int, ...], list[ReadImage]] = defaultdict(list)
        alone = []
        for image in batch:
            source = image.key.source
            if image.problem:
                is_shard = isinstance(source, Problem) and source.is_shard
                problems.append(Problem(image.name, image.problem, is_shard))
            elif image.value is None or classifier.how.is_by_windows(image.value.shape[1:]):
                alone.append(image)
            else:
                of_size[tuple(image.value.shape)].append(image)
        num_written = 0
        for (_, height, width), images in of_size.items():
            num_at_once = classifier.how.num_at_once(height, width)
            for first in range(0, len(images), num_at_once):
                group = images[first : first + num_at_once]
                self.predict_together(classifier, group)
                num_written += len(group)
        for image in alone:
            try:
                self.predict_in_parts(classifier, image)
                num_written += 1
            except UnreadableImage as error:
                problems.append(Problem(image.name, str(error), is_shard=False))
        return problems, num_written

    def predict_together(self, classifier: PixelClassifier, images: Sequence[ReadImage]) -> None:
        """Predict whole images of one size in one forward pass, and write their files."""
        self.check_not_ended()
        with error_named(images):
            scores = classifier.scores(torch.stack([image.value for image in images]))
        for image, of_image in zip(images, scores, strict=True):
            arrays = self.folder.empty_arrays(tuple(of_image.shape[1:]))
            self.fill(arrays, classifier, 0, 0, of_image)
            self.write(image, arrays, None)

    def predict_in_parts(self, classifier: PixelClassifier, image: ReadImage) -> None:
        """Predict one image by windows, and write its files.

        Raises:
            UnreadableImage: it is damaged.
        """
        parts = None
        if image.value is None:
            parts = ImageParts(self.reader[image.key])  # type: ignore[arg-type]
            size, read = parts.size, parts.read
        else:
            pixels = image.value
            size = tuple(pixels.shape[1:])

            def read(top: int, left: int, height: int, width: int) -> Tensor:
                return pixels[:, top : top + height, left : left + width]

        arrays = self.folder.empty_arrays(size)
        num_done = 0
        # A large raster takes hours, so its own pixels are counted, too.
        with error_named([image]), phase(printable(image.name), math.prod(size), "px") as say:
            for part in classifier.parts(read, size):
                self.check_not_ended()
                self.fill(arrays, classifier, *part)
                num_done += part.scores[0].numel()
                say(num_done)
        self.write(image, arrays, parts)

    def fill(
        self, arrays: Arrays, classifier: PixelClassifier, top: int, left: int, scores: Tensor
    ) -> None:
        """Write the classes of a part (classes, height, width) into the arrays of its image."""
        height, width = scores.shape[1:]
        rows, columns = slice(top, top + height), slice(left, left + width)
        # 16 bits hold all numbers of classes that a mask may have.
        numbers = scores.argmax(dim=0).to(torch.int32).cpu().numpy()
        arrays.classes[rows, columns] = numbers
        if arrays.probabilities is not None:
            probabilities = classifier.probabilities(scores).cpu().numpy()
            arrays.probabilities[:, rows, columns] = self.folder.stored(probabilities)

    def write(self, image: ReadImage, arrays: Arrays, parts: ImageParts | None) -> None:
        """Write the files of an image.

        Args:
            image: with its pixels, or None in their place.
            arrays: what is predicted.
            parts: gives the pixels if `image` has none.
        """
        overlay = None
        if self.folder.overlays:
            step = math.ceil(max(arrays.classes.shape) / LONGEST_OVERLAY)
            if parts is None:
                pixels = image.value[:, ::step, ::step].permute(1, 2, 0).numpy()
                assert self.images.values is not None
                shown = self.images.values.shown(pixels)
            else:
                shown = parts.smaller(step)
            classes = np.ascontiguousarray(arrays.classes[::step, ::step])
            overlay = overlay_of(shown, classes, self.folder.colours)
        self.folder.write(mask_name(image.key.name, self.roots), arrays, overlay)

    def check_not_ended(self) -> None:
        """Raise RunError in a thread whose program is ending."""
        if self.is_ended.is_set():
            raise RunError("the program is ending")
