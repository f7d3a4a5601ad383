"""Segmentation by frozen patch features as ``moco.evaluate`` measures it: by nearest neighbours, and by a linear head.

Letters: C classes, k neighbours.
"""

import logging
import time
from functools import partial

from moco.data.augment.views import Normalized
from moco.errors import InputError
from moco.evaluation.dense_bank import knn_scores
from moco.evaluation.dense_features import DenseSet, NotFinite, Scorer, check_maps, figures_of
from moco.evaluation.dense_linear import fit_best
from moco.evaluation.knn import capped
from moco.evaluation.knn_measurement import table_of
from moco.evaluation.subject import Findings, Subject
from moco.segmentation.mask_sources import build_segmentation_source

log = logging.getLogger(__name__)


def measure_dense(subject: Subject) -> Findings:
    """Mean intersection over union of the held-out images.

    Raises:
        InputError: the data set has no masks, or they do not suit; or the features are not finite.
    """
    images, backbone = dense_set(subject), subject.encoder.backbone
    try:
        return measured(subject, images, backbone)
    except NotFinite as error:
        raise InputError(f"checkpoint={subject.checkpoint}: {error}") from error


def dense_set(subject: Subject) -> DenseSet:
    """The data set under the settings; tells the subject the image size.

    Raises:
        InputError: the data set has no masks, or they do not suit; or nobody says the image size.
    """
    data, settings = subject.data, subject.settings
    check_maps(settings["maps"], "evaluation.maps")
    if data["image_size"] is None:
        raise InputError(
            f"data.image_size: missing; {subject.checkpoint} does not say it, give data.image_size=PIXELS"
        )
    checked = {name: data[name] for name in ("download", "ignore_index", "max_image_pixels")}
    source = build_segmentation_source(data["name"], data["root"], **checked)
    subject.at_image_size(data["image_size"])
    return DenseSet(
        source,
        Normalized(**subject.augmentation),
        **{name: data[name] for name in ("image_size", "num_workers", "max_bad_fraction")},
        **{
            name: settings[name] for name in ("maps", "bank_size", "sampling", "seed", "batch_size")
        },
    )


def measured(subject: Subject, images: DenseSet, backbone: object) -> Findings:
    """`measure_dense` of a set."""
    device, temperature = subject.device, subject.settings["temperature"]
    started = time.monotonic()
    bank = images.bank(backbone, device)
    log.info(
        "bank of %s patches, %d features wide, in %.1f s", f"{len(bank.features):,}", bank.features.shape[1],
        time.monotonic() - started,
    )  # fmt: skip
    num_neighbors = capped(subject.settings["num_neighbors"], len(bank.features))
    started = time.monotonic()
    head, weight_decay = fit_best(bank, device)
    log.info("linear head with weight decay %g in %.1f s", weight_decay, time.monotonic() - started)
    started = time.monotonic()
    scorers: dict[str, Scorer] = {
        "knn": partial(knn_scores, bank, num_neighbors, temperature, device),
        "linear": head.scores,
    }
    confusions = images.confusions(scorers, backbone, device)
    log.info("held-out images segmented in %.1f s", time.monotonic() - started)
    names = images.source.class_names
    figures = {kind: figures_of(confusion, names, kind) for kind, confusion in confusions.items()}
    every = {key: value for found in figures.values() for key, value in found.items()}
    kind = {"dense/encoder": subject.settings["encoder"], "dense/linear_weight_decay": weight_decay}
    rows = [
        (name, *(shown(figures[kind][f"dense/{kind}_iou/{name}"]) for kind in figures))
        for name in names
    ]
    return Findings(
        "segmentation by frozen patch features",
        {key: value for key, value in every.items() if value is not None and "_iou/" not in key},
        images.protocol(bank, num_neighbors, temperature) | kind,
        {key: value for key, value in every.items() if "_iou/" in key},
        [table_of("intersection over union", ("class", "kNN", "linear head"), rows)],
    )


def shown(iou: float | None) -> str:
    """A figure of the table; a class may be neither there nor predicted."""
    return "not there" if iou is None else f"{iou:.4f}"
