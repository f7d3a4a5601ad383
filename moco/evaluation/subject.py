"""What a measurement of frozen features is given, and what it gives back."""

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL
import torch
from rich.box import SQUARE
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

import moco
from moco.data.augment.views import EvaluationView
from moco.data.loading.every_image import evaluation_loader, num_images
from moco.data.sources.own_dataset import DatasetImages, IterableImages
from moco.data.sources.pixel_values import PixelValues
from moco.data.sources.registry import build_source
from moco.data.sources.sample import prepare_source
from moco.data.sources.shards import ShardedImages
from moco.data.sources.source import DataSource, Labelled
from moco.errors import InputError, encodable, printable
from moco.evaluation.feature_cache import Arrays, FeatureCache
from moco.evaluation.features import embed
from moco.evaluation.image_names import first_names, skip_unreadable
from moco.evaluation.reports.embedded import Embedded
from moco.phases import counted

log = logging.getLogger(__name__)

SOURCE_SETTINGS = (
    "target",
    "options",
    "download",
    "num_images",
    "image_column",
    "label_column",
    "image_key",
    "label_key",
    "labels",
    "max_image_pixels",
    "held_out",
    "pages",
    "band_files",
    "tile",
)
"""The settings of the data that `build_source` takes, beside name and root."""


@dataclass
class Findings:
    """The outcome of a measurement."""

    title: str
    """Of the table."""
    scores: Mapping[str, float | None]
    """Shown with four decimals, and written to ``metrics.json``."""
    protocol: Mapping[str, Any]
    """The conditions of the scores, shown in words and written as they are."""
    details: Mapping[str, Any]
    """Written to ``metrics.json``, not shown."""
    tables: list[Table]
    """Printed below the table of scores and protocol."""
    headline: str = ""
    """The result in one line, printed first."""
    plots: dict[str, Callable[[BinaryIO], object]] = field(default_factory=dict)
    """For the report beside the figures: a function that writes each, by file name."""
    files: dict[str, Callable[[BinaryIO], object]] = field(default_factory=dict)
    """For the run folder: a function that writes each, by file name."""


def table_of(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    texts: Collection[str] = ("class",),
) -> Table:
    """Return a table in the style of all closing tables: numbers are aligned to the right.

    Args:
        title: begins with a capital letter, unless its first word is a name such as kNN.
        columns: their names.
        rows: the cells of each row.
        texts: names of the columns that hold text, which is aligned to the left.
    """
    shown_title = Text(encodable(title), "table.title")
    table = Table(title=shown_title, title_justify="left", box=SQUARE)
    for name in columns:
        is_text = name in texts
        table.add_column(Text(encodable(name)), justify="left" if is_text else "right")
    for row in rows:
        # As `Text`, because rich would take the brackets of a name for its markup.
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    return table


