"""Images with a class for every pixel, all of them checked before training begins.

A mask is a PNG file with one number per pixel: the class, or `ignore_index` where there is none. Images and masks are
paired by their paths.

Letters: M images, C classes, H W pixels.
"""

import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from moco.data.files.images import (
    MAX_IMAGE_PIXELS,
    UnreadableImage,
    decoded_mask,
    opened,
    pillow_warnings_ignored,
    read_mask,
)
from moco.data.files.listing import list_images
from moco.data.sources.class_folders import is_held_out
from moco.data.sources.registry import MASKED, SOURCES, FileImages, torchvision_dataset
from moco.errors import InputError, printable, unknown_name

log = logging.getLogger(__name__)

# The 20 classes of Pascal VOC 2012 in the order of its numbers, after the background.
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

# Folders below images and masks, the first that is there counts.
TRAINED_ON = ("train", "training")
HELD_OUT = ("val", "validation", "test")


class Pair(NamedTuple):
    """Where an image and its mask are."""

    image: str
    mask: str


class MaskedImages:
    """RGB images and their masks by index, decoded when asked for.

    Args:
        pairs: M files and their masks.
        sizes: height and width of each, (M, 2), px.
        max_image_pixels: an image or mask of more is unreadable.
    """

    def __init__(
        self, pairs: Sequence[Pair], sizes: np.ndarray, max_image_pixels: int = MAX_IMAGE_PIXELS
    ) -> None:
        self.images = FileImages([pair.image for pair in pairs], max_image_pixels)
        self.masks = FileImages([pair.mask for pair in pairs], max_image_pixels)
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """The image and its mask (H, W); raises `UnreadableImage` where a file is damaged."""
        return self.images[index], read_mask(self.masks.name(index), self.masks.max_image_pixels)


@dataclass(frozen=True)
class SegmentationSource:
    """What a segmentation run trains on, and what it is measured by."""

    train: MaskedImages
    validation: MaskedImages
    class_names: tuple[str, ...]
    """C names; class number i has the i-th."""
    ignore_index: int
    """The number of pixels without a class."""


def build_segmentation_source(
    name: str | None,
    root: Any,
    *,
    download: bool = False,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    ignore_index: int = 255,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
) -> SegmentationSource:
    """The data set `name`: ``segmentation_folder`` or ``voc2012``, every pair of files checked.

    Args:
        root: the folder.
        download: let torchvision fetch VOC if it is not there.
        num_classes: C; None: as many as there are names, or else the largest number in any mask and one.
        class_names: C names; None: the data set's own, or the numbers.
        ignore_index: the number of pixels without a class.
        max_image_pixels: an image or mask of more is refused.

    Raises:
        InputError: names the file or the key.
    """
    if name in SOURCES:
        raise InputError(f"data={name}: this set has no masks (choices: {', '.join(MASKED)})")
    if name not in MASKED:
        raise InputError(f"data.name: {unknown_name('data set', str(name), MASKED)}")
    if not isinstance(root, str):
        raise InputError(f"data.root={root}: expected the data set's folder; give data.root=PATH")
    splits, (names, origin) = (
        voc2012(root, download) if name == "voc2012" else segmentation_folder(root)
    )
    if class_names:
        names, origin = class_names, "data.class_names"
    if len(set(names)) < len(names):
        raise InputError(f"{origin}: the class {max(names, key=list(names).count)} is there twice")
    if num_classes and names and num_classes != len(names):
        raise InputError(f"data.num_classes={num_classes}: {origin} has {len(names)} names")
    started = time.monotonic()
    inspected = [inspect_all(pairs, ignore_index, max_image_pixels) for pairs in splits]
    num_train, num_held_out = map(len, splits)
    log.info(
        "%d images to train on, %d held out; all checked in %.1f s",
        num_train,
        num_held_out,
        time.monotonic() - started,
    )
    trained_on = inspected[0].all_numbers()
    check_two_classes(root, trained_on, ignore_index)
    if not names:
        count = num_classes or counted_classes(inspected)
        names, origin = [str(number) for number in range(count)], "data.num_classes"
    for pairs, found in zip(splits, inspected, strict=True):
        check_classes(pairs, found.largest(), len(names), origin)
    warn_of_unseen(
        [name for number, name in enumerate(names) if number not in (*trained_on, ignore_index)]
    )
    if ignore_index < len(names):
        log.warning(
            "class %s is left out: its number is data.ignore_index=%d",
            names[ignore_index],
            ignore_index,
        )
    train, validation = (
        MaskedImages(pairs, found.sizes, max_image_pixels)
        for pairs, found in zip(splits, inspected, strict=True)
    )
    return SegmentationSource(train, validation, tuple(names), ignore_index)


