"""Where images come from. Every data set becomes a `DataSource`: images to train on, and labelled ones if there are.

Letters: M images, H W pixels.
"""

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from moco.data.files.archives import DAMAGED, read_arrays
from moco.data.files.decoding import DecodedImage, EncodedImage, encoded_file
from moco.data.files.images import MAX_IMAGE_PIXELS, to_rgb
from moco.data.files.listing import PathList
from moco.data.files.listing_cache import Listing, listed
from moco.data.sources.class_folders import ClassFolders, is_held_out
from moco.errors import InputError, printable, unknown_name


class Images(Protocol):
    """RGB images by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Image.Image:
        """The whole image. Raises `UnreadableImage` where the file is damaged."""
        ...

    def opened(self, index: int) -> EncodedImage:
        """The image, its size known and not decoded yet. Raises `UnreadableImage` where the file is damaged."""
        ...

    def name(self, index: int) -> str:
        """What to call the image in a message."""
        ...


class ArrayImages:
    """Images in memory: uint8, (M, H, W) grey, (M, H, W, 1) grey, (M, H, W, 3) RGB or (M, H, W, 4) RGBA."""

    def __init__(self, array: np.ndarray, what: str) -> None:
        is_stack = array.ndim == 3 or (array.ndim == 4 and array.shape[-1] in (1, 3, 4))
        if array.dtype != np.uint8 or not is_stack or not len(array):
            raise InputError(
                f"{what}: expected uint8 of shape (M, H, W) or (M, H, W, 1 or 3 or 4), got {array.dtype} {array.shape}"
            )
        array = array[..., 0] if array.ndim == 4 and array.shape[-1] == 1 else array
        # A tensor, since loader processes are handed tensors as shared memory, and arrays as copies.
        self.tensor = torch.from_numpy(np.ascontiguousarray(array))
        self.what = what

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, index: int) -> Image.Image:
        return to_rgb(Image.fromarray(self.tensor[index].numpy()))

    def opened(self, index: int) -> DecodedImage:
        array = self.tensor[index].numpy()
        return DecodedImage(array if array.shape[2:] == (3,) else np.array(self[index]))

    def name(self, index: int) -> str:
        return f"{self.what}[{index}]"


class FileImages:
    """Images in files, decoded when asked for, if they have no more than `max_image_pixels`.

    Args:
        num_pages: images in each file, (len(paths),); None: of each the first alone.
    """

    def __init__(
        self,
        paths: Sequence[str],
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        num_pages: np.ndarray | None = None,
    ) -> None:
        paths = paths if isinstance(paths, PathList) else PathList.of(paths)
        # Tensors, which loader processes share; a list of millions of str each would copy.
        self.text = torch.from_numpy(paths.text)
        self.ends = torch.from_numpy(paths.ends)
        self.page_ends = None if num_pages is None else torch.from_numpy(np.cumsum(num_pages))
        self.max_image_pixels = max_image_pixels

    def __len__(self) -> int:
        return len(self.ends) if self.page_ends is None else int(self.page_ends[-1])

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(self.opened(index).pixels())

    def opened(self, index: int) -> EncodedImage:
        path, page, _ = self._place(index)
        return encoded_file(path, self.name(index), self.max_image_pixels, page)

    def name(self, index: int) -> str:
        """The path; of a file with several pages and #1, #2, ..."""
        path, page, num_pages = self._place(index)
        return path if num_pages == 1 else f"{path}#{page + 1}"

    def files(self) -> PathList:
        """The files, each once."""
        return PathList(self.text.numpy(), self.ends.numpy())

    def _place(self, index: int) -> tuple[str, int, int]:
        """The image's file, its page in there, and how many of the pages are images."""
        paths = self.files()
        if self.page_ends is None:
            return paths[index], 0, 1
        file = int(np.searchsorted(self.page_ends.numpy(), index, side="right"))
        start = int(self.page_ends[file - 1]) if file else 0
        return paths[file], index - start, int(self.page_ends[file]) - start


