"""The folder of predicted masks: files by name, each whole or absent, and what they belong to."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from moco.errors import InputError, printable
from moco.runs.atomic_files import remove_half_written, write_atomically
from moco.runs.config_changes import flattened
from moco.runs.folder_lock import locked
from moco.segmentation.comparison_plot import class_colours

MASKS, OVERLAYS, PROBABILITIES = "masks", "overlays", "probabilities"
LEGEND = "classes.json"
RECORD = "predict.json"
"""What the masks belong to: settings, weights and data, as plain data."""
LOCK = ".lock"
CHECKPOINT = "checkpoint"
TYPED_NAMES = {
    "weights": CHECKPOINT,
    "inference.mode": "inference",
    "inference.window": "image_size",
    "inference.blend": "blend",
    "inference.scales": "tta_scales",
    "inference.flip": "tta_flip",
    "inference.batch_size": "batch_size",
    "inference.max_forward_pixels": "max_forward_pixels",
}
"""The settings of ``moco.predict`` that decide what stands in the record."""
KINDS = ("none", "npz", "tiff")
"""How probabilities are written."""
NUM_COLOURS = 256  # of a palette
LARGEST_IN_MEMORY = 2**28
"""Bytes of an array; a larger one is a file while it is filled."""
TIFF_SCALE = 65535
"""The value of probability 1 in a TIFF file."""
OVERLAY_SHARE = 0.5
"""How much of an overlay is the colour of the class."""
JPEG_QUALITY = 90


class Arrays(NamedTuple):
    """What is predicted for an image."""

    classes: np.ndarray
    """(height, width) uint8, or uint16 with more than 256 classes."""
    probabilities: np.ndarray | None
    """(classes, height, width): float16 for npz, uint16 for tiff; None: they are not wanted."""


class MaskFolder:
    """The files of a prediction.

    ``masks/NAME.png`` is an index PNG, ``overlays/NAME.jpg`` shows image and mask,
    ``probabilities/NAME.npz`` (or ``.tif``) holds the probabilities.

    Args:
        folder: where they are.
        class_names: one for each class.
        probabilities: one of `KINDS`.
        overlays: whether overlays are written.
    """

    def __init__(
        self, folder: Path, class_names: Sequence[str], probabilities: str, *, overlays: bool
    ) -> None:
        self.folder = folder
        self.class_names = class_names
        self.kind = probabilities
        self.overlays = overlays
        self.colours = class_colours(len(class_names)).numpy()  # (classes + 1, 3), last: no class
        self.class_type = np.dtype(np.uint8 if len(class_names) <= NUM_COLOURS else np.uint16)

    def mask(self, name: str) -> Path:
        """Return the file of a mask, by the name without its ending."""
        return self.folder / MASKS / f"{name}.png"

    def files(self, name: str) -> list[Path]:
        """Return all files of an image; the mask is last, which is written last."""
        files = []
        if self.kind != "none":
            ending = {"npz": "npz", "tiff": "tif"}[self.kind]
            files.append(self.folder / PROBABILITIES / f"{name}.{ending}")
        if self.overlays:
            files.append(self.folder / OVERLAYS / f"{name}.jpg")
        return [*files, self.mask(name)]

    def is_done(self, name: str) -> bool:
        """Return whether all files of an image are there."""
        return all(path.exists() for path in reversed(self.files(name)))

    def empty_arrays(self, size: tuple[int, int]) -> Arrays:
        """Return memory for what is predicted for an image of (height, width) px."""
        classes = self._empty(size, self.class_type)
        if self.kind == "none":
            return Arrays(classes, None)
        dtype = np.dtype({"npz": np.float16, "tiff": np.uint16}[self.kind])
        return Arrays(classes, self._empty((len(self.class_names), *size), dtype))

    def _empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        if np.prod(shape) * dtype.itemsize <= LARGEST_IN_MEMORY:
            return np.empty(shape, dtype)
        # The file has no name any more, so nothing of it stays, however the program ends.
        with tempfile.TemporaryFile(dir=self.folder) as file:
            return np.memmap(file, dtype, "w+", shape=shape)

    def stored(self, probabilities: np.ndarray) -> np.ndarray:
        """Return probabilities from 0 to 1 in the type and scale in which they are written."""
        if self.kind == "npz":
            return probabilities.astype(np.float16)
        return np.rint(probabilities * TIFF_SCALE).astype(np.uint16)

    def write(self, name: str, arrays: Arrays, overlay: np.ndarray | None) -> None:
        """Write the files of an image, each completely or not at all.

        Args:
            name: without its ending.
            arrays: what is predicted.
            overlay: (height, width, 3) uint8; None: no overlay is wanted.
        """
        for path in self.files(name):
            if path.suffix == ".npz":
                write = partial(write_npz, arrays=arrays, class_names=self.class_names)
            elif path.suffix == ".tif":
                write = partial(write_tiff, arrays=arrays)
            elif path.suffix == ".jpg":
                assert overlay is not None
                write = partial(write_jpeg, pixels=overlay)
            else:
                write = partial(write_mask, classes=arrays.classes, colours=self.colours)
            write_atomically(path, write)

    def write_legend(self) -> None:
        """Write number, name and colour of each class."""
        rows = []
        for number, name in enumerate(self.class_names):
            colour = self.colours[number].tolist()
            rows.append({"number": number, "name": name, "colour": colour})
        text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
        content = text.encode("utf-8", "surrogateescape")
        write_atomically(self.folder / LEGEND, lambda file: file.write(content))

    @contextmanager
    def taken(self, about: Mapping[str, Any]) -> Iterator[None]:
        """Make the folder if it is missing, and hold it for this process inside the block.

        Args:
            about: what the masks depend on, as plain data.

        Raises:
            InputError: another process works there, or the folder holds something else, or masks of
                other settings.
        """
        check_is_ours(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        # As it will be read back: JSON turns tuples into lists.
        about = json.loads(json.dumps(about))
        record = self.folder / RECORD
        with locked(self.folder / LOCK, f"output={self.folder}"):
            if record.exists():
                check_same(self.folder, json.loads(record.read_text()), about)
            for kind in (MASKS, OVERLAYS, PROBABILITIES):
                for parent, _, _ in os.walk(self.folder / kind):
                    remove_half_written(Path(parent))
            text = json.dumps(about, indent=1) + "\n"
            write_atomically(record, lambda file: file.write(text.encode()))
            self.write_legend()
            yield


def check_is_ours(folder: Path) -> None:
    """Raise InputError if something else than masks is in a folder, or it cannot be written."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"output={printable(str(folder))}: a file; expected a folder")
    there = sorted(path.name for path in folder.iterdir() if path.name != LOCK)
    is_half_written = all(name.startswith(f".{RECORD}.") for name in there)
    if RECORD not in there and not is_half_written:
        raise InputError(
            f"output={printable(str(folder))}: holds something else ({printable(there[0])}); "
            "choose a new folder"
        )


