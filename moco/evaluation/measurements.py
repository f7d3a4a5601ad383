"""The kinds of measurement of ``moco.evaluate``, by name."""

from moco.evaluation.dense_measurement import measure_dense
from moco.evaluation.knn_measurement import measure_knn
from moco.evaluation.linear_measurement import measure_linear
from moco.evaluation.linear_official import measure_linear_official
from moco.evaluation.subject import Findings, Subject

KINDS = {
    "dense": measure_dense,
    "knn": measure_knn,
    "linear": measure_linear,
    "linear_official": measure_linear_official,
}


def measure(subject: Subject) -> Findings:
    """Return the findings of the kind of measurement that the settings name."""
    return KINDS[subject.settings["name"]](subject)