Splits = tuple[list[Pair], list[Pair]]
Names = tuple[Sequence[str], str]  # the classes' names, none if unknown, and where they are from


def segmentation_folder(root: str) -> tuple[Splits, Names]:
    """Images below root/images and their masks below root/masks, at the same place and under the same name but .png.

    With root/images/train (or training) the images below it are trained on, and those below root/images/val (or
    validation, or test) are held out. Where there is no such folder a tenth of the images, by a hash of their names, is
    held out; at least one. Class names stand one a line in root/classes.txt.

    Raises:
        InputError: a folder is missing, also the one to train on beside one to hold out; an image has no mask, or a mask no
            image.
    """
    images, masks = Path(root, "images"), Path(root, "masks")
    if not os.path.isdir(root):
        raise InputError(f"data.root={root}: no such folder")
    for folder in (images, masks):
        if not folder.is_dir():
            raise InputError(
                f"data.root={root}: no folder {folder.name} in there (expected images and masks)"
            )
    names = names_in(Path(root, "classes.txt"))
    trained_on, held_out = (
        next((name for name in choices if (images / name).is_dir()), None)
        for choices in (TRAINED_ON, HELD_OUT)
    )
    if trained_on is None and held_out is not None:
        raise InputError(
            f"data.root={root}: images has a folder {held_out}, and none to train on; expected images/"
            f"{' or images/'.join(TRAINED_ON)} beside it"
        )
    if trained_on is None:
        return split(paired(images, masks)), names
    train = paired(images / trained_on, masks / trained_on)
    if held_out is None:
        return split(train), names
    return (list(train.values()), list(paired(images / held_out, masks / held_out).values())), names


def names_in(path: Path) -> Names:
    """The classes' names in a file, one a line; none if there is no such file.

    Raises:
        InputError: it is no text, or a line between two names is empty.
    """
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    names = [line.strip() for line in text.rstrip().splitlines()]
    if "" in names:
        raise InputError(
            f"{path}: line {names.index('') + 1} is empty; expected a class name in every line"
        )
    return names, str(path)


def voc2012(root: str, download: bool) -> tuple[Splits, Names]:
    """Pascal VOC 2012 as torchvision unpacks it: 1,464 images to train on, 1,449 held out."""
    parts = []
    for image_set in ("train", "val"):
        part = torchvision_dataset(
            "VOCSegmentation", root, year="2012", image_set=image_set, download=download
        )
        download = False  # the archive has both
        parts.append([Pair(*files) for files in zip(part.images, part.masks, strict=True)])
    return (parts[0], parts[1]), (VOC_CLASSES, "voc2012")


def paired(images: Path, masks: Path) -> dict[str, Pair]:
    """The images below one folder with their masks below another, by their path without its ending.

    Raises:
        InputError: names an image without mask, a mask without image, or two images for one mask.
    """
    image_of: dict[str, str] = {}
    for path in list_images(images):
        name = name_below(images, path)
        if name in image_of:
            raise InputError(
                printable(f"{path}: {image_of[name]} has the same mask, {masks / name}.png")
            )
        image_of[name] = path
    mask_of = {
        name_below(masks, path): path
        for path in list_images(masks)
        if path.lower().endswith(".png")
    }
    without_mask, without_image = (
        sorted(image_of.keys() - mask_of),
        sorted(mask_of.keys() - image_of),
    )
    if without_mask:
        name = without_mask[0]
        raise InputError(
            printable(f"{image_of[name]}: no mask {masks / name}.png{more(without_mask)}")
        )
    if without_image:
        raise InputError(
            printable(
                f"{mask_of[without_image[0]]}: no image of that name in {images}{more(without_image)}"
            )
        )
    return {name: Pair(image_of[name], mask_of[name]) for name in sorted(image_of)}


def name_below(folder: Path, path: str) -> str:
    """The path from `folder` on, without its ending."""
    return os.path.splitext(os.path.relpath(path, folder))[0]


def more(names: Sequence[str]) -> str:
    """How many others are like the one that was named."""
    return f" (and {len(names) - 1} more like it)" if len(names) > 1 else ""


