"""Datasets of the user's own: images by number, or images that are read one after the other.

`dataset_source` makes a source of them. An item is an image, or a tuple or list that begins with an
image and its label.
"""

import logging
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from moco.data.files.encoded_image import (
    MAX_IMAGE_PIXELS,
    DecodedImage,
    EncodedImage,
    UnreadableImage,
)
from moco.data.files.pillow_images import RAW_MODES, to_rgb
from moco.data.sources.folders import is_held_out
from moco.data.sources.label_sets import is_matrix_of_classes, shared_numbers
from moco.data.sources.source import DataSource, Images, Labelled
from moco.errors import InputError, printable, said, unknown_name

log = logging.getLogger(__name__)

LARGEST_IMAGE_SIZE = 224
"""The usual side of images in px, unless the first image is smaller."""
MOST_TRIED = 100
"""Images that are tried at the start until one can be read."""
SIDES = ("train", "bank", "queries")
UNREADABLE = (OSError, UnreadableImage, Image.DecompressionBombError)
"""What a dataset raises for a damaged image, which is then skipped."""
EXPECTED_IMAGE = (
    "expected an image or (image, label); an image is a PIL image, an array (H, W) or "
    "(H, W, bands), or a tensor (H, W) or (bands, H, W), of uint8, int16, uint16, int32, uint32 or "
    "floats"
)
USUAL_BANDS = (1, 3, 4)
PIXEL_TYPES = (
    "uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64"
)  # fmt: skip
EXPECTED_LABEL = (
    "expected (image, label), and the label a whole number of 0 or more, "
    "or 0 and 1 for each of several classes"
)
NO_NUMBERS = (
    "an iterable dataset has no images by number; expected a dataset with __len__ and __getitem__"
)


@dataclass(eq=False)
class DatasetImages(Images):
    """The images of a map-style dataset, or some of them."""

    dataset: Any
    what: str
    """What to call the dataset in names of images."""
    where: str
    """What to call it in errors."""
    max_image_pixels: int
    """Larger PIL images are unreadable."""
    rows: np.ndarray
    """(images,) int64, the number of each image in the dataset."""

    def __len__(self) -> int:
        return len(self.rows)

    def item(self, index: int) -> Any:
        """Return an item of the dataset.

        Raises:
            UnreadableImage: the dataset says that the image is damaged.
            InputError: it raises anything else.
        """
        number = int(self.rows[index])
        try:
            return self.dataset[number]
        except InputError:
            raise
        except UNREADABLE as error:
            raise UnreadableImage(f"{printable(self.name(index))}: {said(error)}") from error
        except Exception as error:
            raise InputError(f"{self.where}: item {number} raised {named(error)}") from error

    def opened(self, index: int) -> DecodedImage:
        """Return the image, decoded.

        Raises:
            UnreadableImage: the image is damaged.
            InputError: the dataset fails, or the item is no image.
        """
        item = self.item(index)
        number = f"item {self.rows[index]}"
        name = self.name(index)
        raw = self.reading.raw
        return opened_item(item, self.where, number, name, self.max_image_pixels, raw=raw)

    def name(self, index: int) -> str:
        """Return ``dataset.name(number)`` if the dataset has such a method, else WHAT[number]."""
        number = int(self.rows[index])
        if has_names(self.dataset):
            return str(self.dataset.name(number))
        return f"{self.what}[{number}]"


@dataclass(eq=False)
class IterableImages(Images):
    """The images of an iterable dataset, to train on: they have an order and no numbers.

    `moco.data.loading.iterables` reads them in the training process.
    """

    dataset: Any
    what: str
    """What to call the dataset in names of images."""
    where: str
    """What to call it in errors."""
    max_image_pixels: int
    """Larger PIL images are unreadable."""
    num_images: int
    """How many it yields in an epoch."""

    def __len__(self) -> int:
        return self.num_images

    def opened(self, index: int) -> DecodedImage:
        """Raise InputError: there are no images by number."""
        raise InputError(f"{self.where}: {NO_NUMBERS}")

    def name(self, index: int) -> str:
        """Return WHAT[place in the epoch]."""
        return f"{self.what}[{index}]"

    def items(self, epoch: int) -> Iterator[Any]:
        """Yield the items of an epoch, as many as there are images.

        Raises:
            InputError: the dataset ends before, or fails.
        """
        items = items_of(self.dataset, self.where, epoch)
        for number in range(self.num_images):
            try:
                yield next(items)
            except StopIteration:
                raise InputError(
                    f"{self.where}: ends after {number} items; expected {self.num_images}, "
                    "as its length or data.num_images says"
                ) from None

    def opened_item(self, place: int, item: Any) -> DecodedImage:
        """Return the image of an item at this place of an epoch; see `DatasetImages.opened`."""
        number = f"item {place}"
        name = self.name(place)
        raw = self.reading.raw
        return opened_item(item, self.where, number, name, self.max_image_pixels, raw=raw)

    def prepared_item(self, place: int, item: Any) -> EncodedImage:
        """Return the same with the pixels that the model gets."""
        image = self.opened_item(place, item)
        if self.values is None:
            return image
        return self.values.of(image, self.name(place))


