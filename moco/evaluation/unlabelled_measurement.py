"""The measurement of ``moco.evaluate`` for images without labels."""

from functools import partial

from moco.data.files.written_files import SOFTWARE
from moco.evaluation.label_free_measurement import measure_label_free
from moco.evaluation.reports.knn_plots import label_free_plots
from moco.evaluation.reports.projections import check_map
from moco.evaluation.subject import Findings, Subject


def measure_without_labels(subject: Subject) -> Findings:
    """Measure rank, spread and views of all training images, and draw their neighbours and maps.

    Raises:
        InputError: the images are a stream, or the map needs a package that is missing.
    """
    settings = subject.settings
    feature = settings["feature"]
    check_map(settings["map"])
    features = subject.features(subject.unlabelled)
    label_free = measure_label_free(subject, features)
    embedded = features[feature]
    num_images = len(embedded.rows)
    most = min(features["backbone"].features.shape)
    rank = label_free.figures["label_free/feature_rank_me"]
    findings = Findings(
        title="Frozen features without labels",
        scores={},
        protocol={
            "label_free/num_images": num_images,
            "label_free/feature": feature,
            "label_free/encoder": settings["encoder"],
        },
        details=label_free.figures,
        tables=[*label_free.tables],
        headline=f"effective rank of the features {rank:.1f} of at most {most} "
        f"({num_images:,} images without labels)",
    )
    if settings["plots"]:
        plots = label_free_plots(subject, embedded, label_free.views)
        for name, plot in plots.items():
            mark = {"Software": SOFTWARE}  # so that it is no image of a dataset
            findings.plots[name] = partial(plot.savefig, format="png", metadata=mark)
    return findings
