"""The datasets by name: `build_source` turns the name and the settings of a dataset into images."""

from collections.abc import Callable
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
from moco.data.sources.own_dataset import dataset_source, named
from moco.data.sources.packed_copy import packed_source
from moco.data.sources.shards import sharded_source
from moco.data.sources.source import DataSource
from moco.data.sources.stored_arrays import hdf5_source, is_npy, npy_source, zarr_source
from moco.errors import InputError, unknown_name
from moco.targets import GIVEN, check_options, import_target

SOURCES = (
    "custom",
    "digits",
    "hdf5",
    "hf",
    "image_folder",
    "images",
    "npz",
    "packed",
    "synthetic",
    "webdataset",
    "zarr",
    *TORCHVISION_CLASSES,
)
# moco.segmentation builds these, which have a mask for each image.
MASKED = ("segmentation_folder", "voc2012")
# Added by `register_source`.
REGISTERED: dict[str, Callable[..., Any]] = {}


def register_source(name: str, build: Callable[..., Any]) -> None:
    """Make a function known as ``data.name=NAME``.

    A checkpoint holds the name alone, so the function has to be registered before it is evaluated.

    Args:
        name: not that of a dataset of this project.
        build: takes the settings that `DataConfig.options` holds, and returns a dataset or a
            mapping of datasets, see `moco.data.sources.own_dataset.dataset_source`.

    Raises:
        InputError: this project has a dataset of that name.

    Example:
        >>> import moco
        >>> moco.register_source("my_images", lambda size=100: torchvision.datasets.FakeData(size))
    """
    if name in (*SOURCES, *MASKED):
        raise InputError(f"data.name={name}: this project has a dataset of that name")
    REGISTERED[name] = build


def build_source(
    name: str,
    root: Any = None,
    *,
    target: str | None = None,
    options: dict[str, Any] | None = None,
    download: bool = False,
    num_images: int | None = None,
    streams: int = 12,
    shuffle_buffer: int = 500,
    image_column: str | None = None,
    label_column: str | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    held_out: float = 0.1,
    pages: str = "first",
    bands: Any = None,
    band_files: str | None = None,
    tile: int | None = None,
    labels: str | None = None,
    listing: Path | None = None,
) -> DataSource:
    """Return the dataset `name`, its images as they are in the files.

    Args:
        root: folder or file; ``images`` and ``webdataset`` also take a list.
        target: ``package.module:function`` that makes the dataset ``custom``.
        options: keyword arguments of the function of ``custom`` or of a registered dataset.
        download: let torchvision download what is missing below `root`.
        num_images: size of ``synthetic`` (default 1,024), number of samples in all shards of
            ``webdataset`` (default: they are counted), or number of images of an iterable dataset
            (default: its length, or they are counted).
        streams, shuffle_buffer: see `moco.data.sources.shards.ShardedImages`.
        image_column, label_column: see `moco.data.sources.hugging_face`.
        image_key, label_key: see `moco.data.sources.stored_arrays.stored_source`.
        max_image_pixels: larger images are unreadable.
        held_out: fraction of the images that ``image_folder`` keeps out of the bank if there is no
            validation folder, ``images`` with `labels`, ``custom`` if there are no bank and
            queries, and ``hdf5`` and ``zarr`` if there are labels.
        bands: the names of the bands to read of `band_files`; other sources read all bands.
        band_files: ``images`` and ``image_folder`` whose bands are in files of their own, see
            `moco.data.sources.band_files`.
        tile: ``images`` and ``image_folder``: side of the windows of large rasters, px, see
            `moco.data.sources.tiles`.
        pages: ``first`` takes the first image of a TIFF file, ``each`` takes every image of it.
        labels: a file with the classes of ``images`` and ``image_folder``, see
            `moco.data.sources.label_files`.
        listing: file that keeps the list of images for the next start; None lists them each time.

    Raises:
        InputError: the name is unknown, or `root` does not hold what is expected there.
    """
    if name in MASKED:
        raise InputError(
            f"data={name}: its masks are for moco.segment and evaluation=dense; "
            "data=images data.root=PATH takes any images"
        )
    if name == GIVEN:
        raise InputError(
            "data: the images of the run were given in Python; give data=NAME, or data=custom "
            "data.target=package.module:function"
        )
    if name not in SOURCES and name not in REGISTERED:
        raise InputError(f"data.name: {unknown_name('dataset', name, (*SOURCES, *REGISTERED))}")
    if labels is not None and name not in ("images", "image_folder"):
        raise InputError(
            f"data.labels={labels}: data={name} has no such setting; "
            "data=images and data=image_folder have it"
        )
    if name == "custom" or name in REGISTERED:
        if root is not None:
            raise InputError(
                f"data.root={root}: data={name} has no such setting; "
                "give it to the function: data.options={root: PATH}"
            )
        datasets, what, where = own_datasets(name, target, options)
        return dataset_source(
            datasets,
            what=what,
            where=where,
            num_images=num_images,
            held_out=held_out,
            max_image_pixels=max_image_pixels,
        )
    for key, value in (("target", target), ("options", options)):
        if value is not None:
            raise InputError(
                f"data.{key}={value}: data={name} has no such setting; data=custom has it"
            )
    check_parts_of_images(name, band_files, tile, pages)
    if name == "synthetic":
        return synthetic_source(num_images or 1024)
    if name == "digits":
        return digits_source()
    if root is None:
        raise InputError(f"data.root: missing; data={name} needs data.root=PATH")
    if name == "images":
        return folder_source(
            root, max_image_pixels, held_out, pages, listing, labels, band_files, bands, tile
        )
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
        return class_folder_source(
            root, max_image_pixels, held_out, pages, listing, labels, band_files, bands, tile
        )
    if name == "npz":
        if is_npy(root):
            return npy_source(root, max_image_pixels)
        return npz_source(root)
    if name in ("hdf5", "zarr"):
        build = hdf5_source if name == "hdf5" else zarr_source
        return build(
            root,
            max_image_pixels=max_image_pixels,
            image_key=image_key,
            label_key=label_key,
            held_out=held_out,
        )
    return torchvision_source(name, root, download)


