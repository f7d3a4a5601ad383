"""Datasets with masks: a folder of images and masks, and Pascal VOC 2012.

An image and its mask are paired by their paths. All pairs are checked before training begins, so
that a mistake is found at once.
"""

import glob
import logging
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moco.data.files.images import (
    MAX_IMAGE_PIXELS,
    UnreadableImage,
    decoded_mask,
    image_size,
    pillow_warnings_ignored,
)
from moco.data.files.listing import list_images
from moco.data.files.text_files import read_text
from moco.data.sources.arrays import torchvision_dataset
from moco.data.sources.folders import is_held_out
from moco.data.sources.pixel_values import PixelValues
from moco.data.sources.registry import MASKED
from moco.data.sources.sample import prepare_source
from moco.data.sources.source import DataSource
from moco.data.sources.split_folders import (
    TRAINING_FOLDERS,
    VALIDATION_FOLDERS,
    find_split,
    first_of,
    folders_in,
)
from moco.errors import InputError, printable, unknown_name
from moco.phases import counted
from moco.segmentation.label_draw import LabelDraw
from moco.segmentation.mask_layout import check_layout
from moco.segmentation.masked_images import MaskedImages, Pair

log = logging.getLogger(__name__)

# Pascal VOC 2012: the background and 20 classes, in the order of their numbers.
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip

MAX_THREADS = 32
MAX_NAMED_CLASSES = 10  # in one warning
VALIDATION_SHARE = 0.1  # where the dataset has no folder for validation


@dataclass(frozen=True)
class SegmentationSource:
    """What a segmentation run trains on, and what it is measured on."""

    train: MaskedImages
    validation: MaskedImages
    class_names: tuple[str, ...]
    """The name of each class; the class number is the position."""
    ignore_index: int
    """The number of pixels that have no class."""
    class_pixels: tuple[int, ...]
    """How many pixels of each class the masks to train on hold."""
    draw: LabelDraw | None = None
    """How the images to train on were drawn; None: they are all that there are."""
    num_undrawn: int = 0
    """How many training images the draw leaves out."""

    def prepare(
        self, data: Mapping[str, Any], mean: Sequence[float], display: Any = None
    ) -> PixelValues:
        """Let the images give the pixels that the model gets, and return how they are made.

        Args:
            data: the settings of the data as plain data.
            mean, display: see `moco.data.sources.pixel_values.settle_values`.

        Raises:
            InputError: the settings fit no image, or the value range is missing.
        """
        source = DataSource(self.train.images, None, None, image_size=0)
        values = prepare_source(source, {"pages": "first", **data}, mean, display)
        self.validation.images.reading = self.train.images.reading
        self.validation.images.values = values
        return values


class Listing(NamedTuple):
    """The files of a dataset, before any of them is opened."""

    train: list[Pair]
    validation: list[Pair]
    class_names: Sequence[str]
    """Empty if the dataset does not name its classes."""
    names_origin: str
    """Where the names come from, for messages."""


def build_segmentation_source(
    name: str | None,
    root: Any,
    *,
    download: bool = False,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    ignore_index: int = 255,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    is_trained_on: bool = True,
    part: str | None = None,
    draw: LabelDraw | None = None,
) -> SegmentationSource:
    """Return the dataset `name`, with every pair of files checked.

    Args:
        name: ``segmentation_folder`` or ``voc2012``.
        root: the dataset's folder.
        download: let torchvision download VOC if it is not there.
        num_classes: None: the number of class names, or else the largest number in any mask
            plus one.
        class_names: None: the dataset's own, or the numbers.
        ignore_index: the number of pixels that have no class.
        max_image_pixels: an image or mask with more pixels is refused.
        is_trained_on: False: the dataset is only measured. A folder without a part for training
            is then held out as a whole.
        part: the folder below ``images`` that is held out, such as ``test``; None: see
            `list_segmentation_folder`.
        draw: which of the training images are used; None: all. It does not change the number of
            classes.

    Raises:
        InputError: the dataset cannot be used. The message names the file or the key.
    """
    listing = list_files(name, root, download, is_trained_on=is_trained_on, part=part)
    # Names decide the number of classes. Without names the masks do, further below.
    names, names_origin = listing.class_names, listing.names_origin
    if class_names:
        names, names_origin = class_names, "data.class_names"
    check_class_names(names, names_origin, num_classes)

    chosen = list(range(len(listing.train)))
    if draw is not None:
        chosen = draw.chosen([pair.name for pair in listing.train])
    started = time.monotonic()
    pairs = listing.train + listing.validation
    sizes, numbers = inspect_pairs(pairs, ignore_index, max_image_pixels)
    num_train = len(listing.train)
    seconds = time.monotonic() - started
    if is_trained_on:
        log.info(
            "%d training images and %d held-out images, all checked in %.1f s",
            num_train,
            len(listing.validation),
            seconds,
        )
    else:
        log.info("%d images, all checked in %.1f s", len(listing.validation), seconds)
    pixels_of_numbers = Counter[int]()  # in the masks to train on
    for place in chosen:
        pixels_of_numbers.update(numbers[place])
    train_numbers = sorted(pixels_of_numbers)
    if is_trained_on:
        check_two_classes(root, train_numbers, ignore_index)
    if not any(numbers[num_train:]):
        log.warning(
            "data.root=%s: no pixel of the held-out masks has a class, all are "
            "data.ignore_index=%d; the figures of this dataset are null",
            root,
            ignore_index,
        )
    largest = [max(of_mask, default=0) for of_mask in numbers]
    if not names:
        if num_classes is None:
            num_classes = max(largest) + 1
            log.info("%d classes: the largest number in the masks plus one", num_classes)
        names = list(map(str, range(num_classes)))
        names_origin = "data.num_classes"
    check_classes(pairs, largest, len(names), names_origin)
    if is_trained_on:
        warn_of_unseen_classes(names, train_numbers, ignore_index)
    if ignore_index < len(names):
        log.warning(
            "the class %s is left out, because its number is data.ignore_index=%d",
            names[ignore_index],
            ignore_index,
        )
    return SegmentationSource(
        MaskedImages([pairs[place] for place in chosen], sizes[chosen], max_image_pixels),
        MaskedImages(listing.validation, sizes[num_train:], max_image_pixels),
        tuple(names),
        ignore_index,
        tuple(pixels_of_numbers[number] for number in range(len(names))),
        draw,
        num_train - len(chosen),
    )