@dataclass
class Subject:
    """A frozen encoder, the images, and the settings of the measurement.

    Args:
        encoder: in eval mode, on `device`; a module with ``encode(images)``. An `Encoder` has a
            projector, too.
        data: `EvaluateDataConfig` as plain data, nulls filled in; `image_size` may be null until
            `source` is built.
        augmentation: mean and std of the normalisation.
        settings: `EvaluationConfig` as plain data, nulls filled in.
        at_data: called with the side of the images in px and their bands as soon as they are known.
    """

    encoder: Any
    data: dict[str, Any]
    augmentation: dict[str, Any]
    settings: dict[str, Any]
    device: torch.device
    folder: Path
    """The run folder of this measurement."""
    checkpoint: Path | None
    """None: a network with random weights."""
    backbone: dict[str, Any]
    """The arguments of `build_backbone` that make the encoder's backbone."""
    at_data: Callable[[int, int], None] = lambda image_size, bands: None
    shown_bands: Any = None
    """The setting ``preview.bands``."""
    pair: dict[str, Any] = field(default_factory=dict)
    """``query`` and ``key``: the operations of the run's two views; empty if the checkpoint does
    not name them."""
    num_steps: int = 0
    """Optimizer steps of the checkpoint; 0 if it does not say them."""

    @cached_property
    def source(self) -> DataSource:
        """Build the dataset, and fill in the image size.

        Raises:
            InputError: there is no such dataset.
        """
        source = build_source_of(self.data, self.augmentation["mean"], self.shown_bands)
        # The advice on attention windows needs the size, which only the dataset may know.
        values = source.train.values
        assert values is not None  # `build_source_of` sets them
        self.at_data(self.data["image_size"], values.bands)
        return source

    @property
    def values(self) -> PixelValues:
        """How the pixels of the images are made."""
        values = self.source.train.values
        assert values is not None  # `build_source_of` sets them
        return values

    @property
    def bank(self) -> Labelled:
        """Return the labelled training images.

        Raises:
            InputError: there are none.
        """
        if self.source.bank is None:
            raise InputError(
                f"data={self.data['name']}: evaluation={self.settings['name']} needs labelled "
                "training images, and this dataset has none; evaluation=label_free needs no labels"
            )
        return self.source.bank

    @property
    def unlabelled(self) -> Labelled:
        """Return all training images, without their labels (-1).

        Raises:
            InputError: they are a stream, which has no images by number.
        """
        images = self.source.train
        if isinstance(images, (ShardedImages, IterableImages)):
            raise InputError(
                f"data={self.data['name']}: a stream without labels has no images by number, so "
                "that nothing can be measured; moco.embed writes its features"
            )
        return Labelled(images, np.full(len(images), -1))

    @property
    def feature_names(self) -> list[str]:
        """Return the names of the features that the encoder has."""
        if isinstance(getattr(self.encoder, "projector", nn.Identity()), nn.Identity):
            return ["backbone"]
        return ["backbone", "embedding"]

    @cached_property
    def cache(self) -> FeatureCache:
        """Return the cache of this checkpoint's features."""
        settings = {
            "image_size": self.data["image_size"],
            "crop_ratio": self.data["crop_ratio"],
            "max_image_pixels": self.data["max_image_pixels"],
            **self.augmentation,
            "values": self.values.described(),
            "backbone": self.backbone,
            "encoder": self.settings["encoder"],
            "features": self.feature_names,
            "device": self.device.type,
            "torch": torch.__version__,
            "pillow": PIL.__version__,
            "moco": moco.__version__,
        }
        assert self.checkpoint is not None  # `features` keeps none of a network without weights
        return FeatureCache(self.checkpoint, settings)

    def features(self, labelled: Labelled) -> dict[str, Embedded]:
        """Return features of labelled images, of both kinds from one pass.

        They are under ``backbone`` and, if the encoder has a projector, ``embedding``; float32, not
        normalised. Unreadable images are skipped. With ``evaluation.cache`` the features are kept
        for the next evaluation, except those of a dataset of the user's own.

        Raises:
            InputError: too many images cannot be read, or a feature is not finite.
        """
        compute = partial(self._embedded, labelled)
        # Nothing tells when the images of the user's own dataset have changed.
        is_kept = self.settings["cache"] and self.checkpoint is not None
        if is_kept and not isinstance(labelled.images, DatasetImages):
            path = self.cache.path(labelled, self.data["root"])
            arrays = self.cache.kept_or(path, compute)
        else:
            arrays = compute()
        found = {}
        for name in self.feature_names:
            found[name] = Embedded(arrays[name], arrays["labels"], labelled, arrays["rows"])
        unreadable = found["backbone"].unreadable()
        skip_unreadable(labelled.images, unreadable, self.data["max_bad_fraction"])
        return found

    def evaluation_view(self) -> EvaluationView:
        """Return what makes the plain images, (bands, image_size, image_size)."""
        return EvaluationView(
            self.data["image_size"],
            self.data["crop_ratio"],
            **self.augmentation,
            bands=self.values.bands,
            is_float=self.values.is_float,
        )

    def _embedded(self, labelled: Labelled) -> Arrays:
        """Return both features, labels (images,) and rows (images,), see `Embedded`."""
        started = time.monotonic()
        size = self.data["image_size"]
        view = self.evaluation_view()
        loader = evaluation_loader(
            labelled,
            view,
            size,
            self.settings["batch_size"],
            self.data["num_workers"],
            device=self.device,
        )
        # One pass computes both features, side by side.
        batches = counted(loader, "embedding", len(labelled.labels), size=num_images)
        joined, labels, rows = embed(self._encode_all, batches, self.device)
        bad = rows[~np.isfinite(joined).all(axis=1)]
        if len(bad):
            raise InputError(
                f"checkpoint={self.checkpoint}: the features of {len(bad):,} images "
                f"are not finite (NaN or infinity): {first_names(labelled.images, bad)}"
            )
        log.info(f"embedded {len(rows):,} images in {time.monotonic() - started:.1f} s")
        backbone, embedding = np.split(joined, [self.encoder.backbone.feature_dim], axis=1)
        return {"backbone": backbone, "embedding": embedding, "labels": labels, "rows": rows}

    def _encode_all(self, images: Tensor) -> Tensor:
        """Return features of a batch and, if there is a projector, embeddings beside them.

        The result is (batch, width), or (batch, width + embedding width).
        """
        feature = self.encoder.encode(images)
        if len(self.feature_names) == 1:
            return feature
        return torch.cat([feature, self.encoder.projector(feature)], dim=1)


def build_source_of(
    data: dict[str, Any], mean: Sequence[float], shown_bands: Any = None
) -> DataSource:
    """Build the dataset that the settings of the data name, and fill in their image size.

    Args:
        data: `EvaluateDataConfig` as plain data.
        mean: of the normalisation, which pixels without data become.
        shown_bands: the setting ``preview.bands``.

    Raises:
        InputError: there is no such dataset, or its values need settings.
    """
    settings = {name: data[name] for name in SOURCE_SETTINGS}
    source = build_source(data["name"], data["root"], **settings)
    if data["image_size"] is None:
        data["image_size"] = source.image_size
    prepare_source(source, data, mean, shown_bands)
    return source
