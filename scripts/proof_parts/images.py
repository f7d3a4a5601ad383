"""The images of the proof: tiles to pretrain on, and the held-out part of a dataset."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from moco.segmentation.inference import window_starts

NUM_SHARES = 4
"""Classes of tiles in a dataset with two classes of pixels."""
IMAGE_FOLDER = "tiny_imagenet"
"""A source whose images have classes and no masks, in the layout image_folder."""


def tiles_of(pixels: np.ndarray, side: int) -> list[np.ndarray]:
    """Cut an image into square tiles that cover it. The last row and column may overlap others.

    Args:
        pixels: (height, width, ...), both at least `side`.
        side: of the tiles, px.
    """
    tiles = []
    for top in window_starts(pixels.shape[0], side, side):
        for left in window_starts(pixels.shape[1], side, side):
            tiles.append(pixels[top : top + side, left : left + side])
    return tiles


def tiles_of_part(root: Path, part: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the tiles of one part of a segmentation folder.

    Returns:
        Images (M, side, side, 3) and masks (M, side, side), uint8.
    """
    images: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    for path in sorted((root / "images" / part).iterdir()):
        mask_path = root / "masks" / part / f"{path.stem}.png"
        with Image.open(path) as image, Image.open(mask_path) as mask:
            images += tiles_of(np.asarray(image.convert("RGB")), side)
            masks += tiles_of(np.asarray(mask), side)
    return np.stack(images), np.stack(masks)


def classes_of_tiles(
    masks: np.ndarray, held_out_masks: np.ndarray, ignore_index: int = 255
) -> tuple[np.ndarray, np.ndarray]:
    """Return one class for every tile, so that image-level kNN has something to predict.

    With more than two classes of pixels it is the class of most pixels. With two, nearly all tiles
    would have the class of the background. Their class is the quarter of the training tiles into
    which their share of the foreground falls.

    Args:
        masks: (M, side, side) of the training tiles.
        held_out_masks: (Q, side, side) of the others.
        ignore_index: the number of pixels without a class.

    Returns:
        (M,) and (Q,) int64.
    """
    num_classes = int(masks[masks != ignore_index].max()) + 1
    if num_classes > 2:
        return most_frequent(masks, num_classes), most_frequent(held_out_masks, num_classes)
    shares = (masks == 1).mean(axis=(1, 2))
    inner = np.arange(1, NUM_SHARES) / NUM_SHARES
    limits = np.quantile(shares, inner)
    held_out_shares = (held_out_masks == 1).mean(axis=(1, 2))
    return np.searchsorted(limits, shares), np.searchsorted(limits, held_out_shares)


def most_frequent(masks: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the class of most pixels of each mask; the first class if no pixel has one."""
    counts = np.empty((len(masks), num_classes), dtype=np.int64)
    for number in range(num_classes):
        counts[:, number] = (masks == number).sum(axis=(1, 2))
    return counts.argmax(axis=1)


def write_tiles(data: Path, sources: Sequence[str], side: int, path: Path) -> None:
    """Write the tiles of some datasets as an archive that ``data=npz`` reads, once.

    It holds the tiles of the training images, those of the images in ``val``, and a class for each,
    see `classes_of_tiles`.
    """
    if path.exists():
        return
    parts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for part in ("train", "val"):
        images = []
        masks = []
        for source in sources:
            of_source = tiles_of_part(data / source, part, side)
            images.append(of_source[0])
            masks.append(of_source[1])
        parts[part] = np.concatenate(images), np.concatenate(masks)
    train_labels, test_labels = classes_of_tiles(parts["train"][1], parts["val"][1])
    path.parent.mkdir(parents=True, exist_ok=True)
    half_written = path.with_name(f"half_written_{path.name}")
    np.savez(
        half_written,
        train_images=parts["train"][0],
        train_labels=train_labels,
        test_images=parts["val"][0],
        test_labels=test_labels,
    )
    half_written.rename(path)


def num_training_images(path: Path) -> int:
    """Return how many images an archive of `write_tiles` trains on, or an image_folder."""
    if path.is_dir():
        return sum(1 for _ in (path / "train").glob("*/*"))
    with np.load(path) as arrays:
        return len(arrays["train_labels"])


def link_held_out(root: Path, part: str, folder: Path) -> None:
    """Make a segmentation folder of links whose only part is the held-out one.

    Programs take ``val`` as held out where it is there, so ``test`` needs a folder of its own.
    """
    for kind in ("images", "masks"):
        link = folder / kind / part
        if not link.is_symlink():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((root / kind / part).resolve(), target_is_directory=True)
    names = root / "classes.txt"
    if names.exists() and not (folder / names.name).is_symlink():
        (folder / names.name).symlink_to(names.resolve())