def list_files(
    name: str | None,
    root: Any,
    download: bool,
    *,
    is_trained_on: bool = True,
    part: str | None = None,
) -> Listing:
    """List the files of the dataset `name`; see `build_segmentation_source`.

    Raises:
        InputError: there is no such dataset with masks, or its folder is not given or is wrong.
    """
    if name not in MASKED:
        raise InputError(f"data.name: {unknown_name('dataset with masks', str(name), MASKED)}")
    if not isinstance(root, str):
        raise InputError(f"data.root={root}: expected the dataset's folder; give data.root=PATH")
    if name == "voc2012":
        if part is not None:
            raise InputError(f"evaluation.part={part}: voc2012 has one held-out part")
        return list_voc2012(root, download)
    return list_segmentation_folder(root, is_trained_on=is_trained_on, part=part)


def check_class_names(names: Sequence[str], origin: str, num_classes: int | None) -> None:
    """Raise InputError if a class name occurs twice, or the names are not `num_classes`."""
    for number, name in enumerate(names):
        if name in names[:number]:
            raise InputError(f"{origin}: the class name {name} occurs twice")
    if num_classes and names and num_classes != len(names):
        raise InputError(f"data.num_classes={num_classes}: {origin} has {len(names)} names")


def list_segmentation_folder(
    root: str, *, is_trained_on: bool = True, part: str | None = None
) -> Listing:
    """List images below root/images and their masks below root/masks.

    A mask has the path of its image, with the ending .png. Images below images/train are for
    training; images below images/val are held out. `find_split` says what these folders may be
    called; those of the masks may have another of these names. Without images/val a tenth of the
    images is held out; if nobody trains on the dataset, all are. `part` names another folder that
    is held out. Class names stand in root/classes.txt, one a line.

    Raises:
        InputError: a folder is missing, an image has no mask, or a mask has no image.
    """
    images = Path(root, "images")
    masks = Path(root, "masks")
    check_layout(root, is_trained_on=is_trained_on, part=part)
    # Only the folders below images decide.
    split = find_split(images, has_classes=False)
    if part is not None:
        if part not in folders_in(images):
            problem = unknown_name("folder below images", part, folders_in(images))
            raise InputError(f"evaluation.part: {problem}")
        split = split._replace(validation=part)
    names_file = Path(root, "classes.txt")
    names = read_class_names(names_file)
    if not is_trained_on:
        places = parts_of(split.validation, images, masks, VALIDATION_FOLDERS)
        measured = list(pair_files(*places).values())
        # The pixels of one image decide how all are read.
        return Listing(measured[:1], measured, names, str(names_file))
    pairs = pair_files(*parts_of(split.train, images, masks, TRAINING_FOLDERS))
    if not split.validation:
        return Listing(*hold_out_a_tenth(pairs), names, str(names_file))
    held_out = pair_files(*parts_of(split.validation, images, masks, VALIDATION_FOLDERS))
    return Listing(list(pairs.values()), list(held_out.values()), names, str(names_file))