@dataclass(frozen=True)
class Labelled:
    """Images with a class number each."""

    images: Images
    labels: np.ndarray
    """(M,) int64, 0 or more; numbers may have gaps."""


@dataclass(frozen=True)
class DataSource:
    """What a run trains on, and what the kNN monitor compares."""

    train: Images
    bank: Labelled | None
    """Labelled training images; None without labels."""
    queries: Labelled | None
    """Labelled images that are held out of the bank; None without labels."""
    image_size: int
    """Side at which the data set is usually used, px."""


def build_source(
    name: str,
    root: Any = None,
    *,
    download: bool = False,
    num_images: int | None = None,
    streams: int = 12,
    shuffle_buffer: int = 500,
    image_column: str | None = None,
    label_column: str | None = None,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    held_out: float = 0.1,
    pages: str = "first",
    listing: Path | None = None,
) -> DataSource:
    """The data set `name`.

    Args:
        root: folder or file, as the data set needs it; ``images`` also takes a list of folders.
        download: let torchvision fetch what is not under `root`.
        num_images: size of ``synthetic``, or of all shards of ``webdataset`` together; None: 1,024, or counted.
        streams, shuffle_buffer: of ``webdataset``, see `moco.data.loading.streams`.
        image_column, label_column: of ``hf``, see `moco.data.sources.hugging_face`.
        max_image_pixels: images of more are unreadable.
        held_out: share of the images that ``image_folder`` without a validation folder keeps out of the bank.
        pages: of TIFF files with several take the ``first``, or ``each`` as an image of its own.
        listing: file that keeps the list of images below folders for the next start; None: list them each time.

    Raises:
        InputError: unknown name, nothing at `root`, or something else than expected there; it names the place.
    """
    if name in MASKED:
        raise InputError(
            f"data={name}: its masks are for moco.segment and evaluation=dense; "
            "data=images data.root=PATH takes any images"
        )
    if name not in SOURCES:
        raise InputError(f"data.name: {unknown_name('data set', name, SOURCES)}")
    if name == "synthetic":
        return synthetic(num_images or 1024)
    if name == "digits":
        return digits()
    if root is None:
        raise InputError(
            f"data.root: missing; data={name} needs to know where the images are: data.root=PATH"
        )
    if name == "images":
        return images(root, max_image_pixels, pages, listing)
    if name == "webdataset":
        from moco.data.loading.streams import webdataset

        return webdataset(root, streams, shuffle_buffer, num_images, max_image_pixels)
    if not isinstance(root, str):
        raise InputError(
            f"data.root={root}: expected one path; only data=images and data=webdataset take several"
        )
    if name == "packed":
        from moco.data.sources.packed import packed

        return packed(root, max_image_pixels)
    if name == "hf":
        from moco.data.sources.hugging_face import hugging_face

        return hugging_face(root, image_column, label_column, max_image_pixels)
    if name in TORCHVISION:
        return TORCHVISION[name](root, download)
    if name == "image_folder":
        return image_folder(root, max_image_pixels, held_out, pages, listing)
    return npz(root, max_image_pixels)


