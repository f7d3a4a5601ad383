"""The datasets by name: `build_source` turns the name and the settings of a dataset into images."""

from pathlib import Path
from typing import Any

from moco.data.files.images import MAX_IMAGE_PIXELS
from moco.data.sources.arrays import (
    TORCHVISION_CLASSES,
    digits_source,
    npz_source,
    synthetic_source,
    torchvision_source,
)
from moco.data.sources.folders import class_folder_source, folder_source
from moco.data.sources.hugging_face import hugging_face_source
from moco.data.sources.packed_copy import packed_source
from moco.data.sources.shards import sharded_source
from moco.data.sources.source import DataSource
from moco.errors import InputError, unknown_name

SOURCES = (
    "digits",
    "hf",
    "image_folder",
    "images",
    "npz",
    "packed",
    "synthetic",
    "webdataset",
    *TORCHVISION_CLASSES,
)
# moco.segmentation builds these, which have a mask for each image.
MASKED = ("segmentation_folder", "voc2012")


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
    """Return the dataset `name`.

    Args:
        root: folder or file; ``images`` and ``webdataset`` also take a list.
        download: let torchvision download what is missing below `root`.
        num_images: size of ``synthetic`` (default 1,024), or number of samples in all shards of
            ``webdataset`` (default: they are counted).
        streams, shuffle_buffer: see `moco.data.sources.shards.ShardedImages`.
        image_column, label_column: see `moco.data.sources.hugging_face`.
        max_image_pixels: larger images are unreadable.
        held_out: fraction of the images that ``image_folder`` keeps out of the bank if there is no
            validation folder.
        pages: ``first`` takes the first image of a TIFF file, ``each`` takes every image of it.
        listing: file that keeps the list of images for the next start; None lists them each time.

    Raises:
        InputError: the name is unknown, or `root` does not hold what is expected there.
    """
    if name in MASKED:
        raise InputError(
            f"data={name}: its masks are for moco.segment and evaluation=dense; "
            "data=images data.root=PATH takes any images"
        )
    if name not in SOURCES:
        raise InputError(f"data.name: {unknown_name('dataset', name, SOURCES)}")
    if name == "synthetic":
        return synthetic_source(num_images or 1024)
    if name == "digits":
        return digits_source()
    if root is None:
        raise InputError(f"data.root: missing; data={name} needs data.root=PATH")
    if name == "images":
        return folder_source(root, max_image_pixels, pages, listing)
    if name == "webdataset":
        return sharded_source(root, streams, shuffle_buffer, num_images, max_image_pixels)
    if not isinstance(root, str):
        several = "only data=images and data=webdataset take several"
        raise InputError(f"data.root={root}: expected one path; {several}")
    if name == "packed":
        return packed_source(root, max_image_pixels)
    if name == "hf":
        return hugging_face_source(root, image_column, label_column, max_image_pixels)
    if name == "image_folder":
        return class_folder_source(root, max_image_pixels, held_out, pages, listing)
    if name == "npz":
        return npz_source(root)
    return torchvision_source(name, root, download)