def items_of(dataset: Any, where: str, epoch: int) -> Iterator[Any]:
    """Yield the items of an iterable dataset; its ``set_epoch`` is called first if it has one.

    Raises:
        InputError: the dataset raises an error.
    """
    number = 0
    try:
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)
        for item in dataset:
            yield item
            number += 1
    except InputError:
        raise
    except Exception as error:
        # An iterator cannot go on after an error, so damaged images end the run, too.
        raise InputError(
            f"{where}: raised {named(error)} after {number} items; "
            "an iterable dataset has to leave out what it cannot read"
        ) from error


def opened_item(
    item: Any, where: str, number: str, name: str, max_image_pixels: int, *, raw: bool = False
) -> DecodedImage:
    """Return the image of an item of a dataset.

    Args:
        item: what the dataset gave.
        where: what to call the dataset in errors.
        number: what to call the item.
        name: of the image.
        max_image_pixels: a larger PIL image is unreadable.
        raw: see `pixels_of`.

    Raises:
        UnreadableImage: the image is damaged or too large.
        InputError: the item is no image.
    """
    try:
        return DecodedImage(pixels_of(item, max_image_pixels, raw=raw))
    except UnreadableImage as error:
        raise UnreadableImage(f"{printable(name)}: {error}") from error
    except ValueError as error:
        raise InputError(f"{where}: {number} is {error}; {EXPECTED_IMAGE}") from error


def pixels_of(item: Any, max_image_pixels: int, *, raw: bool = False) -> np.ndarray:
    """Return the image of an item, (height, width, bands), C-contiguous, of its own type.

    8-bit images of one or three bands, and PIL images with alpha, become RGB (height, width, 3).

    Args:
        item: an image, or (image, label).
        max_image_pixels: a PIL image with more pixels is unreadable.
        raw: give 8-bit images with the bands that they have.

    Raises:
        UnreadableImage: a PIL image is damaged or too large.
        ValueError: the item is no image; the message says what it is.
    """
    image = item
    if isinstance(item, (tuple, list)) and item:
        image = item[0]
    if isinstance(image, Image.Image):
        return pixels_of_pil(image, max_image_pixels, raw=raw)
    array = image
    if isinstance(image, Tensor):
        array = image.detach().cpu()
        if array.dtype == torch.bfloat16:  # NumPy has none
            array = array.float()
        if array.ndim == 3:
            # A tensor with its bands at the end would become an image three px wide.
            if array.shape[2] in USUAL_BANDS and array.shape[0] not in USUAL_BANDS:
                raise ValueError(f"{described(image)}, whose bands do not come first")
            array = array.permute(1, 2, 0)
        array = array.numpy()
    if not isinstance(array, np.ndarray):
        raise ValueError(described(item))
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.size == 0 or array.dtype.name not in PIXEL_TYPES:
        raise ValueError(described(image))
    if array.dtype == np.uint8 and array.shape[2] == 1 and not raw:
        array = np.repeat(array, 3, axis=2)
    # PyTorch takes no other byte order, and warns of memory that it must not write to.
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return np.require(array, requirements=["C", "W"])


def pixels_of_pil(image: Image.Image, max_image_pixels: int, *, raw: bool) -> np.ndarray:
    """Do what `pixels_of` does, for a PIL image, whose file may not have been decoded yet."""
    if 0 in image.size:
        raise ValueError(f"a PIL image of mode {image.mode}, {image.width} x {image.height} px")
    if image.width * image.height > max_image_pixels:
        size = f"{image.width} x {image.height} px"
        raise UnreadableImage(f"{size} exceed data.max_image_pixels={max_image_pixels}")
    try:
        return pillow_pixels(image, raw=raw)
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged data
        raise UnreadableImage(said(error)) from error