def digits() -> DataSource:
    """scikit-learn's 1,797 scanned digits, 8 x 8 px, 16 grey levels; a fixed random 360 of them are the queries."""
    from sklearn.datasets import load_digits

    data = load_digits()
    array = np.round(data.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    labels = data.target.astype(np.int64)
    order = np.random.RandomState(0).permutation(
        len(array)
    )  # RandomState's streams are frozen (NEP 19)
    train, test = order[:1437], order[1437:]
    return _from_arrays("digits", array[train], labels[train], array[test], labels[test])


def synthetic(num_images: int) -> DataSource:
    """Uniform noise of 224 px in 10 arbitrary classes: costs what images cost, and teaches nothing."""
    generator = np.random.default_rng(0)
    array = generator.integers(0, 256, (num_images, 224, 224, 3), dtype=np.uint8)
    labels = np.arange(num_images) % 10
    num_queries = max(1, num_images // 10)
    return _from_arrays("synthetic", array, labels, array[:num_queries], labels[:num_queries])


def images(root: Any, max_image_pixels: int, pages: str, listing: Path | None) -> DataSource:
    """Every image below a folder, or below several; no labels: sub-folders are not classes."""
    roots = [root] if isinstance(root, str) else root
    if not isinstance(roots, list) or not roots or not all(isinstance(one, str) for one in roots):
        raise InputError(f"data.root={root}: expected a folder or a list of folders")
    refuse_overlap(roots)
    found = Listing.of_all(listed(roots, pages, listing))
    return DataSource(
        FileImages(found.paths, max_image_pixels, found.num_pages), None, None, image_size=224
    )


def refuse_overlap(roots: Sequence[str]) -> None:
    """Raises InputError if a folder is another one of them or lies below it: its images would be listed twice."""
    for inner, outer in itertools.permutations(roots, 2):
        real = os.path.realpath(outer)
        if os.path.commonpath([real, os.path.realpath(inner)]) == real:
            raise InputError(
                f"data.root: {printable(inner)} is {printable(outer)} or lies below it, and its images would be listed "
                "twice; leave one of them out"
            )


def image_folder(
    root: str, max_image_pixels: int, held_out: float, pages: str, listing: Path | None
) -> DataSource:
    """Class sub-folders: root/train/CLASS/... with root/val/CLASS/... (or test), else root/CLASS/....

    Of root/CLASS/... alone the images that `is_held_out` chooses by their paths below root are kept out of the bank and
    serve as queries; all are trained on. With root/train and nothing beside it there are no queries and no monitor.
    """
    top = Path(root)
    has_train = (top / "train").is_dir()
    tops = [
        str(top / name) for name in ("train", "val", "validation", "test") if (top / name).is_dir()
    ][:2]
    tops = tops if has_train else [str(top)]
    folders = [
        ClassFolders.of(*one) for one in zip(tops, listed(tops, pages, listing), strict=True)
    ]
    classes = folders[0].classes()
    train, *others = (in_classes(one, classes, max_image_pixels) for one in folders)
    if has_train:
        return DataSource(train.images, train, others[0] if others else None, image_size=224)
    is_query = is_held_out(folders[0].names(), held_out)
    if not is_query.any() or is_query.all():
        return DataSource(train.images, train, None, image_size=224)
    bank, queries = (
        in_classes(folders[0].where(chosen), classes, max_image_pixels)
        for chosen in (~is_query, is_query)
    )
    return DataSource(train.images, bank, queries, image_size=224)


def in_classes(folders: ClassFolders, classes: list[str], max_image_pixels: int) -> Labelled:
    """The images below class folders, numbered by their class's place in `classes`."""
    images = FileImages(folders.files.paths, max_image_pixels, folders.files.num_pages)
    return Labelled(images, folders.labels(classes))


def npz(root: str, max_image_pixels: int) -> DataSource:
    """One archive in the MedMNIST layout: train_images, and where there are labels train_labels, test_images, test_labels.

    Images are uint8 (M, H, W[, C]); labels (M,) or (M, 1) integers.
    """
    if not Path(root).is_file():
        raise InputError(f"data.root={root}: no such file")
    names = ("train_images", "train_labels", "test_images", "test_labels")
    try:
        arrays, present = read_arrays(root, names, max_image_pixels)
    except DAMAGED as error:
        raise InputError(
            f"data.root={root}: not a readable .npz archive of plain arrays ({error})"
        ) from error
    if "train_images" not in arrays:
        raise InputError(
            f"data.root={root}: no array train_images in there (found {printable(', '.join(present)) or 'none'})"
        )
    labels = {part: _npz_labels(arrays, part, root) for part in ("train", "test")}
    test_images = arrays.get("test_images") if labels["test"] is not None else None
    return _from_arrays(root, arrays["train_images"], labels["train"], test_images, labels["test"])


def _npz_labels(arrays: dict[str, np.ndarray], part: str, root: str) -> np.ndarray | None:
    labels, images = arrays.get(f"{part}_labels"), arrays.get(f"{part}_images")
    if labels is None or images is None:
        return None
    if (
        labels.size != len(images)
        or not np.issubdtype(labels.dtype, np.integer)
        or (labels < 0).any()
    ):
        raise InputError(
            f"data.root={root}: {part}_labels must hold one class number (0 or more) for each of the {len(images)} "
            f"images, got {labels.dtype} {labels.shape}"
        )
    return labels.reshape(-1).astype(np.int64)


def _cifar(dataset: str) -> Callable[[str, bool], DataSource]:
    def build(root: str, download: bool) -> DataSource:
        train, test = (
            torchvision_dataset(dataset, root, train=part, download=download)
            for part in (True, False)
        )
        return _from_arrays(
            dataset, train.data, np.array(train.targets), test.data, np.array(test.targets)
        )

    return build


def _fashion_mnist(root: str, download: bool) -> DataSource:
    train, test = (
        torchvision_dataset("FashionMNIST", root, train=part, download=download)
        for part in (True, False)
    )
    return _from_arrays(
        "FashionMNIST",
        train.data.numpy(),
        train.targets.numpy(),
        test.data.numpy(),
        test.targets.numpy(),
    )


def _stl10(root: str, download: bool) -> DataSource:
    unlabelled, train, test = (
        torchvision_dataset("STL10", root, split=split, download=download)
        for split in ("train+unlabeled", "train", "test")
    )
    images = {
        name: part.data.transpose(0, 2, 3, 1) for name, part in (("train", train), ("test", test))
    }
    labelled = _from_arrays("STL10", images["train"], train.labels, images["test"], test.labels)
    everything = ArrayImages(unlabelled.data.transpose(0, 2, 3, 1), "STL10")
    return DataSource(everything, labelled.bank, labelled.queries, labelled.image_size)


def torchvision_dataset(dataset: str, root: str, **kwargs: Any) -> Any:
    """The data set of that name in torchvision.

    Raises:
        InputError: it is not under root, or damaged.
    """
    import torchvision.datasets

    try:
        return getattr(torchvision.datasets, dataset)(root, **kwargs)
    # Of most files, all pickles among them, it compares the MD5 first; of the others its parsers raise nearly anything.
    except Exception as error:
        advice = "" if kwargs.get("download") else "; data.download=true fetches it"
        reason = str(error) or type(error).__name__
        raise InputError(
            f"data.root={root}: {dataset} is not there or damaged ({reason}){advice}"
        ) from error


TORCHVISION: dict[str, Callable[[str, bool], DataSource]] = {
    "cifar10": _cifar("CIFAR10"),
    "cifar100": _cifar("CIFAR100"),
    "fashion_mnist": _fashion_mnist,
    "stl10": _stl10,
}
SOURCES = (
    "digits",
    "hf",
    "image_folder",
    "images",
    "npz",
    "packed",
    "synthetic",
    "webdataset",
    *TORCHVISION,
)
MASKED = ("segmentation_folder", "voc2012")  # see moco.segmentation.mask_sources


def _from_arrays(
    what: str,
    train_images: np.ndarray,
    train_labels: np.ndarray | None,
    test_images: np.ndarray | None,
    test_labels: np.ndarray | None,
) -> DataSource:
    for images, labels in ((train_images, train_labels), (test_images, test_labels)):
        if images is not None and labels is not None and len(images) != len(labels):
            raise InputError(f"{what}: {len(images)} images and {len(labels)} labels")
    train = ArrayImages(train_images, f"{what}: train_images")
    bank = (
        None if train_labels is None else Labelled(train, np.asarray(train_labels, dtype=np.int64))
    )
    queries = None
    if test_images is not None and test_labels is not None:
        test = ArrayImages(test_images, f"{what}: test_images")
        queries = Labelled(test, np.asarray(test_labels, dtype=np.int64))
    return DataSource(train, bank, queries, image_size=max(train.tensor.shape[1:3]))