def check_same(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise InputError if the masks in a folder are of other settings, weights or data."""
    old, new = as_typed(there), as_typed(here)
    for key in sorted(old | new):
        if old.get(key) == new.get(key):
            continue
        what = f"{key}: {in_yaml(old.get(key))} there, {in_yaml(new.get(key))} here"
        if key == CHECKPOINT:
            what = f"{key}: other weights"
        raise InputError(
            f"output={printable(str(folder))} holds masks of another prediction ({what}); "
            "choose another output"
        )


def as_typed(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what masks depend on under the names of the settings of ``moco.predict``.

    Args:
        about: as `RECORD` holds it.
    """
    typed = {}
    for key, value in flattened(about).items():
        name = TYPED_NAMES.get(key, key)
        if key.startswith("values."):
            name = f"{key.removeprefix('values.')} of the images"
        typed[name] = value
    scales, flip = typed.pop("tta_scales", [1.0]), typed.pop("tta_flip", False)
    typed["tta"] = flip or scales != [1.0]
    if typed["tta"]:
        typed |= {"tta_scales": scales, "tta_flip": flip}
    return typed


def in_yaml(value: Any) -> str:
    """Return a plain value as a user types it: true, null, a number, a text or a list."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def write_mask(file: BinaryIO, classes: np.ndarray, colours: np.ndarray) -> None:
    """Write class numbers as PNG: with a palette, or as 16-bit grey if there are more than 256.

    Numbers that are no class are grey in the palette.

    Args:
        classes: (height, width) uint8 or uint16.
        colours: (classes + 1, 3) uint8, the last one for no class.
    """
    image = Image.fromarray(classes)
    if classes.dtype == np.uint8:
        palette = np.tile(colours[-1], (NUM_COLOURS, 1))
        palette[: len(colours) - 1] = colours[:-1]
        image.putpalette(palette.tobytes())
    image.save(file, "PNG")


def write_npz(file: BinaryIO, arrays: Arrays, class_names: Sequence[str]) -> None:
    """Write ``probabilities`` (classes, height, width) float16 and ``class_names`` (classes,)."""
    assert arrays.probabilities is not None
    names = np.array(class_names)
    np.savez_compressed(file, probabilities=arrays.probabilities, class_names=names)


def write_tiff(file: BinaryIO, arrays: Arrays) -> None:
    """Write probabilities as one 16-bit page for each class, of which 65535 is 1."""
    import tifffile

    tifffile.imwrite(
        file, arrays.probabilities, photometric="minisblack", compression="zlib", metadata=None
    )


def write_jpeg(file: BinaryIO, pixels: np.ndarray) -> None:
    """Write an image (height, width, 3) uint8."""
    Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY)


def overlay_of(shown: np.ndarray, classes: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Return an image with the colours of its classes laid over it, (height, width, 3) uint8.

    Class 0, which is black in the palette and often the background, shows the image as it is. The
    other regions are mixed with their colour, and their edges are drawn in it.

    Args:
        shown: (height, width, 3) uint8.
        classes: (height, width) class numbers.
        colours: (classes + 1, 3) uint8.
    """
    shares = np.where(is_edge(classes), 1.0, OVERLAY_SHARE)
    shares[classes == 0] = 0
    mixed = shown + shares[..., None] * (colours[classes].astype(np.float64) - shown)
    return np.rint(mixed).astype(np.uint8)


def is_edge(classes: np.ndarray) -> np.ndarray:
    """Return which pixels have a neighbour above, below or beside of another class, as bool."""
    edge = np.zeros(classes.shape, bool)
    below = classes[1:] != classes[:-1]
    edge[1:] |= below
    edge[:-1] |= below
    beside = classes[:, 1:] != classes[:, :-1]
    edge[:, 1:] |= beside
    edge[:, :-1] |= beside
    return edge
