"""kNN classification of frozen features, as ``moco.evaluate`` measures it."""

from moco.errors import InputError
from moco.evaluation.knn import knn_accuracy
from moco.evaluation.monitor import protocol
from moco.evaluation.subject import Findings, Subject


def measure_knn(subject: Subject) -> Findings:
    """Accuracy of the weighted vote.

    Raises:
        InputError: the data set has no labels.
    """
    source, settings = subject.source, subject.settings
    if source.bank is None or source.queries is None:
        raise InputError(
            f"data={subject.data['name']}: kNN needs labelled training and test pictures, and this set has none"
        )
    bank, queries = subject.features(source.bank), subject.features(source.queries)
    feature, temperature = settings["feature"], settings["temperature"]
    result = knn_accuracy(
        bank.of[feature], bank.labels, queries.of[feature], queries.labels, settings["num_neighbors"], temperature
    )
    return Findings(
        "kNN classification of frozen features",
        {"knn/top1": result.top1, "knn/top5": result.top5},
        {**protocol(result, temperature, feature), "knn/encoder": settings["encoder"]},
    )
