"""Segmentation by frozen patch features, as ``moco.evaluate evaluation=dense`` measures it."""

import logging
import time
from collections.abc import Mapping
from functools import partial

from moco.data.sources.source import PIXEL_SETTINGS, classes_in_words
from moco.errors import InputError
from moco.evaluation.dense_bank import knn_scores
from moco.evaluation.dense_features import (
    DenseSet,
    NotFinite,
    build_dense_set,
    dense_figures,
)
from moco.evaluation.dense_linear import fit_best
from moco.evaluation.knn import capped
from moco.evaluation.subject import Findings, Subject, table_of
from moco.phases import phase

log = logging.getLogger(__name__)


# The settings that `build_dense_set` takes, of the data and of the measurement.
DATA_SETTINGS = (
    "name",
    "root",
    "download",
    "ignore_index",
    "max_image_pixels",
    "image_size",
    "num_workers",
    "max_bad_fraction",
)
SETTINGS = ("maps", "bank_size", "sampling", "seed", "batch_size")


def measure_dense(subject: Subject) -> Findings:
    """Measure the mean intersection over union on the held-out images.

    Raises:
        InputError: the dataset has no masks, its masks cannot be used, the image size is unknown,
            or a feature is not finite.
    """
    settings = {key: subject.data[key] for key in DATA_SETTINGS}
    settings |= {key: subject.settings[key] for key in SETTINGS}
    if settings["image_size"] is None:
        raise InputError(
            f"data.image_size: missing; {subject.checkpoint} does not say it, "
            "give data.image_size=PIXELS"
        )
    pixel_settings = {key: subject.data[key] for key in PIXEL_SETTINGS}
    images = build_dense_set(
        "evaluation", **settings, **subject.augmentation, pixel_settings=pixel_settings
    )
    values = images.source.train.images.values
    assert values is not None  # `build_dense_set` sets them
    subject.at_data(settings["image_size"], values.bands)
    try:
        return measure(subject, images)
    except NotFinite as error:
        raise InputError(f"checkpoint={subject.checkpoint}: {error}") from error


def measure(subject: Subject, images: DenseSet) -> Findings:
    """Segment the held-out images by nearest neighbours and by a linear head."""
    backbone, device, settings = subject.encoder.backbone, subject.device, subject.settings
    started = time.monotonic()
    bank = images.bank(backbone, device)
    num_patches, width = bank.features.shape
    seconds = time.monotonic() - started
    log.info(f"a bank of {num_patches:,} patches with {width:,} features each in {seconds:.1f} s")
    started = time.monotonic()
    with phase("fitting the linear head", unit=""):
        head, weight_decay = fit_best(bank, device)
    log.info("linear head with weight decay %g in %.1f s", weight_decay, time.monotonic() - started)

    started = time.monotonic()
    num_neighbors = capped(settings["num_neighbors"], num_patches)
    temperature = settings["temperature"]
    by_neighbors = partial(knn_scores, bank, num_neighbors, temperature, device)
    confusions = images.confusions({"knn": by_neighbors, "linear": head.scores}, backbone, device)
    log.info("held-out images segmented in %.1f s", time.monotonic() - started)

    names = images.source.class_names
    scores, knn_ious = dense_figures(confusions["knn"], names, "knn")
    linear_scores, linear_ious = dense_figures(confusions["linear"], names, "linear")
    protocol = images.protocol(bank, num_neighbors, temperature)
    protocol["dense/encoder"] = settings["encoder"]
    protocol["dense/linear_weight_decay"] = weight_decay
    rows = []
    for name, knn_iou, linear_iou in zip(
        classes_in_words(names), knn_ious.values(), linear_ious.values(), strict=True
    ):
        rows.append((name, shown(knn_iou), shown(linear_iou)))
    return Findings(
        "Segmentation by frozen patch features",
        scores | linear_scores,
        protocol,
        knn_ious | linear_ious,
        [table_of("Intersection over union (IoU)", ("class", "kNN", "linear head"), rows)],
        headline=dense_headline({**scores, **linear_scores}),
    )


def dense_headline(scores: Mapping[str, float | None]) -> str:
    """Return both mean intersections over union in one line."""
    parts = []
    for name, key in (("kNN", "dense/knn_miou"), ("a linear head", "dense/linear_miou")):
        value = scores[key]
        shown_value = "not measured" if value is None else f"{100 * value:.1f} %"
        parts.append(f"{shown_value} by {name}")
    return f"mIoU of frozen patch features: {', '.join(parts)}"


def shown(iou: float | None) -> str:
    """Return a figure for the table. A class may be neither in the masks nor predicted."""
    if iou is None:
        return "not there"
    return f"{iou:.4f}"
