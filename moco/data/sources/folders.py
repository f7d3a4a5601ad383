"""Images in folders: any folder tree, sub-folders that are the classes, or a file of classes."""

import itertools
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moco.data.files.listing import Listing, listed
from moco.data.sources.band_files import band_file_images, roots_and_names
from moco.data.sources.label_files import Labels, first_few, natural_order, read_labels
from moco.data.sources.source import (
    DataSource,
    FileImages,
    Images,
    Labelled,
    warn_of_missing_classes,
)
from moco.data.sources.split_folders import find_split, folders_in
from moco.data.sources.tiles import tile_images
from moco.errors import InputError, printable

log = logging.getLogger(__name__)

NUM_NAMED_CLASSES = 10  # in one line of the log
IMAGE_SIZE = 224  # px
NUM_HASHES = 2**32  # values of zlib.crc32


ImagesOf = Callable[[Listing], Images]
"""Makes the images of listed files."""


def folder_source(
    root: Any,
    max_image_pixels: int,
    held_out: float,
    pages: str,
    listing: Path | None,
    labels: str | None,
    band_files: str | None = None,
    bands: Any = None,
    tile: int | None = None,
) -> DataSource:
    """Return every image below a folder or several folders.

    Without `labels` it has no bank and no queries. With them, `is_held_out` divides the images that
    have a class into both.

    Args:
        band_files, bands, tile: see `files_as_images`.

    Raises:
        InputError: a folder is missing or holds no images, one folder contains another, or the
            file of labels does not fit.
    """
    roots = list_of_paths(root)
    if roots is None:
        raise InputError(f"data.root={root}: expected a folder or a list of folders")
    check_no_overlap(roots)
    warn_of_masks(roots)
    listed_files = listed(roots, pages, listing)
    files, images_of = files_as_images(
        listed_files, roots, max_image_pixels, band_files, bands, tile
    )
    images = images_of(files)
    log_start(roots, f"{len(images):,} images", listed_files)
    if labels is None:
        return DataSource(images, None, None, IMAGE_SIZE)
    names = names_below(files, roots)
    side = Side(files, read_labels(labels, roots[0], names), images, images_of)
    return divided(side, names, held_out)


def files_as_images(
    files: Listing,
    roots: Sequence[str],
    max_image_pixels: int,
    band_files: str | None,
    bands: Any,
    tile: int | None,
) -> tuple[Listing, ImagesOf]:
    """Return the files with the number of images in each, and what makes images of them.

    If bands are in files of their own, the names of the joined images stand for their files.

    Args:
        files: all files below the roots.
        band_files, bands: see `moco.data.sources.band_files.band_file_images`.
        tile: see `moco.data.sources.tiles.tile_images`.
    """
    if tile is not None:
        tiled = tile_images(files.paths, tile, max_image_pixels)
        of_tiles = replace(files, num_pages=tiled.num_tiles())
        return of_tiles, lambda chosen: tiled.of_files(chosen.paths)
    if band_files is None:
        return files, partial(file_images, max_image_pixels)
    joined = band_file_images(files, roots, band_files, bands, max_image_pixels)
    names = joined.names()
    of_names = replace(files, paths=names, num_pages=np.ones(len(names), np.int64))
    return of_names, lambda chosen: joined.of_names(chosen.paths)


def file_images(max_image_pixels: int, files: Listing) -> FileImages:
    """Return the images in files."""
    return FileImages(files.paths, max_image_pixels, files.num_pages)


def list_of_paths(root: Any) -> list[str] | None:
    """Return one or several paths as a list, or None if `root` is something else."""
    roots = [root]
    if isinstance(root, list):
        roots = root
    for path in roots:
        if not isinstance(path, str):
            return None
    return roots or None


def check_no_overlap(roots: Sequence[str]) -> None:
    """Raise InputError if one folder contains another, whose images would be listed twice."""
    for inner, outer in itertools.permutations(roots, 2):
        real_inner = os.path.realpath(inner)
        real_outer = os.path.realpath(outer)
        if os.path.commonpath([real_outer, real_inner]) == real_outer:
            raise InputError(
                f"data.root: {printable(inner)} is {printable(outer)} or lies below it, "
                "and its images would be listed twice; leave one of them out"
            )


