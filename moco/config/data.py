"""The settings of image sources, shared by the programs that read images."""

from dataclasses import dataclass
from typing import Any, Optional

from omegaconf import MISSING

from moco.config.settings import setting


@dataclass
class ImageSourceConfig:
    """Which images, and how they are read."""

    name: str = MISSING
    """A source of ``moco.data.sources.registry``, or a name of `moco.register_source`."""
    root: Any = None
    """A folder or a file. ``images`` also takes a list of folders."""
    target: Optional[str] = None
    """``custom``: the function that makes the dataset, ``package.module:function``."""
    options: Any = None
    """``custom`` and registered datasets: keyword arguments of the function, ``{name: value}``."""
    download: bool = False
    """Download a torchvision dataset that is not under root yet."""
    labels: Optional[str] = None
    """``images`` and ``image_folder``: a table of text (CSV) with a name and a class in each line,
    in place of class folders. See ``docs/data.md``."""
    held_out: float = setting(0.1, at_least=0, at_most=1)
    """``image_folder`` without a validation folder, ``images`` with labels, ``custom`` without bank
    and queries, ``hdf5`` and ``zarr`` with labels: share of the images that are held out as the
    queries of the kNN monitor. A hash of the path decides, or of the number of an image without
    one, so an image keeps its side when others are added. Training uses all images."""
    pages: str = setting("first", choices=("channels", "each", "first"))
    """``images`` and ``image_folder``, files with several pages: first: read the first page. each:
    each page is an image of its own. channels: join the pages as bands."""
    bands: Any = None
    """Bands to take, in this order: numbers from 1, or names where the files have them, such as
    ``[4, 3, 2, 8]``. Null: all; 8-bit images of one, three or four channels become RGB."""
    band_files: Optional[str] = None
    """``images`` and ``image_folder``: join files that hold one band each. A template of their
    names below the root, such as ``{id}_B{band}.tif``: {id} stands for the name of an image, {band}
    for that of a band. data.bands then names the bands to join, in this order; null joins all.
    Bands of another size are resampled to the first one."""
    tile: Optional[int] = setting(None, at_least=4)
    """``images`` and ``image_folder``: read windows of this side of large rasters as images, px.
    Null: whole images."""
    value_range: Any = None
    """``[low, high]``: the values that become 0 and 1; or such a pair for each band. Null: 0 to 255
    for 8-bit images. Other images need it; ``moco.stats`` measures it."""
    nodata: Optional[float] = None
    """The value of pixels without data. They become the mean, as NaN does. Null: what the file
    says, if it says it."""
    dicom_window: bool = False
    """DICOM: apply the window that the file proposes for display."""
    num_images: Optional[int] = setting(None, at_least=1)
    """Size of ``synthetic`` (null: 1,024). Number of samples in all shards of ``webdataset``
    (null: they are counted, if the shards are files). Number of images that an iterable dataset of
    ``custom`` yields (null: its length, or they are counted)."""
    image_column: Optional[str] = None
    """``hf``: null is the only column of type Image."""
    label_column: Optional[str] = None
    """``hf``: null is the only column of type ClassLabel, if there is one."""
    image_key: Optional[str] = None
    """``hdf5``, ``zarr``: the array of the images. Null: the only one of three or four axes."""
    label_key: Optional[str] = None
    """``hdf5``, ``zarr``: the array of the class numbers. Null: there are no labels."""
    max_bad_fraction: float = setting(0.01, at_least=0, at_most=1)
    """The run stops when more than this share of the images is unreadable."""
    max_image_pixels: int = setting(178_956_970, at_least=1)
    """An image with more pixels counts as unreadable. The header decides, because a small file can
    claim any size. The default is Pillow's own limit; such an image takes half a gigabyte."""


@dataclass
class DisplayConfig:
    """How previews and plots show images that are not 8-bit RGB."""

    bands: Any = None
    """One or three of the bands that the model gets: grey, or red, green and blue. Numbers from 1,
    or names, as in data.bands. They are stretched from their 2nd to their 98th percentile. Null:
    the first three, or the only one."""