def check_parts_of_images(name: str, band_files: str | None, tile: int | None, pages: str) -> None:
    """Raise InputError if images are to be joined or cut in a way that a dataset does not have."""
    for key, value in (("band_files", band_files), ("tile", tile)):
        if value is not None and name not in ("images", "image_folder"):
            raise InputError(
                f"data.{key}={value}: data=images and data=image_folder have it; "
                f"data={name} does not"
            )
    if tile is None:
        return
    if band_files is not None:
        raise InputError(f"data.tile={tile}: does not go with data.band_files={band_files}")
    if pages != "first":
        raise InputError(f"data.tile={tile}: does not go with data.pages={pages}")


def own_datasets(
    name: str, target: str | None, options: dict[str, Any] | None
) -> tuple[Any, str, str]:
    """Call the function that makes a dataset of the user's own.

    Args:
        name: ``custom``, or a registered name.
        target, options: see `build_source`.

    Returns:
        What the function returns, what to call it in names of images, and what in errors.

    Raises:
        InputError: there is no such function, it takes no such options, or it raises an error.
    """
    if options is None:
        options = {}
    if not isinstance(options, dict):
        raise InputError(f"data.options={options}: expected {{name: value}}")
    if name == "custom":
        if target is None:
            raise InputError(
                "data.target: missing; data=custom needs data.target=package.module:function"
            )
        what, where = target, f"data.target={target}"
        build = import_target(target, "data.target")
    else:
        if target is not None:
            raise InputError(f"data.target={target}: data={name} has no such setting")
        what, where = name, f"data.name={name}"
        build = REGISTERED[name]
    check_options(build, options, "data", what)
    try:
        return build(**options), what, where
    except InputError:
        raise
    except Exception as error:  # whatever the user's function does
        raise InputError(f"{where}: raised {named(error)}") from error