class Side(NamedTuple):
    """Image files of one side of a dataset, with their classes."""

    files: Listing
    labels: Labels
    """Those of the files."""
    images: Images
    """Those of all files."""
    images_of: ImagesOf

    @property
    def has_labels(self) -> bool:
        """Return whether a file has a class."""
        return bool((self.labels.numbers >= 0).any())

    def labelled(self, is_chosen: np.ndarray | None = None) -> Labelled:
        """Return the images that have a class, of the files where `is_chosen`, (files,) bool."""
        wanted = self.labels.numbers >= 0
        if is_chosen is not None:
            wanted &= is_chosen
        files, images = self.files, self.images
        if not wanted.all():
            files = files.where(wanted)
            images = self.images_of(files)
        labels = np.repeat(self.labels.numbers[wanted], files.num_pages)
        return Labelled(images, labels, self.labels.class_names, self.labels.label_sets)


def class_folder_source(
    root: str,
    max_image_pixels: int,
    held_out: float,
    pages: str,
    listing: Path | None,
    labels: str | None,
    band_files: str | None = None,
    bands: Any = None,
    tile: int | None = None,
) -> DataSource:
    """Return root/train/CLASS/... with root/val/CLASS/..., or root/CLASS/... alone.

    `find_split` says what the folders for training and validation may be called; without one for
    validation there are no queries. Of root/CLASS/... alone, `is_held_out` takes queries out of the
    bank by the files' paths below root. Training uses all images. Classes are numbered in the
    natural order of their names. With `labels` the folders' names are no classes.

    Args:
        band_files, bands, tile: see `files_as_images`.

    Raises:
        InputError: a folder is missing or holds no images in class folders, a validation class is
            not a training class, or the file of labels does not fit.
    """
    root = str(Path(root))
    split = find_split(root, has_classes=labels is None)
    folders = [root]
    if split.train is not None:
        folders = [os.path.join(root, split.train)]
        if split.validation is not None:
            folders.append(os.path.join(root, split.validation))
    listed_files = listed(folders, pages, listing)
    all_files, images_of = files_as_images(
        listed_files, folders, max_image_pixels, band_files, bands, tile
    )
    if labels is None:
        sides = class_sides(all_files, folders)
    else:
        sides = table_sides(all_files, folders, root, labels)

    made = []
    for files, of_files in sides:
        made.append(Side(files, of_files, images_of(files), images_of))
    train = made[0]
    kind = "training images" if len(made) > 1 else "images"
    log_start([root], f"{len(train.images):,} {kind}", listed_files)
    log_classes(train.labels.class_names)
    if split.train is None:
        return divided(train, names_below(train.files, [root]), held_out)
    bank = queries = None
    # A file of labels may have none for one side.
    if train.has_labels:
        bank = train.labelled()
    if len(made) > 1 and made[1].has_labels:
        queries = made[1].labelled()
    if bank is not None and queries is not None:
        warn_of_missing_classes(bank, queries)
    return DataSource(train.images, bank, queries, IMAGE_SIZE)


def class_sides(files: Listing, folders: Sequence[str]) -> list[tuple[Listing, Labels]]:
    """Return the files in the class folders of each folder, and their classes.

    Classes have the numbers of the first folder, whatever the second one holds.

    Raises:
        InputError: a folder has no class folders, or the second one has other classes.
    """
    found = [files_in_class_folders(files, folder) for folder in folders]
    class_names = tuple(sorted(set(found[0][1]), key=natural_order))
    number_of_class = {name: number for number, name in enumerate(class_names)}
    sides = []
    for folder, (in_classes, classes) in zip(folders, found, strict=True):
        unknown = sorted(set(classes) - set(class_names), key=natural_order)
        if unknown:
            named = f"classes that the training images do not have: {', '.join(unknown)}"
            raise InputError(f"data.root={folder}: {printable(named)}")
        labels = np.array([number_of_class[name] for name in classes])
        sides.append((in_classes, Labels(labels, class_names)))
    return sides