def parts_of(
    name: str | None, images: Path, masks: Path, names: Sequence[str]
) -> tuple[Path, Path]:
    """Return the folders of images and masks of a part of the dataset.

    Args:
        name: of the part's folder below `images`; None: the dataset is not divided.
        images, masks: the folders of all images and all masks.
        names: what the part may be called. The folder of the masks has the same name or, if there
            is none, the first of these.
    """
    if name is None:
        return images, masks
    name_of_masks = name
    if not (masks / name).is_dir():
        name_of_masks = first_of(folders_in(masks), names) or name
    return images / name, masks / name_of_masks


def read_class_names(path: Path) -> list[str]:
    """Read class names from a file, one a line. Return no name if there is no such file.

    Raises:
        InputError: the file is no text, or a line between two names is empty.
    """
    if not path.is_file():
        return []
    # Empty lines at the end are no names. An empty line before a name would shift the numbers.
    names = list(map(str.strip, read_text(path).rstrip().splitlines()))
    if "" in names:
        number = names.index("") + 1
        raise InputError(f"{path}: line {number} is empty; expected a class name in every line")
    return names


def list_voc2012(root: str, download: bool) -> Listing:
    """List Pascal VOC 2012 as torchvision unpacks it: 1,464 training images, 1,449 held out."""
    parts = []
    for image_set in ("train", "val"):
        part = torchvision_dataset(
            "VOCSegmentation", root, year="2012", image_set=image_set, download=download
        )
        names = [Path(path).stem for path in part.images]
        parts.append(list(map(Pair, part.images, part.masks, names)))
        download = False  # one archive holds both parts
    train, validation = parts
    return Listing(train, validation, VOC_CLASSES, "voc2012")


def pair_files(images: Path, masks: Path) -> dict[str, Pair]:
    """Pair the images below one folder with the masks below another.

    Returns:
        The pairs, sorted by their key: the path below the folder, without the ending.

    Raises:
        InputError: an image has no mask, a mask has no image, or two images have the same mask.
    """
    image_paths: dict[str, str] = {}
    for path in list_images(images):
        key = path_without_ending(images, path)
        if key in image_paths:
            raise InputError(
                printable(f"{path}: {image_paths[key]} has the same mask, {masks / key}.png")
            )
        image_paths[key] = path
    mask_paths: dict[str, str] = {}
    for path in list_images(masks):
        if path.lower().endswith(".png"):
            mask_paths[path_without_ending(masks, path)] = path

    # The first in alphabetical order is named, so that the message is the same on every machine.
    without_mask = sorted(image_paths.keys() - mask_paths.keys())
    without_image = sorted(mask_paths.keys() - image_paths.keys())
    rest = and_more(len(without_mask) + len(without_image))
    for key in without_mask:
        hint = similar_mask(masks, key)
        problem = f"{image_paths[key]}: there is no mask {masks / key}.png{hint}{rest}"
        raise InputError(printable(problem))
    for key in without_image:
        problem = f"{mask_paths[key]}: there is no image of that name in {images}{rest}"
        raise InputError(printable(problem))
    pairs = {}
    for key in sorted(image_paths):
        pairs[key] = Pair(image_paths[key], mask_paths[key], key)
    return pairs


def similar_mask(masks: Path, key: str) -> str:
    """Return the end of a message that names a file which may be the missing mask, or nothing.

    Args:
        masks: the folder of the masks.
        key: see `pair_files`.
    """
    expected = masks / key
    for path in sorted(expected.parent.glob(f"{glob.escape(expected.name)}[!0-9]*")):
        return f"; {path.name} is there: expected the name of the image and the ending .png"
    return ""


def path_without_ending(folder: Path, path: str) -> str:
    """Return the part of a path below `folder`, without its ending."""
    return os.path.splitext(os.path.relpath(path, folder))[0]


def hold_out_a_tenth(pairs: dict[str, Pair]) -> tuple[list[Pair], list[Pair]]:
    """Split pairs by a hash of their keys: at least one is held out, and at least one is not.

    Returns:
        The pairs to train on, and those that are held out.

    Raises:
        InputError: there is only one pair.
    """
    if len(pairs) < 2:
        only = next(iter(pairs.values()))
        raise InputError(
            f"{printable(only.image)}: this is the only image; at least one more is needed, "
            "because one is held out"
        )
    held_out = is_held_out(map(os.fsencode, pairs), VALIDATION_SHARE)
    # With few images the hash may choose none of them, or all.
    if not held_out.any() or held_out.all():
        held_out = np.arange(len(pairs)) == 0
    train = list(compress(pairs.values(), ~held_out))
    validation = list(compress(pairs.values(), held_out))
    log.info(
        "%d of %d images are held out, chosen by a hash of their names", len(validation), len(pairs)
    )
    return train, validation


