"""The long pass of ``moco.embed``: features of every image of a dataset, batch after batch."""

import csv
import hashlib
import io
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from moco.data.augment.views import Normalized, evaluation_crop
from moco.data.files.images import check_bad_fraction
from moco.data.loading.every_image import (
    ImageBatch,
    ImageSet,
    IndexedSet,
    image_set,
)
from moco.data.loading.workers import cores_of
from moco.data.sources.own_dataset import IterableImages
from moco.data.sources.shards import ShardedImages
from moco.data.sources.source import DataSource, Labelled
from moco.errors import InputError, RunError, printable
from moco.evaluation.image_names import labels_by_name
from moco.evaluation.indexes import EXACT, build_index, recall
from moco.evaluation.near_duplicates import (
    LEAST_IMAGES,
    near_duplicate_cosine,
    nearest_cosines,
    pairs_above,
)
from moco.evaluation.resumable_features import FeatureParts
from moco.phases import phase
from moco.runs.atomic_files import write_atomically
from moco.runs.interrupts import ENDING, held_back

log = logging.getLogger(__name__)

# The setting `index` of a run that writes no index.
NO_INDEX = "none"
# The ending of the table of near-duplicates.
DUPLICATES = ".duplicates.csv"
# Loader processes where the settings do not say a number.
USUAL_WORKERS = 4
# Settings that may differ when a pass is continued: the features do not depend on them, or the
# names of the images show the difference.
FREE_SETTINGS = ("download", "max_bad_fraction", "num_images", "num_workers")
# Images that a message names.
MOST_NAMED = 10
# Neighbours that are searched to measure what an approximate index finds.
NUM_NEIGHBORS = 10


def choose_images(source: DataSource, split: str, name: str) -> ImageSet:
    """Return the images of a split, with labels if all of them have one.

    Args:
        source: the dataset.
        split: ``train`` or ``test``.
        name: of the dataset, for the message.

    Raises:
        InputError: the dataset has no test images.
    """
    if split == "test":
        if source.queries is None:
            raise InputError(f"split=test: data={name} has no images that are held out")
        return IndexedSet(source.queries, has_labels=True)
    # A stream has no images by number, also if there are others with labels.
    if source.bank is None or isinstance(source.train, (ShardedImages, IterableImages)):
        return image_set(source.train)
    # Training images may be divided into bank and queries.
    labels = labels_by_name(source.train, source.bank, source.queries)
    bank = source.bank
    labelled = Labelled(source.train, labels, bank.class_names, bank.label_sets)
    return IndexedSet(labelled, has_labels=bool((labels >= 0).any()))


def open_parts(
    folder: Path, settings: dict[str, Any], encoder: nn.Module, images: ImageSet
) -> FeatureParts:
    """Return the features that an earlier run has left in the folder, or none.

    Args:
        folder: of the parts.
        settings: what the features depend on, as plain data.
        encoder: its weights must be the same.
        images: their names and order must be the same.

    Raises:
        InputError: the folder holds features of something else.
    """
    compared = {key: value for key, value in settings["data"].items() if key not in FREE_SETTINGS}
    about = {
        "settings": settings | {"data": compared},
        "weights": weights_digest(encoder),
        "data": images.fingerprint(),
    }
    parts = FeatureParts(folder, about, images.start)
    if parts.num_done > 0:
        log.info("continuing after %s of %s images", f"{parts.num_done:,}", f"{len(images):,}")
    return parts


def load_images(
    images: ImageSet, parts: FeatureParts, settings: dict[str, Any], device: torch.device
) -> Iterable[ImageBatch]:
    """Return batches of the images that the parts do not have yet."""
    data = settings["data"]
    num_workers = data["num_workers"]
    if num_workers is None:
        num_workers = 0 if images.is_in_memory else min(USUAL_WORKERS, cores_of(1))
    crop = evaluation_crop(data["image_size"], data["crop_ratio"])
    return images.batches(parts.state.end, crop, settings["batch_size"], num_workers, device)