def pillow_pixels(image: Image.Image, *, raw: bool) -> np.ndarray:
    """Return the pixels of a PIL image, (height, width, bands), with all of their bits."""
    if image.mode.startswith("I;16"):
        array = np.asarray(image).astype(np.uint16)
    elif image.mode in ("I", "F"):
        array = np.asarray(image)
    elif raw and image.mode != "P":
        array = np.asarray(image.convert(RAW_MODES.get(image.mode, "RGB")))
    else:
        array = np.asarray(to_rgb(image))
    return np.array(array.reshape(*array.shape[:2], -1))


def described(value: Any) -> str:
    """Return what an item is, for a message."""
    kind = type(value).__name__
    if isinstance(value, (Tensor, np.ndarray)):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{kind} {tuple(value.shape)} of {dtype}"
    if isinstance(value, Mapping):
        return f"{kind} with the keys {printable(', '.join(map(str, value)))}"
    if isinstance(value, (tuple, list)):
        if not value:
            return f"{kind} of empty"
        return f"{kind} of {described(value[0])}"
    return kind


def named(error: Exception) -> str:
    """Return kind and message of an error on one line."""
    return f"{type(error).__name__}: {said(error)}"


def dataset_source(
    train: Any,
    bank: Any = None,
    queries: Any = None,
    *,
    what: str = "dataset",
    where: str | None = None,
    num_images: int | None = None,
    held_out: float = 0.1,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
) -> DataSource:
    """Return datasets of the user's own as a source.

    The labels of `bank` and `queries` are the attribute ``targets`` or ``labels`` of the dataset if
    it holds one whole number for each image, or a row of 0 and 1 for each image with several
    classes. Otherwise all items are read once. If `train` has such an attribute, it is the bank for
    given queries. Without bank and queries it is divided into both.

    The side of the images is that of the first image, its longer side, and at most 224 px.

    Args:
        train: a map-style dataset, with ``__len__`` and ``__getitem__``; or an iterable one, with
            ``__iter__``, that can be read again in each epoch; or a mapping of the names ``train``,
            ``bank`` and ``queries`` to datasets.
        bank, queries: map-style datasets with labels.
        what: what to call the dataset in names of images.
        where: what to call it in errors; by default `what`.
        num_images: number of images that an iterable yields. By default it is its length, or it is
            read once to count them.
        held_out: fraction of a labelled `train` that becomes the queries, from 0 to 1. A hash of
            the name decides, or of the number of an image without a name.
        max_image_pixels: a larger PIL image is unreadable.

    Raises:
        InputError: it is no dataset, it has no images, or an image or label is something else.

    Example:
        >>> from moco.data.sources.own_dataset import dataset_source
        >>> source = dataset_source(torchvision.datasets.FakeData(100))
        >>> source.train[0].size
        (224, 224)
    """
    where = where or what
    given = {"train": train, "bank": bank, "queries": queries}
    if isinstance(train, Mapping):
        for key in train:
            if key not in SIDES:
                raise InputError(f"{where}: {unknown_name('dataset', str(key), SIDES)}")
        if train.get("train") is None:
            raise InputError(f"{where}: no dataset 'train' in there")
        given |= train
    if given["train"] is None:
        raise InputError(f"{where}: got None; expected a dataset")
    is_alone = given["bank"] is None and given["queries"] is None
    images: dict[str, Any] = {}
    for key, dataset in given.items():
        if dataset is None:
            continue
        twin = [other for other in images if given[other] is dataset]
        if twin:
            # The same images: they have the same names.
            images[key] = images[twin[0]]
            continue
        own_what, own_where = what, where
        if not is_alone:
            own_what, own_where = f"{what}[{key}]", f"{where}[{key}]"
        if is_map_style(dataset):
            rows = rows_of(dataset, own_where)
            images[key] = DatasetImages(dataset, own_what, own_where, max_image_pixels, rows)
        elif key == "train":
            images[key] = iterable_images(
                dataset, own_what, own_where, max_image_pixels, num_images
            )
        else:
            raise InputError(f"{own_where}: got {described(dataset)}; {NO_NUMBERS}")

    training = images["train"]
    # Read now, so that another dataset is refused before anything is computed.
    sizes = {key: usual_image_size(side) for key, side in images.items()}
    source = DataSource(training, None, None, sizes["train"])
    labels = None
    if isinstance(training, DatasetImages):
        labels = known_labels(training)
    if is_alone:
        if labels is None:
            return source
        return divided(source, training, labels, held_out)
    sides = {}
    for key in ("queries", "bank"):
        if key in images:
            sides[key] = (images[key], labels_of(images[key]))
    if "bank" not in sides:
        if labels is None:
            raise InputError(
                f"{where}: queries need a bank, and train has no attribute targets or labels with "
                "a whole number for each image; give bank, too"
            )
        sides["bank"] = (training, labels)
    return with_labels(source, where, sides)