def table_sides(
    files: Listing, folders: Sequence[str], root: str, path: str
) -> list[tuple[Listing, Labels]]:
    """Return the files of each folder, and their labels by a file of labels.

    Raises:
        InputError: the file of labels does not fit.
    """
    labels = read_labels(path, root, names_below(files, [root]))
    sides = []
    for folder in folders:
        prefix = os.fsencode(os.path.join(folder, ""))
        is_there = np.array([name.startswith(prefix) for name in files.paths.below("")])
        of_folder = labels._replace(numbers=labels.numbers[is_there])
        sides.append((files.where(is_there), of_folder))
    return sides


def names_below(files: Listing, roots: Sequence[str]) -> list[str]:
    """Return the paths of the files below that one of the folders which holds them."""
    if len(roots) == 1:  # in a fifth of the time
        start = len(os.path.join(roots[0], ""))
        return [path[start:] for path in files.paths]
    return [name for _, name in roots_and_names(files.paths, roots)]


def divided(side: Side, names: Sequence[str], held_out: float) -> DataSource:
    """Return a source with some of the labelled files as queries, the others as bank.

    Args:
        side: the files to train on.
        names: (files,) what `is_held_out` decides by.
        held_out: share of the queries.
    """
    is_query = is_held_out(map(os.fsencode, names), held_out)
    of_labelled = is_query[side.labels.numbers >= 0]
    # A monitor needs images on both sides.
    if of_labelled.all() or not of_labelled.any():
        return DataSource(side.images, side.labelled(), None, IMAGE_SIZE)
    bank, queries = side.labelled(~is_query), side.labelled(is_query)
    warn_of_missing_classes(bank, queries)
    return DataSource(side.images, bank, queries, IMAGE_SIZE)


def warn_of_masks(roots: Sequence[str]) -> None:
    """Warn that the masks of a dataset for segmentation are taken for images."""
    for root in roots:
        if {"images", "masks"} <= set(folders_in(root)):
            images = printable(os.path.join(root, "images"))
            log.warning(
                "%s has the folders images and masks, and the masks count as images here; "
                "data.root=%s leaves them out",
                printable(root),
                images,
            )


def log_start(roots: Sequence[str], images: str, files: Listing) -> None:
    """Log how many images there are, and what files.

    Programs that do not train list them, too.
    """
    where = printable(", ".join(roots))
    log.info("%s: %s; %s", where, images, files.describe())


def log_classes(class_names: Sequence[str] | None) -> None:
    """Log the names of the classes, or the first of them."""
    if class_names is not None:
        named = first_few(class_names, NUM_NAMED_CLASSES)
        log.info("%d classes: %s", len(class_names), named)


def files_in_class_folders(files: Listing, folder: str) -> tuple[Listing, list[str]]:
    """Return the files below folder/CLASS, and the class of each.

    Raises:
        InputError: there are no such files.
    """
    prefix = os.path.join(folder, "")
    classes = []
    is_in_class = np.zeros(len(files.paths), dtype=bool)
    for number, path in enumerate(files.paths):
        class_name, slash, _ = path.removeprefix(prefix).partition("/")
        if slash and path.startswith(prefix):
            is_in_class[number] = True
            classes.append(class_name)
    if not classes:
        raise InputError(
            f"data.root={folder}: no class sub-folders with images; "
            "data=images takes a plain folder tree"
        )
    return files.where(is_in_class), classes


def is_held_out(names: Iterable[bytes], share: float) -> np.ndarray:
    """Return which names are held out, (names,) bool: about `share` of them.

    The choice depends on a name's hash alone, so an image keeps its side when others are added.
    A larger share holds out every name that a smaller share does. The hash's last decimal digit
    counts most: a share of 0.1 holds out the names whose hash ends in 0.

    Args:
        share: fraction from 0 to 1.
    """
    # The digit is moved to the front of the number, and the share is a threshold.
    hashes_per_digit = NUM_HASHES // 10 + 1
    hashes = np.fromiter(map(zlib.crc32, names), dtype=np.int64)
    places = hashes % 10 * hashes_per_digit + hashes // 10
    return places < round(share * 10 * hashes_per_digit)