def weights_digest(encoder: nn.Module) -> str:
    """Return a hash that differs where any weight differs."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def build_encode(
    encoder: Any, feature: str, normalized: Normalized, device: torch.device
) -> Callable[[Tensor], np.ndarray]:
    """Return a function from images to features.

    It takes images (batch, bands, height, width), 8-bit or from 0 to 1, and returns (batch, width)
    float32.

    Args:
        encoder: a module with ``encode(images, feature)``; moved to the device.
        feature: ``backbone`` or ``embedding``.
        normalized: the normalisation of such images.
        device: where to compute.
    """
    scale, shift = normalized.scale.to(device), normalized.shift.to(device)
    encoder.to(device)

    @torch.no_grad()
    def encode(images: Tensor) -> np.ndarray:
        return encoder.encode(images.to(device) * scale - shift, feature).cpu().numpy()

    return encode


def add_features(
    encode: Callable[[Tensor], np.ndarray],
    loader: Iterable[ImageBatch],
    parts: FeatureParts,
    num_images: int,
    max_bad_fraction: float,
    show_progress: Callable[[int], None],
) -> None:
    """Add the features of all batches to the parts, inside the parts' ``with`` block.

    Args:
        encode: see `build_encode`.
        loader: yields the batches.
        parts: the features so far.
        num_images: of the whole dataset.
        max_bad_fraction: the share of unreadable images that is accepted.
        show_progress: called with the number of images that are done.

    Raises:
        InputError: more images than `max_bad_fraction` are unreadable.
        RunError: a feature is not finite.
    """
    unreadable = parts.unreadable()
    check_bad_fraction(unreadable, num_images, max_bad_fraction)
    # A loader that is interrupted while it starts complains about itself when it is destroyed.
    with held_back(ENDING):
        batches = iter(loader)
    for batch in batches:
        features = np.empty((0, 0), np.float32)
        if batch.names:
            features = encode(batch.images)
        bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if len(bad):
            first = ", ".join(printable(batch.names[row]) for row in bad[:MOST_NAMED])
            raise RunError(
                f"the features of {len(bad)} images are not finite: {first}; "
                "the checkpoint's weights are damaged, or too large for these images"
            )
        newly_unreadable = []
        for problem in batch.problems:
            if problem.is_shard:
                log.warning("damaged: %s", problem.reason)
            else:
                log.warning("skipped: %s", problem.reason)
                newly_unreadable.append(problem.name)
        parts.add(features, batch.names, batch.labels.numpy(), newly_unreadable, batch.end)
        if newly_unreadable:
            # Checked at once: a long pass should not end with this error.
            unreadable += newly_unreadable
            check_bad_fraction(unreadable, num_images, max_bad_fraction)
        show_progress(parts.state.num_rows + len(unreadable))


def write_files(output: Path, parts: FeatureParts, index: str, images: ImageSet) -> str:
    """Write the index and the .npz file, each completely or not at all.

    Args:
        output: the .npz file.
        parts: the features.
        index: see `write_index`.
        images: they say whether there are labels, and the names of the classes.

    Returns:
        A description of the index.

    Raises:
        InputError: faiss cannot build such an index.
    """
    description = NO_INDEX
    path = output.with_suffix(".faiss")
    if index != NO_INDEX:
        log.info("writing %s", path)
        description = write_index(path, parts, index)
    elif path.exists():
        log.warning("%s is of an earlier run and does not go with the new file", path)
    log.info("writing %s", output)
    write = partial(
        write_npz,
        parts=parts,
        has_labels=images.has_labels,
        class_names=images.class_names,
        label_sets=images.label_sets,
    )
    with phase("writing the features", unit=""):
        write_atomically(output, write)
    return description


def write_npz(
    file: BinaryIO,
    parts: FeatureParts,
    has_labels: bool,
    class_names: Sequence[str] | None = None,
    label_sets: np.ndarray | None = None,
) -> None:
    """Write ``features`` (images, width), ``names`` (images,) and, if there are any, ``labels``.

    ``class_names`` (classes,) has the name of each class by its number, if they are known. For
    images with several classes each, ``label_sets`` (label numbers, classes) has the classes that a
    label stands for.

    All arrays are mapped from files, so NumPy reads and writes them a block at a time.
    """
    name_type = f"<U{max(len(name) for name in parts.names())}"
    # The suffix marks a file that an interrupted run may leave behind.
    path = parts.folder / "names.tmp"
    with path.open("wb") as target:
        for name in parts.names():
            target.write(np.array(name, name_type).tobytes())
    names = np.memmap(path, name_type, "r")
    arrays: dict[str, Any] = {"features": parts.features(), "names": names}
    if has_labels:
        arrays["labels"] = parts.labels()
        if class_names is not None:
            arrays["class_names"] = np.array(class_names)
        if label_sets is not None:
            arrays["label_sets"] = label_sets
    np.savez(file, **arrays)
    path.unlink()


def write_index(path: Path, parts: FeatureParts, name: str) -> str:
    """Write a faiss index of the L2-normalised features; row i is image i.

    It compares by inner product, which is then the cosine. faiss builds it in memory.

    Args:
        path: the file.
        parts: the features.
        name: ``flat``, which is exact, or a string of ``faiss.index_factory``.

    Returns:
        A description for the closing table.

    Raises:
        InputError: faiss cannot build such an index.
    """
    import faiss

    features = parts.features()
    index = build_index(features, name, "index")
    swig: Any = faiss  # faiss's type stubs lack the writer
    write_atomically(
        path, lambda file: faiss.write_index(index, swig.PyCallbackIOWriter(file.write))
    )
    if name == EXACT:
        return f"{name}: exact"
    num_neighbors = min(NUM_NEIGHBORS, len(features))
    share = recall(index, features, features, num_neighbors)
    return f"{name}: finds {share:.1%} of the {num_neighbors} nearest"


def near_duplicates(parts: FeatureParts, output: Path) -> str:
    """List the near-duplicates in a table beside the features, and say how many there are.

    Args:
        parts: the features, of at least one image.
        output: the file of the features.

    Returns:
        A text for the closing table.
    """
    features = parts.features()
    if len(features) < LEAST_IMAGES:
        return f"not looked for among fewer than {LEAST_IMAGES} images"
    cosines = nearest_cosines(features)
    threshold = near_duplicate_cosine(cosines)
    meaning = (
        f"a cosine above {threshold:.5f}, where the nearest image usually has "
        f"{np.median(cosines):.5f}"
    )
    with phase("near-duplicates", unit=""):
        pairs = pairs_above(features, threshold)
    if pairs is None:
        number = int((cosines > threshold).sum())
        return f"{number:,} of {len(cosines):,} images have one: {meaning}"
    table = output.with_suffix(DUPLICATES)
    if pairs or table.exists():
        write_atomically(table, lambda file: file.write(table_of_pairs(pairs, parts)))
    if not pairs:
        return f"none: no pair has {meaning}"
    what = "1 pair" if len(pairs) == 1 else f"{len(pairs):,} pairs"
    return f"{what} in {table.name}: {meaning}"


def table_of_pairs(pairs: Sequence[tuple[int, int, float]], parts: FeatureParts) -> bytes:
    """Return pairs of images as CSV: both names and the cosine."""
    names = list(parts.names())
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("name", "near_duplicate", "cosine"))
    for row, other, cosine in pairs:
        writer.writerow((names[row], names[other], f"{cosine:.6f}"))
    # File names can hold bytes that are not UTF-8.
    return text.getvalue().encode("utf-8", "surrogateescape")


def summary(
    settings: dict[str, Any], parts: FeatureParts, has_labels: bool, index: str
) -> list[tuple[str, str]]:
    """Return the rows of the closing table.

    Args:
        settings: see `open_parts`.
        parts: the features.
        has_labels: whether labels were written.
        index: a description of the index.
    """
    data = settings["data"]
    num_images, width = parts.shape
    images = f"{num_images:,} of data={data['name']} (split={settings['split']})"
    images += f", {data['image_size']} px"
    arrays = f"features {parts.shape}, names {(num_images,)}"
    if has_labels:
        arrays += f", labels {(num_images,)}"
    return [
        ("images", images),
        ("features", f"{settings['feature']} of the {settings['encoder']} encoder, {width} wide"),
        ("arrays", arrays),
        ("index", index),
    ]
