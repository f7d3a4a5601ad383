"""Segmentation by frozen patch features, as ``moco.evaluate evaluation=dense`` measures it."""

import logging
import time
from functools import partial

from moco.data.augment.views import Normalized
from moco.errors import InputError
from moco.evaluation.dense_bank import knn_scores
from moco.evaluation.dense_features import (
    DenseSet,
    NotFinite,
    check_maps,
    dense_figures,
)
from moco.evaluation.dense_linear import fit_best
from moco.evaluation.knn import capped
from moco.evaluation.knn_measurement import table_of
from moco.evaluation.subject import Findings, Subject
from moco.segmentation.mask_sources import build_segmentation_source

log = logging.getLogger(__name__)


def measure_dense(subject: Subject) -> Findings:
    """Measure the mean intersection over union on the held-out images.

    Raises:
        InputError: the dataset has no masks, its masks cannot be used, or a feature is not finite.
    """
    images = build_dense_set(subject)
    try:
        return measure(subject, images)
    except NotFinite as error:
        raise InputError(f"checkpoint={subject.checkpoint}: {error}") from error


def build_dense_set(subject: Subject) -> DenseSet:
    """Return the dataset of the settings. Tells the subject the image size.

    Raises:
        InputError: the dataset has no masks, they cannot be used, or the image size is unknown.
    """
    data, settings = subject.data, subject.settings
    check_maps(settings["maps"], "evaluation.maps")
    if data["image_size"] is None:
        raise InputError(
            f"data.image_size: missing; {subject.checkpoint} does not say it, "
            "give data.image_size=PIXELS"
        )
    source = build_segmentation_source(
        data["name"],
        data["root"],
        download=data["download"],
        ignore_index=data["ignore_index"],
        max_image_pixels=data["max_image_pixels"],
    )
    subject.at_image_size(data["image_size"])
    return DenseSet(
        source,
        Normalized(**subject.augmentation),
        image_size=data["image_size"],
        maps=settings["maps"],
        bank_size=settings["bank_size"],
        sampling=settings["sampling"],
        seed=settings["seed"],
        batch_size=settings["batch_size"],
        num_workers=data["num_workers"],
        max_bad_fraction=data["max_bad_fraction"],
    )


def measure(subject: Subject, images: DenseSet) -> Findings:
    """Segment the held-out images by nearest neighbours and by a linear head."""
    backbone, device, settings = subject.encoder.backbone, subject.device, subject.settings
    started = time.monotonic()
    bank = images.bank(backbone, device)
    num_patches, width = bank.features.shape
    log.info(
        "a bank of %s patches with %d features each, built in %.1f s",
        f"{num_patches:,}",
        width,
        time.monotonic() - started,
    )
    started = time.monotonic()
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
        names, knn_ious.values(), linear_ious.values(), strict=True
    ):
        rows.append((name, shown(knn_iou), shown(linear_iou)))
    return Findings(
        "segmentation by frozen patch features",
        scores | linear_scores,
        protocol,
        knn_ious | linear_ious,
        [table_of("intersection over union", ("class", "kNN", "linear head"), rows)],
    )


def shown(iou: float | None) -> str:
    """Return a figure for the table. A class may be neither in the masks nor predicted."""
    if iou is None:
        return "not there"
    return f"{iou:.4f}"
