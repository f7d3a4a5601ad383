"""The kinds of measurement of ``moco.evaluate``, by name."""

import logging

from moco.evaluation.dense_measurement import measure_dense
from moco.evaluation.knn_measurement import measure_knn
from moco.evaluation.linear_measurement import measure_linear
from moco.evaluation.linear_official import measure_linear_official
from moco.evaluation.subject import Findings, Subject
from moco.evaluation.unlabelled_measurement import measure_without_labels

log = logging.getLogger(__name__)

KINDS = {
    "dense": measure_dense,
    "knn": measure_knn,
    "label_free": measure_without_labels,
    "linear": measure_linear,
    "linear_official": measure_linear_official,
}


def measure(subject: Subject) -> Findings:
    """Return the findings of the kind of measurement that the settings name.

    kNN is what nobody has to ask for, so images without labels get the label-free measurement.
    """
    if subject.settings["name"] == "knn" and subject.source.bank is None:
        log.warning(
            "data=%s has no labels, so there is no accuracy: measuring what needs none "
            "(evaluation=label_free)",
            subject.data["name"],
        )
        subject.settings["name"] = "label_free"
    return KINDS[subject.settings["name"]](subject)