@dataclass
class DataConfig(ImageSourceConfig):
    """The images of a pretraining, and how batches are made of them."""

    image_size: Optional[int] = setting(None, at_least=4)
    """Side of the square views, px. Null: the dataset's own size."""
    group: Any = None
    """Which images belong together, such as those of one place. A regular expression with a part
    ``(?P<group>...)`` that is searched for in each name; the number of a folder level, 1 for the
    first folder below the root; or ``{csv: FILE}``, a table with the columns name and group. Names
    are relative to the root."""
    pair: str = setting("same", choices=("group", "mixed", "same"))
    """Where the key view comes from. same: the query's own image. group: another image of the
    query's group. mixed: such an image in half of the draws."""
    crop_ratio: float = setting(1.0, above=0, at_most=1)
    """Evaluation: side of the centre crop over the resized shorter side (ImageNet: 0.875)."""
    batch_size: int = setting(256, at_least=1)
    """Images per optimizer step, over all devices and accumulated batches."""
    engine: str = setting("auto", choices=("auto", "worker", "batch"))
    """Who augments. worker: the loader processes, image by image. batch: the device, batch by
    batch; the loader processes still decode and crop files. auto: worker for an augmentation of the
    user's that takes one image at a time; else batch for small images in memory and on a GPU; else
    worker."""
    num_workers: int = setting(4, at_least=0)
    """Loader processes per device. 0 loads in the training process. Results do not depend on it."""
    streams: int = setting(12, at_least=1)
    """``webdataset``: number of streams of each process. Batches come from them in turn, and
    num_workers has to divide them."""
    shuffle_buffer: int = setting(500, at_least=1)
    """``webdataset``: number of samples of each stream among which the next one is drawn. They are
    held in memory, encoded."""


@dataclass
class PackDataConfig(ImageSourceConfig):
    """The images of a packed copy."""

    resize: Optional[int] = setting(None, at_least=4)
    """Shorter side of the copy's images, px. Smaller images keep their size. Null: all do."""
    num_workers: int = setting(4, at_least=0)
    """Processes that read and encode. The copy does not depend on it."""


@dataclass
class StatsDataConfig(ImageSourceConfig):
    """The images that are measured."""

    num_workers: int = setting(4, at_least=0)
    """Processes that read the images. The figures do not depend on it."""


@dataclass
class PretrainedDataConfig(ImageSourceConfig):
    """The images that a pretrained backbone sees.

    A null takes the value of the run that made the checkpoint, or a default for weights of other
    projects.
    """

    name: Optional[str] = None  # type: ignore[assignment]
    image_size: Optional[int] = setting(None, at_least=4)
    """Side of the square images that the backbone sees, px."""
    crop_ratio: Optional[float] = setting(None, above=0, at_most=1)
    """Side of the centre crop over the resized shorter side (ImageNet: 0.875)."""
    held_out: Optional[float] = setting(None, at_least=0, at_most=1)  # type: ignore[assignment]
    pages: Optional[str] = setting(  # type: ignore[assignment]
        None, choices=("channels", "each", "first")
    )
    dicom_window: Optional[bool] = None  # type: ignore[assignment]


@dataclass
class EvaluateDataConfig(PretrainedDataConfig):
    """The images of a measurement."""

    num_workers: int = setting(0, at_least=0)
    """Loader processes. 0 loads in the program's own process. The results do not depend on it."""
    ignore_index: int = setting(255, at_least=0, at_most=65535)
    """``voc2012`` and ``segmentation_folder``: the number of mask pixels without a class."""


@dataclass
class EmbedDataConfig(PretrainedDataConfig):
    """The images that features are computed of."""

    num_workers: Optional[int] = setting(None, at_least=0)
    """Loader processes. Null: 4, or the number of cores if that is smaller; none for images in
    memory."""
