"""Where pictures come from. Every data set becomes a `DataSource`: pictures to train on, and labelled ones if there are.

Letters: M pictures, H W pixels.
"""

import math
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from PIL import Image

from moco.data.pictures import MAX_IMAGE_PIXELS, list_pictures, read_picture, to_rgb
from moco.errors import InputError, printable, unknown_name

MOST_DEFLATED = 1032  # bytes that one byte of zlib's compression can stand for (https://zlib.net/zlib_tech.html)


class Pictures(Protocol):
    """RGB pictures by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Image.Image:
        """Raises `UnreadablePicture` where the file is damaged."""
        ...

    def name(self, index: int) -> str:
        """What to call the picture in a message."""
        ...


class ArrayPictures:
    """Pictures in memory: uint8, (M, H, W) grey, (M, H, W, 1) grey, (M, H, W, 3) RGB or (M, H, W, 4) RGBA."""

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

    def name(self, index: int) -> str:
        return f"{self.what}[{index}]"


class FilePictures:
    """Pictures in files, decoded when asked for, if they have no more than `max_image_pixels`."""

    def __init__(self, paths: Sequence[str], max_image_pixels: int = MAX_IMAGE_PIXELS) -> None:
        # Two tensors, which loader processes share; a list of millions of str each would copy.
        encoded = [os.fsencode(path) for path in paths]
        self.text = torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8)
        self.ends = torch.from_numpy(np.cumsum([len(path) for path in encoded], dtype=np.int64))
        self.max_image_pixels = max_image_pixels

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Image.Image:
        return read_picture(self.name(index), self.max_image_pixels)

    def name(self, index: int) -> str:
        start, end = int(self.ends[index - 1]) if index else 0, int(self.ends[index])
        return os.fsdecode(self.text[start:end].numpy().tobytes())


@dataclass(frozen=True)
class Labelled:
    """Pictures with a class number each."""

    pictures: Pictures
    labels: np.ndarray
    """(M,) int64, 0 or more; numbers may have gaps."""


@dataclass(frozen=True)
class DataSource:
    """What a run trains on, and what the kNN monitor compares."""

    train: Pictures
    bank: Labelled | None
    """Labelled training pictures; None without labels."""
    queries: Labelled | None
    """Labelled pictures that are held out of the bank; None without labels."""
    image_size: int
    """Side at which the data set is usually used, px."""


def build_source(
    name: str,
    root: Any = None,
    *,
    download: bool = False,
    num_images: int = 1024,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
) -> DataSource:
    """The data set `name`.

    Args:
        root: folder or file, as the data set needs it; ``images`` also takes a list of folders.
        download: let torchvision fetch what is not under `root`.
        num_images: size of ``synthetic``.
        max_image_pixels: pictures of more are unreadable.

    Raises:
        InputError: unknown name, nothing at `root`, or something else than expected there; it names the place.
    """
    if name in MASKED:
        raise InputError(f"data={name}: its masks are for moco.segment; data=images data.root=PATH takes any pictures")
    if name not in SOURCES:
        raise InputError(f"data.name: {unknown_name('data set', name, SOURCES)}")
    if name == "synthetic":
        return synthetic(num_images)
    if name == "digits":
        return digits()
    if root is None:
        raise InputError(f"data.root: missing; data={name} needs to know where the pictures are: data.root=PATH")
    if name == "images":
        return images(root, max_image_pixels)
    if not isinstance(root, str):
        raise InputError(f"data.root={root}: expected one path; only data=images takes several")
    if name in TORCHVISION:
        return TORCHVISION[name](root, download)
    return image_folder(root, max_image_pixels) if name == "image_folder" else npz(root, max_image_pixels)


def digits() -> DataSource:
    """scikit-learn's 1,797 scanned digits, 8 x 8 px, 16 grey levels; a fixed random 360 of them are the queries."""
    from sklearn.datasets import load_digits

    data = load_digits()
    array = np.round(data.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    labels = data.target.astype(np.int64)
    order = np.random.RandomState(0).permutation(len(array))  # RandomState's streams are frozen (NEP 19)
    train, test = order[:1437], order[1437:]
    return _from_arrays("digits", array[train], labels[train], array[test], labels[test])


def synthetic(num_images: int) -> DataSource:
    """Uniform noise of 224 px in 10 arbitrary classes: costs what pictures cost, and teaches nothing."""
    generator = np.random.default_rng(0)
    array = generator.integers(0, 256, (num_images, 224, 224, 3), dtype=np.uint8)
    labels = np.arange(num_images) % 10
    num_queries = max(1, num_images // 10)
    return _from_arrays("synthetic", array, labels, array[:num_queries], labels[:num_queries])


def images(root: Any, max_image_pixels: int) -> DataSource:
    """Every picture below a folder, or below several; no labels: sub-folders are not classes."""
    roots = [root] if isinstance(root, str) else root
    if not isinstance(roots, list) or not roots or not all(isinstance(one, str) for one in roots):
        raise InputError(f"data.root={root}: expected a folder or a list of folders")
    paths = [path for one in roots for path in list_pictures(one)]
    return DataSource(FilePictures(paths, max_image_pixels), None, None, image_size=224)


def image_folder(root: str, max_image_pixels: int) -> DataSource:
    """Class sub-folders: root/train/CLASS/... with root/val/CLASS/... (or test), else root/CLASS/....

    Of root/CLASS/... alone a tenth of the pictures, chosen by a hash of their paths below root, is kept out of the bank and
    serves as queries; all are trained on. With root/train and nothing beside it there are no queries and no monitor.
    """
    top = Path(root)
    if (top / "train").is_dir():
        held_out = next((top / name for name in ("val", "validation", "test") if (top / name).is_dir()), None)
        train_paths, train_classes = _classified(top / "train")
        names = sorted(set(train_classes))
        bank = Labelled(FilePictures(train_paths, max_image_pixels), _numbered(train_classes, names, top / "train"))
        if held_out is None:
            return DataSource(bank.pictures, None, None, image_size=224)
        paths, classes = _classified(held_out)
        queries = Labelled(FilePictures(paths, max_image_pixels), _numbered(classes, names, held_out))
        return DataSource(bank.pictures, bank, queries, image_size=224)
    paths, classes = _classified(top)
    labels = _numbered(classes, sorted(set(classes)), top)
    is_query = held_out_tenth([str(Path(path).relative_to(top)) for path in paths])
    everything = FilePictures(paths, max_image_pixels)
    if not is_query.any() or is_query.all():
        return DataSource(everything, None, None, image_size=224)
    bank, queries = (
        Labelled(FilePictures([paths[row] for row in np.flatnonzero(chosen)], max_image_pixels), labels[chosen])
        for chosen in (~is_query, is_query)
    )
    return DataSource(everything, bank, queries, image_size=224)


def held_out_tenth(names: Sequence[str]) -> np.ndarray:
    """(M,) bool: a tenth of the names, whichever others there are beside them."""
    return np.array([zlib.crc32(os.fsencode(name)) % 10 == 0 for name in names])


def npz(root: str, max_image_pixels: int) -> DataSource:
    """One archive in the MedMNIST layout: train_images, and where there are labels train_labels, test_images, test_labels.

    Pictures are uint8 (M, H, W[, C]); labels (M,) or (M, 1) integers.
    """
    if not Path(root).is_file():
        raise InputError(f"data.root={root}: no such file")
    try:
        with zipfile.ZipFile(root) as archive:
            present = [name.removesuffix(".npy") for name in archive.namelist()]
            wanted = [
                name for name in ("train_images", "train_labels", "test_images", "test_labels") if name in present
            ]
            check_members(archive, wanted, max_image_pixels)
            arrays: dict[str, np.ndarray] = {name: read_member(archive, name) for name in wanted}
    # What zipfile and NumPy raise on damaged archives; zipfile has NotImplementedError for what it cannot unpack, and
    # RuntimeError for what is encrypted.
    except (
        ValueError,
        OSError,
        EOFError,
        RuntimeError,
        MemoryError,
        KeyError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise InputError(f"data.root={root}: not a readable .npz archive of plain arrays ({error})") from error
    if "train_images" not in arrays:
        raise InputError(
            f"data.root={root}: no array train_images in there (found {printable(', '.join(present)) or 'none'})"
        )
    labels = {part: _npz_labels(arrays, part, root) for part in ("train", "test")}
    test_images = arrays.get("test_images") if labels["test"] is not None else None
    return _from_arrays(root, arrays["train_images"], labels["train"], test_images, labels["test"])


def check_members(archive: zipfile.ZipFile, names: Sequence[str], max_image_pixels: int) -> None:
    """Hold what the arrays claim against what the archive holds, before there is memory for any of them.

    Raises:
        ValueError: an array holds Python objects or too large pictures, another amount than its header says, or more than
            its compressed bytes can; or all together are more than this machine's memory.
    """
    total = 0
    for name in names:
        member = archive.getinfo(f"{name}.npy")
        if member.compress_type not in (
            zipfile.ZIP_STORED,
            zipfile.ZIP_DEFLATED,
        ):  # zipfile would unpack others unbounded
            raise ValueError(f"{name} is compressed in another way than NumPy does")
        with archive.open(member) as file:
            shape, dtype = read_header(file)
            claimed = file.tell() + math.prod(shape) * dtype.itemsize
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects, whose loading would run code")
        if claimed != member.file_size or claimed > MOST_DEFLATED * member.compress_size:
            raise ValueError(f"{name} says that it is {dtype} {shape}, {claimed:,} bytes, and is not")
        if name.endswith("_images") and math.prod(shape[1:3]) > max_image_pixels:
            raise ValueError(f"{name} is {shape}: its pictures exceed data.max_image_pixels={max_image_pixels}")
        total += claimed
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if total > memory:
        raise ValueError(f"its arrays take {total / 1e9:,.1f} GB, and this machine has {memory / 1e9:,.1f}")


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of the array in an opened .npy file."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):  # 3 is for arrays with named fields
        raise ValueError(f"version {version} of NumPy's format")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def read_member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array of the archive; zipfile compares its checksum."""
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _npz_labels(arrays: dict[str, np.ndarray], part: str, root: str) -> np.ndarray | None:
    labels, pictures = arrays.get(f"{part}_labels"), arrays.get(f"{part}_images")
    if labels is None or pictures is None:
        return None
    if labels.size != len(pictures) or not np.issubdtype(labels.dtype, np.integer) or (labels < 0).any():
        raise InputError(
            f"data.root={root}: {part}_labels must hold one class number (0 or more) for each of the {len(pictures)} "
            f"pictures, got {labels.dtype} {labels.shape}"
        )
    return labels.reshape(-1).astype(np.int64)


def _cifar(dataset: str) -> Callable[[str, bool], DataSource]:
    def build(root: str, download: bool) -> DataSource:
        train, test = (torchvision_dataset(dataset, root, train=part, download=download) for part in (True, False))
        return _from_arrays(dataset, train.data, np.array(train.targets), test.data, np.array(test.targets))

    return build


def _fashion_mnist(root: str, download: bool) -> DataSource:
    train, test = (torchvision_dataset("FashionMNIST", root, train=part, download=download) for part in (True, False))
    return _from_arrays(
        "FashionMNIST", train.data.numpy(), train.targets.numpy(), test.data.numpy(), test.targets.numpy()
    )


def _stl10(root: str, download: bool) -> DataSource:
    unlabelled, train, test = (
        torchvision_dataset("STL10", root, split=split, download=download)
        for split in ("train+unlabeled", "train", "test")
    )
    pictures = {name: part.data.transpose(0, 2, 3, 1) for name, part in (("train", train), ("test", test))}
    labelled = _from_arrays("STL10", pictures["train"], train.labels, pictures["test"], test.labels)
    everything = ArrayPictures(unlabelled.data.transpose(0, 2, 3, 1), "STL10")
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
        raise InputError(f"data.root={root}: {dataset} is not there or damaged ({reason}){advice}") from error


TORCHVISION: dict[str, Callable[[str, bool], DataSource]] = {
    "cifar10": _cifar("CIFAR10"),
    "cifar100": _cifar("CIFAR100"),
    "fashion_mnist": _fashion_mnist,
    "stl10": _stl10,
}
SOURCES = ("digits", "image_folder", "images", "npz", "synthetic", *TORCHVISION)
MASKED = ("segmentation_folder", "voc2012")  # see moco.data.segmentation


def _from_arrays(
    what: str,
    train_images: np.ndarray,
    train_labels: np.ndarray | None,
    test_images: np.ndarray | None,
    test_labels: np.ndarray | None,
) -> DataSource:
    for images, labels in ((train_images, train_labels), (test_images, test_labels)):
        if images is not None and labels is not None and len(images) != len(labels):
            raise InputError(f"{what}: {len(images)} pictures and {len(labels)} labels")
    train = ArrayPictures(train_images, f"{what}: train_images")
    bank = None if train_labels is None else Labelled(train, np.asarray(train_labels, dtype=np.int64))
    queries = None
    if test_images is not None and test_labels is not None:
        test = ArrayPictures(test_images, f"{what}: test_images")
        queries = Labelled(test, np.asarray(test_labels, dtype=np.int64))
    return DataSource(train, bank, queries, image_size=max(train.tensor.shape[1:3]))


def _classified(root: Path) -> tuple[list[str], list[str]]:
    """Paths below root and the class of each: the name of its first sub-folder."""
    paths = [path for path in list_pictures(root) if Path(path).parent != root]
    if not paths:
        raise InputError(f"data.root={root}: no class sub-folders with pictures; data=images takes a plain folder tree")
    return paths, [Path(path).relative_to(root).parts[0] for path in paths]


def _numbered(classes: list[str], names: list[str], root: Path) -> np.ndarray:
    """Each class's place in `names`, (M,) int64."""
    unknown = sorted(set(classes) - set(names))
    if unknown:
        raise InputError(
            f"data.root={root}: classes that the training pictures do not have: {printable(', '.join(unknown))}"
        )
    place = {name: number for number, name in enumerate(names)}
    return np.array([place[name] for name in classes], dtype=np.int64)
