"""What a measurement of frozen features is given, and what it gives back.

Letters: M images, D feature width, C embedding width.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import PIL
import torch
from torch import Tensor, nn

import moco
from moco.data.augment.views import build_evaluation_view, normalisation, rgb_batch
from moco.data.loading.datamodule import check_unreadable
from moco.data.loading.every_image import EvaluationBatch, evaluation_loader
from moco.data.sources.registry import build_source
from moco.data.sources.source import ArrayImages, DataSource, Labelled
from moco.errors import InputError, printable
from moco.evaluation.feature_cache import FeatureCache
from moco.evaluation.features import embed

log = logging.getLogger(__name__)


class Features(NamedTuple):
    """Of labelled images, those that could be read."""

    of: dict[str, np.ndarray]
    """``backbone`` (M, D) and, if the encoder has a projector, ``embedding`` (M, C); float32, not normalised."""
    labels: np.ndarray
    """(M,) int64."""
    rows: np.ndarray
    """(M,) int64: which of the images each row is."""


@dataclass
class Findings:
    """What a measurement found."""

    title: str
    """Of the table."""
    scores: Mapping[str, float]
    """Shown with four decimals, and written to ``metrics.json``."""
    protocol: Mapping[str, Any]
    """The conditions of the scores: shown and written as they are."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Written to ``metrics.json``, and not shown."""
    tables: Sequence[Any] = ()
    """What rich can print, below the table of scores and protocol."""
    files: Mapping[str, Callable[[BinaryIO], object]] = field(default_factory=dict)
    """For the run folder: what writes each, by file name."""


