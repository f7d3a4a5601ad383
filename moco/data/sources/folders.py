"""Images in folders: any folder tree without labels, or sub-folders that are the classes."""

import itertools
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moco.data.files.listing import Listing, listed
from moco.data.sources.band_files import band_file_images
from moco.data.sources.source import DataSource, FileImages, Images, Labelled
from moco.data.sources.tiles import tile_images
from moco.errors import InputError, printable

VALIDATION_FOLDERS = ("val", "validation", "test")  # the first one that exists is taken
IMAGE_SIZE = 224  # px
NUM_HASHES = 2**32  # values of zlib.crc32


def folder_source(
    root: Any,
    max_image_pixels: int,
    pages: str,
    listing: Path | None,
    band_files: str | None = None,
    bands: Any = None,
    tile: int | None = None,
) -> DataSource:
    """Return every image below a folder or several folders, without labels.

    Args:
        band_files, bands: see `moco.data.sources.band_files.band_file_images`.
        tile: see `moco.data.sources.tiles.tile_images`.

    Raises:
        InputError: a folder is missing or holds no images, or one folder contains another.
    """
    roots = list_of_paths(root)
    if roots is None:
        raise InputError(f"data.root={root}: expected a folder or a list of folders")
    check_no_overlap(roots)
    files = listed(roots, pages, listing)
    images: Images
    if band_files is not None:
        images = band_file_images(files, roots, band_files, bands, max_image_pixels)
    elif tile is not None:
        images = tile_images(files.paths, tile, max_image_pixels)
    else:
        images = FileImages(files.paths, max_image_pixels, files.num_pages)
    return DataSource(images, None, None, IMAGE_SIZE)


def list_of_paths(root: Any) -> list[str] | None:
    """Return one or several paths as a list, or None if `root` is something else."""
    roots = root if isinstance(root, list) else [root]
    if not roots or not all(isinstance(path, str) for path in roots):
        return None
    return roots


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


def class_folder_source(
    root: str,
    max_image_pixels: int,
    held_out: float,
    pages: str,
    listing: Path | None,
    band_files: str | None = None,
    bands: Any = None,
) -> DataSource:
    """Return root/train/CLASS/... with root/val/CLASS/..., or root/CLASS/... alone.

    The validation folder may also be called ``validation`` or ``test``; without one there are no
    queries. Of root/CLASS/... alone, `is_held_out` takes queries out of the bank by the files'
    paths below root. Training uses all images.

    Args:
        band_files, bands: see `moco.data.sources.band_files.band_file_images`.

    Raises:
        InputError: a folder is missing or holds no images in class folders, or a validation class
            is not a training class.
    """

    def labelled(files: Listing, labels: np.ndarray) -> Labelled:
        if joined is not None:
            return Labelled(joined.of_names(files.paths), labels)
        images = FileImages(files.paths, max_image_pixels, files.num_pages)
        return Labelled(images, np.repeat(labels, files.num_pages))

    root = str(Path(root))
    folders = [root]
    has_training_folder = os.path.isdir(os.path.join(root, "train"))
    if has_training_folder:
        folders = training_and_validation_folders(root)
    all_files = listed(folders, pages, listing)
    joined = None
    if band_files is not None:
        joined = band_file_images(all_files, folders, band_files, bands, max_image_pixels)
        # The names of the images stand for their files.
        names = joined.names()
        all_files = replace(all_files, paths=names, num_pages=np.ones(len(names), np.int64))
    files, classes = files_in_class_folders(all_files, folders[0])
    number_of_class = {name: number for number, name in enumerate(sorted(set(classes)))}
    labels = np.array([number_of_class[name] for name in classes])
    train = labelled(files, labels)
    # Classes have the numbers of the training images, whatever the validation folder holds.
    if len(folders) == 2:
        query_files, query_classes = files_in_class_folders(all_files, folders[1])
        unknown = sorted(set(query_classes) - set(classes))
        if unknown:
            named = f"classes that the training images do not have: {', '.join(unknown)}"
            raise InputError(f"data.root={folders[1]}: {printable(named)}")
        query_labels = np.array([number_of_class[name] for name in query_classes])
        queries = labelled(query_files, query_labels)
        return DataSource(train.images, train, queries, IMAGE_SIZE)
    is_query = is_held_out(files.paths.below(root), held_out)
    # A monitor needs images on both sides.
    if has_training_folder or is_query.all() or not is_query.any():
        return DataSource(train.images, train, None, IMAGE_SIZE)
    bank = labelled(files.where(~is_query), labels[~is_query])
    queries = labelled(files.where(is_query), labels[is_query])
    return DataSource(train.images, bank, queries, IMAGE_SIZE)


def training_and_validation_folders(root: str) -> list[str]:
    """Return root/train and, if there is one, the validation folder beside it."""
    paths = [os.path.join(root, name) for name in VALIDATION_FOLDERS]
    # The first validation folder that exists, if there is one.
    return [os.path.join(root, "train"), *filter(os.path.isdir, paths)][:2]


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