def with_labels(
    source: DataSource, where: str, sides: Mapping[str, tuple[DatasetImages, np.ndarray]]
) -> DataSource:
    """Return a source with bank and queries, see `labelled_sides`."""
    found = labelled_sides(where, sides)
    return replace(source, bank=found["bank"], queries=found.get("queries"))


def labelled_sides(
    where: str, sides: Mapping[str, tuple[DatasetImages, np.ndarray]]
) -> dict[str, Labelled]:
    """Return images with their labels.

    Args:
        where: what to call the dataset in errors.
        sides: images, and their labels as `known_labels` returns them.

    Raises:
        InputError: one side has several classes for each image, and another has not, or has
            another number of classes.
    """
    # (): a side with one class for each image.
    num_classes = {labels.shape[1:] for _, labels in sides.values()}
    if len(num_classes) > 1:
        shapes = []
        for key, (_, labels) in sides.items():
            shapes.append(f"{key} {labels.shape}")
        raise InputError(
            f"{where}: expected labels of one kind and number of classes, got arrays of "
            f"{' and '.join(shapes)}"
        )
    label_sets = None
    all_labels = [labels for _, labels in sides.values()]
    if num_classes != {()}:
        all_labels, label_sets = shared_numbers(all_labels)
    found = {}
    for (key, (images, _)), labels in zip(sides.items(), all_labels, strict=True):
        found[key] = Labelled(images, labels, class_names_of(images.dataset), label_sets)
    return found


def is_map_style(dataset: Any) -> bool:
    """Return whether a dataset has its images by number."""
    # PyTorch's class of iterable datasets has __getitem__, too.
    is_iterable = isinstance(dataset, IterableDataset)
    return not is_iterable and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")


def has_names(dataset: Any) -> bool:
    """Return whether a dataset has a method that names its images."""
    return callable(getattr(dataset, "name", None))


def rows_of(dataset: Any, where: str) -> np.ndarray:
    """Return the numbers (images,) of all images of a map-style dataset.

    Raises:
        InputError: there are none.
    """
    if len(dataset) == 0:
        raise InputError(f"{where}: no images in there")
    return np.arange(len(dataset))


def iterable_images(
    dataset: Any, what: str, where: str, max_image_pixels: int, num_images: int | None
) -> IterableImages:
    """Return the images of an iterable dataset.

    Raises:
        InputError: it is not iterable, it can be read only once, or it has no images.
    """
    is_iterable = isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")
    if not is_iterable or not hasattr(dataset, "__iter__"):
        raise InputError(
            f"{where}: got {described(dataset)}; expected a dataset with __len__ and __getitem__, "
            "an iterable one with __iter__, or {train: dataset, bank: dataset, queries: dataset}"
        )
    if isinstance(dataset, Iterator):
        raise InputError(
            f"{where}: got {described(dataset)}, which can be read only once; "
            "expected an object whose __iter__ starts anew in each epoch"
        )
    if num_images is None:
        try:
            num_images = len(dataset)
        except (TypeError, NotImplementedError):
            num_images = sum(1 for _ in items_of(dataset, where, 0))
            log.info("data.num_images=%d saves counting them at each start", num_images)
    if num_images == 0:
        raise InputError(f"{where}: no images in there")
    return IterableImages(dataset, what, where, max_image_pixels, num_images)


def usual_image_size(images: DatasetImages | IterableImages) -> int:
    """Read the first image that can be read, and return the side of the images, px.

    Raises:
        InputError: the first item is no image.
    """
    for image in first_images(images):
        return min(max(image.size), LARGEST_IMAGE_SIZE)
    return LARGEST_IMAGE_SIZE


def first_images(images: DatasetImages | IterableImages) -> Iterator[DecodedImage]:
    """Yield those of the first images that can be read."""
    num_tried = min(len(images), MOST_TRIED)
    if isinstance(images, DatasetImages):
        for index in range(num_tried):
            try:
                yield images.opened(index)
            except UnreadableImage:
                continue
        return
    for place, item in zip(range(num_tried), images.items(0), strict=False):
        try:
            yield images.opened_item(place, item)
        except UnreadableImage:
            continue