@dataclass
class Subject:
    """A frozen encoder, the images, and how they are looked at.

    Args:
        encoder: in eval mode, on `device`; an `Encoder`.
        data: `EvaluateDataConfig` as plain data, nulls filled in; `image_size` may be null until `source` is built.
        augmentation: mean and std of the normalisation.
        settings: `EvaluationConfig` as plain data, nulls filled in.
        at_image_size: told the side of the images once it is known, px.
    """

    encoder: Any
    data: dict[str, Any]
    augmentation: dict[str, Any]
    settings: dict[str, Any]
    device: torch.device
    folder: Path
    """The run folder of this measurement."""
    checkpoint: Path
    backbone: dict[str, Any]
    """The arguments of `build_backbone` that make the encoder's."""
    at_image_size: Callable[[int], None] = lambda image_size: None
    pair: dict[str, Any] = field(default_factory=dict)
    """``query`` and ``key``: the operations of the run's two views; empty where the checkpoint does not say them."""

    @cached_property
    def source(self) -> DataSource:
        """The data set; fills in the image size.

        Raises:
            InputError: there is no such data set.
        """
        names = (
            "download",
            "num_images",
            "image_column",
            "label_column",
            "max_image_pixels",
            "held_out",
            "pages",
        )
        source = build_source(
            self.data["name"], self.data["root"], **{name: self.data[name] for name in names}
        )
        self.data["image_size"] = self.data["image_size"] or source.image_size
        self.at_image_size(self.data["image_size"])
        return source

    @property
    def feature_names(self) -> list[str]:
        """Those that the encoder has, of backbone and embedding."""
        return (
            ["backbone"]
            if isinstance(self.encoder.projector, nn.Identity)
            else ["backbone", "embedding"]
        )

    @cached_property
    def cache(self) -> FeatureCache:
        """The features of this checkpoint that earlier evaluations have kept."""
        looked_at = ("image_size", "crop_ratio", "max_image_pixels")
        settings = (
            {name: self.data[name] for name in looked_at}
            | self.augmentation
            | {"backbone": self.backbone}
        )
        settings |= {
            "encoder": self.settings["encoder"],
            "features": self.feature_names,
            "device": self.device.type,
        }
        versions = {"torch": torch.__version__, "pillow": PIL.__version__, "moco": moco.__version__}
        return FeatureCache(self.checkpoint, settings | versions)

    def features(self, labelled: Labelled) -> Features:
        """Features of labelled images, both kinds from one pass; unreadable ones are left out and counted.

        With ``evaluation.cache`` they are kept for the next evaluation.

        Raises:
            InputError: too many images cannot be read, or a feature is not finite; it names the images.
        """
        if not self.settings["cache"]:
            features = self.embedded(labelled)
        else:
            path = self.cache.path(labelled, self.data["root"])
            kept = self.cache.read(path)
            if kept is not None:
                log.info("features of %s images from %s", f"{len(labelled.images):,}", path)
                features = Features(
                    {name: kept[name] for name in self.feature_names}, kept["labels"], kept["rows"]
                )
            else:
                features = self.embedded(labelled)
                self.cache.write(
                    path, {**features.of, "labels": features.labels, "rows": features.rows}
                )
        unreadable = np.delete(np.arange(len(labelled.images)), features.rows)
        if len(unreadable):
            names = ", ".join(printable(labelled.images.name(int(row))) for row in unreadable[:3])
            log.warning(
                "skipped %d unreadable images: %s%s",
                len(unreadable),
                names,
                ", ..." * (len(unreadable) > 3),
            )
        check_unreadable(set(unreadable.tolist()), labelled.images, self.data["max_bad_fraction"])
        return features

    def embedded(self, labelled: Labelled) -> Features:
        """`features`, computed."""
        started = time.monotonic()
        joined, labels, unreadable = embed(self.encode_all, self.batches(labelled), self.device)
        rows = np.delete(np.arange(len(labelled.images)), unreadable)
        check_finite(joined, rows, labelled, self.checkpoint)
        log.info("embedded %s images in %.1f s", f"{len(rows):,}", time.monotonic() - started)
        width = self.encoder.backbone.feature_dim
        parts = np.split(joined, [width], axis=1) if len(rows) else [joined, joined]
        return Features(dict(zip(self.feature_names, parts, strict=False)), labels, rows)

    def batches(self, labelled: Labelled) -> Any:
        """Batches of the images in order: from memory at once where nothing has to be resized."""
        size, batch_size = self.data["image_size"], self.settings["batch_size"]
        images = labelled.images
        if (
            isinstance(images, ArrayImages)
            and images.tensor.shape[1:3] == (size, size)
            and round(size / self.data["crop_ratio"]) == size
        ):
            return batches_in_memory(images, labelled.labels, batch_size, **self.augmentation)
        view = build_evaluation_view(size, self.data["crop_ratio"], **self.augmentation)
        return evaluation_loader(
            labelled, view, size, batch_size, self.data["num_workers"], device=self.device
        )

    def encode_all(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) to features and, if there is a projector, embeddings beside them: (N, D + C)."""
        feature = self.encoder.backbone(images)
        if len(self.feature_names) == 1:
            return feature
        return torch.cat([feature, self.encoder.projector(feature)], dim=1)


def check_finite(
    features: np.ndarray, rows: np.ndarray, labelled: Labelled, checkpoint: Path
) -> None:
    """Raises InputError if a feature (M, D) is not finite; it names the first images."""
    bad = rows[~np.isfinite(features).all(axis=1)]
    if len(bad):
        names = ", ".join(printable(labelled.images.name(int(row))) for row in bad[:3])
        more = f" and {len(bad) - 3:,} more" if len(bad) > 3 else ""
        raise InputError(
            f"checkpoint={checkpoint}: the features of {names}{more} are not finite (NaN or infinity)"
        )


def batches_in_memory(
    images: ArrayImages,
    labels: np.ndarray,
    batch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Iterator[EvaluationBatch]:
    """What the evaluation view makes of images that have its size already, to the same bits."""
    scale, shift = normalisation(mean, std)
    for first in range(0, len(images), batch_size):
        part = slice(first, first + batch_size)
        batch = rgb_batch(images.tensor[part]) * scale - shift
        yield EvaluationBatch(
            batch, torch.from_numpy(labels[part]), torch.zeros(len(batch), dtype=torch.bool)
        )