def inspect_pairs(
    pairs: Sequence[Pair], ignore_index: int, max_image_pixels: int
) -> tuple[np.ndarray, list[dict[int, int]]]:
    """Open all M pairs of files, in parallel threads.

    Only the header of an image is read. A mask is decoded, because its numbers are needed. Pillow
    decodes without holding Python's lock, so threads are enough. A mask of one megapixel takes
    about 10 ms of one core.

    Returns:
        (M, 2) height and width in px, and the numbers in each mask except `ignore_index`, with how
        many pixels have them.

    Raises:
        InputError: a pair cannot be used. The message names the file of the first such pair.
    """
    inspect = partial(inspect_pair, ignore_index=ignore_index, max_image_pixels=max_image_pixels)
    num_threads = min(MAX_THREADS, os.cpu_count() or 1)
    with pillow_warnings_ignored(), ThreadPoolExecutor(num_threads) as pool:
        # The results come in the order of the pairs, so the first wrong pair is named.
        found = counted(pool.map(inspect, pairs), "checking images and masks", len(pairs), "pairs")
        sizes, numbers = zip(*found, strict=True)
    return np.array(sizes), list(numbers)


def inspect_pair(
    pair: Pair, ignore_index: int, max_image_pixels: int
) -> tuple[tuple[int, int], dict[int, int]]:
    """Read the size of an image and the numbers in its mask.

    This runs in threads. The caller ignores Pillow's warnings around all of them.

    Returns:
        Height and width in px, and the numbers except `ignore_index`, with their pixels.

    Raises:
        InputError: a file cannot be read, or the two files have different sizes.
    """
    try:
        height, width = image_size(pair.image, max_image_pixels)
        mask = decoded_mask(pair.mask, max_image_pixels)
    except UnreadableImage as error:
        raise InputError(str(error)) from error
    if mask.shape != (height, width):
        raise InputError(
            f"{printable(pair.mask)}: the mask has {mask.shape[1]} x {mask.shape[0]} px, "
            f"but its image {printable(pair.image)} has {width} x {height} px"
        )
    if mask.dtype == np.uint8:
        # Several times as fast as sorting.
        counts = np.bincount(mask.ravel())
        numbers = np.flatnonzero(counts)
        num_pixels = counts[numbers]
    else:
        numbers, num_pixels = np.unique(mask, return_counts=True)
    pixels_of_numbers = dict(zip(numbers.tolist(), num_pixels.tolist(), strict=True))
    pixels_of_numbers.pop(ignore_index, None)
    return (height, width), pixels_of_numbers


def check_two_classes(root: str, numbers: Sequence[int], ignore_index: int) -> None:
    """Check that the training masks hold at least two classes.

    With one class the loss is 0 from the start, and every prediction is correct.

    Args:
        root: the dataset's folder, for the message.
        numbers: the numbers in the training masks except `ignore_index`.

    Raises:
        InputError: there are fewer than two.
    """
    if len(numbers) < 2:
        raise InputError(
            f"data.root={root}: the training masks hold the numbers {numbers} besides "
            f"data.ignore_index={ignore_index}; at least two classes are needed "
            "(masks of 0 and 255 have to be stored as 0 and 1)"
        )


def check_classes(
    pairs: Sequence[Pair], largest: Sequence[int], num_classes: int, origin: str
) -> None:
    """Check that no mask holds a number beyond the last class.

    Args:
        pairs: the files, M pairs.
        largest: the largest number in each of the M masks.
        origin: what decided the number of classes, for the message.

    Raises:
        InputError: a mask does. The message names the first one.
    """
    wrong = np.flatnonzero(np.array(largest) >= num_classes)
    if len(wrong):
        first = wrong[0]
        raise InputError(
            f"{printable(pairs[first].mask)}: the mask holds the number {largest[first]}, but "
            f"{origin} says {num_classes} classes, 0 to {num_classes - 1}{and_more(len(wrong))}"
        )


def warn_of_unseen_classes(
    class_names: Sequence[str], numbers: Sequence[int], ignore_index: int
) -> None:
    """Log a warning that names the classes which no training mask contains.

    Args:
        class_names: the names of all classes; the class number is the position.
        numbers: the numbers in the training masks.
    """
    unseen = []
    for number, name in enumerate(class_names):
        if number not in numbers and number != ignore_index:
            unseen.append(name)
    if unseen:
        named = ", ".join(unseen[:MAX_NAMED_CLASSES])
        rest = and_more(len(unseen), MAX_NAMED_CLASSES)
        log.warning("no training mask contains the classes %s%s", named, rest)


def and_more(count: int, num_named: int = 1) -> str:
    """Return the end of a message that has named some of `count` similar things."""
    if count <= num_named:
        return ""
    return f" (and {count - num_named} more like it)"