def split(pairs: dict[str, Pair]) -> Splits:
    """A tenth of the pairs held out by a hash of their names; at least one, and not all."""
    if len(pairs) < 2:
        raise InputError(
            f"{printable(next(iter(pairs.values())).image)}: the only image; at least one more is needed, to hold out"
        )
    held_out = is_held_out(map(os.fsencode, pairs), 0.1)
    if not held_out.any() or held_out.all():
        held_out = np.arange(len(pairs)) == 0
    log.info("held out: %d of %d images, by a hash of their names", held_out.sum(), len(pairs))
    everything = np.array(list(pairs.values()), dtype=object)  # (M, 2)
    train, validation = (
        [Pair(*files) for files in everything[chosen]] for chosen in (~held_out, held_out)
    )
    return train, validation


class Inspected(NamedTuple):
    """What was found in M pairs of files."""

    sizes: np.ndarray
    """(M, 2) height and width, px."""
    numbers: list[np.ndarray]
    """For each mask the numbers in it but `ignore_index`, ascending."""

    def largest(self) -> np.ndarray:
        """(M,) the largest number in each mask but `ignore_index`; -1 if there is no other."""
        return np.array([numbers[-1] if len(numbers) else -1 for numbers in self.numbers])

    def all_numbers(self) -> list[int]:
        """The numbers in any of the masks but `ignore_index`, ascending."""
        return np.unique(np.concatenate(self.numbers)).tolist()


def inspect_all(pairs: Sequence[Pair], ignore_index: int, max_image_pixels: int) -> Inspected:
    """Open every pair of files, in parallel threads.

    Of an image only the header is read. A mask has to be decoded, since its numbers are needed; Pillow does that outside
    of Python's lock. A megapixel takes about 10 ms of one core.

    Raises:
        InputError: for the first pair that cannot be used; it names the file.
    """
    with pillow_warnings_ignored(), ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        found = list(
            pool.map(lambda pair: inspect_pair(pair, ignore_index, max_image_pixels), pairs)
        )
    return Inspected(np.array([size for size, _ in found]), [numbers for _, numbers in found])


def inspect_pair(
    pair: Pair, ignore_index: int, max_image_pixels: int
) -> tuple[tuple[int, int], np.ndarray]:
    """Height and width of a pair, and the numbers in its mask but `ignore_index`, ascending.

    For threads: the caller ignores Pillow's warnings.

    Raises:
        InputError: a file cannot be read, or the two are of different sizes.
    """
    try:
        with opened(pair.image, max_image_pixels) as image:
            width, height = image.size
        mask = decoded_mask(pair.mask, max_image_pixels)
    except UnreadableImage as error:
        raise InputError(str(error)) from error
    if mask.shape != (height, width):
        raise InputError(
            printable(
                f"{pair.mask}: {mask.shape[1]} x {mask.shape[0]} px, and its image {pair.image} has {width} x {height} px"
            )
        )
    # Counting takes half as long as sorting, and a count up to the largest number is only as long as 8 bits are.
    numbers = (
        np.flatnonzero(np.bincount(mask.ravel())) if mask.dtype == np.uint8 else np.unique(mask)
    )
    return (height, width), numbers[numbers != ignore_index]


def check_two_classes(root: str, numbers: Sequence[int], ignore_index: int) -> None:
    """Raises InputError if there is nothing to tell apart: the loss would be 0 at once, and every prediction right.

    Args:
        numbers: those in the masks to train on, but `ignore_index`.
    """
    if len(numbers) > 1:
        return
    held = f"only the number {numbers[0]}" if numbers else "nothing"
    likely = "; masks of 0 and 255 have to be stored as 0 and 1" if ignore_index == 255 else ""
    raise InputError(
        f"data.root={root}: the masks to train on hold {held} beside data.ignore_index={ignore_index}, and at least two "
        f"classes are needed{likely}"
    )


def warn_of_unseen(names: Sequence[str]) -> None:
    """Name the classes that are in no mask to train on, at most ten of them."""
    if names:
        log.warning("classes in no mask to train on: %s%s", ", ".join(names[:10]), more(names[9:]))


def counted_classes(inspected: Sequence[Inspected]) -> int:
    """The largest number in any mask, and one."""
    largest = max(int(found.largest().max()) for found in inspected)
    log.info("%d classes: the largest number in the masks is %d", largest + 1, largest)
    return largest + 1


def check_classes(
    pairs: Sequence[Pair], largest: np.ndarray, num_classes: int, origin: str
) -> None:
    """Raises InputError if a mask holds a number past the classes.

    Args:
        largest: (M,) the largest number in each mask.
        origin: where the number of classes is from.
    """
    wrong = np.flatnonzero(largest >= num_classes)
    if len(wrong):
        raise InputError(
            f"{printable(pairs[wrong[0]].mask)}: holds the number {largest[wrong[0]]}, and {origin} says {num_classes} "
            f"classes, 0 to {num_classes - 1}{more(wrong.tolist())}"
        )