def known_labels(images: DatasetImages) -> np.ndarray | None:
    """Return the labels that a dataset has as an attribute, or None.

    Returns:
        (images,) int64; or (images, classes) bool, if an image may have several classes.
    """
    for name in ("targets", "labels"):
        try:
            labels = np.asarray(getattr(images.dataset, name, None))
        except (TypeError, ValueError):  # a list of lists, or a tensor on a GPU
            continue
        if is_matrix_of_classes(labels, len(images)):
            return labels.astype(bool)
        has_numbers = np.issubdtype(labels.dtype, np.integer) and labels.size == len(images)
        if has_numbers and (labels >= 0).all():
            return labels.reshape(-1).astype(np.int64)
    return None


def labels_of(images: DatasetImages) -> np.ndarray:
    """Return the labels, by an attribute or by reading all items; see `known_labels`.

    Raises:
        InputError: an item has no label, or not as many classes as the items before it.
    """
    known = known_labels(images)
    if known is not None:
        return known
    log.info(
        "%s: reading all %d items for their labels; an attribute targets with a number for "
        "each image saves that",
        images.where,
        len(images),
    )
    labels: np.ndarray | None = None
    for index in range(len(images)):
        try:
            item = images.item(index)
        except UnreadableImage:
            continue
        where = f"{images.where}: item {index}"
        label = label_of(item, where)
        if labels is None:
            # The label of an unreadable image does not matter.
            labels = np.zeros((len(images), *label.shape), label.dtype)
        if label.shape != labels.shape[1:]:
            value = printable(repr(item[1])[:40])
            raise InputError(
                f"{where} has the label {value}, which is of another kind than those before it"
            )
        labels[index] = label
    if labels is None:
        return np.zeros(len(images), np.int64)
    return labels


def class_names_of(dataset: Any) -> tuple[str, ...] | None:
    """Return the attribute ``classes`` of a dataset, as torchvision's have it, if it holds names.

    Returns:
        The name of each class by its number, or None.
    """
    names = getattr(dataset, "classes", None)
    if not isinstance(names, (list, tuple)):
        return None
    for name in names:
        if not isinstance(name, str):
            return None
    return tuple(names)


def label_of(item: Any, where: str) -> np.ndarray:
    """Return the label of an item (image, label).

    Returns:
        () int64, the number of its class; or (classes,) bool, for a label of 0 and 1 for each of
        several classes.

    Raises:
        InputError: it has none.
    """
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        raise InputError(f"{where} has no label; {EXPECTED_LABEL}")
    try:
        label = operator.index(item[1])
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
        is_class = row_of_classes(item[1])
        if is_class is not None:
            return is_class
        label = -1
    if label < 0:
        value = printable(repr(item[1])[:40])
        raise InputError(f"{where} has the label {value}; {EXPECTED_LABEL}")
    return np.array(label, np.int64)


def row_of_classes(label: Any) -> np.ndarray | None:
    """Return a label of 0 and 1 for each of several classes as (classes,) bool, or None."""
    if isinstance(label, Tensor):
        label = label.detach().cpu().float().numpy()
    if not isinstance(label, (np.ndarray, list, tuple)):
        return None
    try:
        row = np.asarray(label)
    except ValueError:  # lists of several lengths
        return None
    if not is_matrix_of_classes(row[None], 1):
        return None
    return row.astype(bool)


def divided(
    source: DataSource, images: DatasetImages, labels: np.ndarray, held_out: float
) -> DataSource:
    """Return a source with some of the labelled training images as queries, the rest as bank."""
    names = []
    for index in range(len(images)):
        name = str(index)
        if has_names(images.dataset):
            name = images.name(index)
        names.append(name.encode(errors="surrogatepass"))
    is_query = is_held_out(names, held_out)
    # A monitor needs images on both sides. The hash of few names may put all on one.
    if is_query.all() or not is_query.any():
        return with_labels(source, images.where, {"bank": (images, labels)})
    sides = {}
    for key, is_chosen in (("bank", ~is_query), ("queries", is_query)):
        part = replace(images, rows=images.rows[is_chosen])
        sides[key] = (part, labels[is_chosen])
    return with_labels(source, images.where, sides)
