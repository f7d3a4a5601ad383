"""The kNN measurement of ``moco.evaluate``: many protocols from one pass through the images."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from rich.table import Table

from moco.data.files.written_files import SOFTWARE
from moco.data.sources.source import Labelled
from moco.errors import InputError, printable
from moco.evaluation.image_names import first_names
from moco.evaluation.indexes import EXACT, build_index, empty_index, recall
from moco.evaluation.knn import (
    Protocol,
    Search,
    Votes,
    capped,
    classes_of,
    classify,
    confusion_matrix,
    knn_accuracy,
    refuse_several_classes,
    turns_of_classes,
)
from moco.evaluation.label_free_measurement import NOTHING, measure_label_free
from moco.evaluation.lost_queries import warn_of_lost, without_class_in_bank
from moco.evaluation.neighbors import nearest_by_block, search_index
from moco.evaluation.reports.embedded import Embedded
from moco.evaluation.reports.knn_plots import Searched, knn_plots
from moco.evaluation.reports.projections import check_map
from moco.evaluation.subject import Findings, Subject, table_of
from moco.phases import counted, phase

log = logging.getLogger(__name__)

# The grid of protocols that is measured beside the main one.
NUM_NEIGHBORS = (1, 10, 20, 100, 200)
TEMPERATURES = (0.07, 0.1, 0.2)
# Worst classes, and most confused pairs of classes, in the tables.
NUM_WORST = 5
INDEX_KEY = "evaluation.index"


def measure_knn(subject: Subject) -> Findings:
    """Measure the accuracy of the weighted vote under the settings' protocol and a grid of others.

    Raises:
        InputError: the dataset has no labels, all are of one class, faiss has no such index, or the
            map needs a package that is missing.
    """
    settings = subject.settings
    feature = settings["feature"]
    # What can be refused is refused before the images are embedded.
    check_map(settings["map"])
    if feature == "backbone":
        empty_index(settings["index"], subject.encoder.backbone.feature_dim, INDEX_KEY)
    bank, queries, own_rows = sides_of(subject)
    # In leave one out, an image is no neighbour of itself.
    most_neighbors = len(bank[feature].rows) - int(own_rows is not None)
    main = Protocol(capped(settings["num_neighbors"], most_neighbors), settings["temperature"])
    protocols = {main}
    for protocol in product(NUM_NEIGHBORS, TEMPERATURES):
        if protocol[0] <= most_neighbors:
            protocols.add(Protocol(*protocol))
    searches = {}
    votes = {}
    recalls: dict[str, float] = {}
    for name in subject.feature_names:
        known, asked = bank[name], queries[name]
        search = search_of(subject, known.features, asked.features, name, main, recalls)
        searches[name] = Searched(known, asked, search, own_rows)
        with phase(f"kNN: searching, {name} feature", unit=""):
            votes[name] = classify(
                search, known.targets, asked.features, asked.targets, protocols, own_rows
            )
    searched = searches[feature]
    grid_figures, table = grid_findings(votes, searched, settings)
    few_label_figures, few_label_tables = measure_few_labels(subject, searched)
    label_free = NOTHING
    if settings["label_free"]:
        label_free = measure_label_free(subject, bank)
    query_labels = searched.queries.labels
    is_leave_one_out = own_rows is not None
    lost = without_class_in_bank(
        searched.bank.targets, searched.queries.targets, is_leave_one_out=is_leave_one_out
    )
    warn_of_lost(lost, query_labels, searched.queries.labelled, is_leave_one_out=is_leave_one_out)
    conditions = {
        **main._asdict(),
        "feature": feature,
        "bank_size": len(searched.bank.rows),
        "num_queries": len(searched.queries.rows),
        "encoder": settings["encoder"],
        "index": settings["index"],
        "queries": searched.kind,
        "queries_never_right": int(lost.sum()),
        **recalls,
    }
    findings = classification_findings(
        "knn",
        "kNN classification of frozen features",
        votes[feature][main],
        searched.queries,
        conditions,
        {**grid_figures, **few_label_figures, **label_free.figures},
        [table, *few_label_tables],
        main.num_neighbors,
    )
    findings.headline = headline(main, votes[feature])
    findings.tables += label_free.tables
    if settings["plots"]:
        plots = knn_plots(subject, searched, votes[feature][main].predicted, label_free.views)
        for name, plot in plots.items():
            mark = {"Software": SOFTWARE}  # so that it is no image of a dataset
            findings.plots[name] = partial(plot.savefig, format="png", metadata=mark)
    return findings


def headline(main: Protocol, votes: Mapping[Protocol, Votes]) -> str:
    """Return the accuracy under the main protocol, and the best one of the grid.

    Args:
        main: the protocol that the settings ask for.
        votes: the outcome of every protocol, of one feature.
    """
    top1 = votes[main].accuracy(1)
    precision = votes[main].mean_average_precision()
    if precision is not None:
        return (
            f"kNN mean average precision {100 * precision:.1f} %, top-1 {100 * top1:.1f} % "
            f"(k {main.num_neighbors}, T {main.temperature:g})"
        )
    line = f"kNN top-1 {100 * top1:.1f} % (k {main.num_neighbors}, T {main.temperature:g})"
    best = max(sorted(votes), key=lambda protocol: votes[protocol].accuracy(1))
    best_top1 = votes[best].accuracy(1)
    if best_top1 <= top1:
        return f"{line}; no protocol of the grid is better"
    where = f"k {best.num_neighbors}"
    if best.temperature != main.temperature:
        where += f", T {best.temperature:g}"
    return f"{line}; best of the grid {100 * best_top1:.1f} % at {where}"


def sides_of(
    subject: Subject,
) -> tuple[dict[str, Embedded], dict[str, Embedded], np.ndarray | None]:
    """Return features of bank and queries, and each query's own row in the bank.

    Without a test part each image of the bank is a query, and all others are its bank (leave one
    out). With one there are no own rows.

    Raises:
        InputError: the dataset has no labels, or all its images are of one class.
    """
    name = subject.data["name"]
    bank = labelled_features(subject, subject.bank)
    labels = bank["backbone"].labels
    classes_of(labels, name)
    if subject.source.queries is None:
        log.info(
            "data=%s has no test part: each image is classified by all others (leave one out)", name
        )
        return bank, bank, np.arange(len(labels))
    return bank, labelled_features(subject, subject.source.queries), None


def labelled_features(subject: Subject, images: Labelled) -> dict[str, Embedded]:
    """Return features of the images that have a label, 0 or more; the log names the others.

    Raises:
        InputError: no image has a label, too many cannot be read, or a feature is not finite.
    """
    features = subject.features(images)
    backbone = features["backbone"]
    is_missing = backbone.labels < 0
    num_missing = int(is_missing.sum())
    if num_missing == len(is_missing):
        raise InputError(
            f"data={subject.data['name']}: none of {num_missing:,} readable images has a label; "
            "evaluation=label_free needs none"
        )
    if num_missing == 0:
        return features
    names = first_names(images.images, backbone.rows[is_missing])
    log.warning("skipped %d images without a label: %s", num_missing, names)
    return {name: one.chosen(~is_missing) for name, one in features.items()}


def search_of(
    subject: Subject,
    bank: np.ndarray,
    queries: np.ndarray,
    name: str,
    main: Protocol,
    recalls: dict[str, float],
) -> Search:
    """Return the search through the bank that the settings ask for.

    Args:
        bank, queries: (rows, width) features.
        name: of the feature.
        main: its k is that of the recall.
        recalls: gets ``recall_NAME`` of an approximate index.

    Raises:
        InputError: faiss cannot build such an index of the bank.
    """
    settings = subject.settings
    if settings["index"] == EXACT:
        return partial(nearest_by_block, bank, device=subject.device)
    index = build_index(
        bank, settings["index"], INDEX_KEY, settings["num_probes"], settings["ef_search"]
    )
    share = recall(index, bank, queries, main.num_neighbors)
    log.info(
        f"index {settings['index']} of the {name} feature finds {share:.4f} of the exact "
        f"{main.num_neighbors} neighbours"
    )
    # Rounded, as it is measured on a sample.
    recalls[f"recall_{name}"] = round(share, 6)
    return partial(search_index, index)


def grid_findings(
    votes: Mapping[str, Mapping[Protocol, Votes]], searched: Searched, settings: Mapping[str, Any]
) -> tuple[dict[str, float], Table]:
    """Return figures such as ``knn_grid/backbone/k20/t0.07/top1``, and a table of top-1.

    The table has a row for every feature and k, and a column for every T.
    """
    temperatures = sorted({protocol.temperature for protocol in votes[settings["feature"]]})
    figures = {}
    rows = []
    for feature, votes_by_protocol in votes.items():
        top1: dict[int, dict[float, str]] = {}
        for (k, temperature), found in sorted(votes_by_protocol.items()):
            for name, share in found.top(k).items():
                figures[f"knn_grid/{feature}/k{k}/t{temperature:g}/{name}"] = share
            top1.setdefault(k, {})[temperature] = f"{found.accuracy(1):.4f}"
        for k, shown in top1.items():
            rows.append([feature, k, *(shown.get(temperature, "") for temperature in temperatures)])
    title = (
        f"Top-1 of {len(searched.queries.rows):,} queries ({searched.kind}) "
        f"by a bank of {len(searched.bank.rows):,}, "
        f"{settings['encoder']} encoder, {settings['index']} index"
    )
    columns = ["feature", "k", *(f"T {temperature:g}" for temperature in temperatures)]
    return figures, table_of(title, columns, rows, texts=("feature",))


def measure_few_labels(
    subject: Subject, searched: Searched
) -> tuple[dict[str, float], list[Table]]:
    """Measure top-1 with a bank of a few images of each class.

    The images are drawn several times, and the mean and the standard deviation are reported.

    Returns:
        Figures under the names of ``metrics.json`` and the table; both are empty if the settings do
        not ask for them.

    Raises:
        InputError: a number of images leaves no queries.
    """
    settings = subject.settings
    temperature = settings["temperature"]
    if settings["images_per_class"]:
        refuse_several_classes(searched.bank.labelled, "evaluation.images_per_class")
    figures: dict[str, float] = {}
    rows = []
    for images_per_class in settings["images_per_class"]:
        top1 = []
        draws = range(settings["num_draws"])
        title = f"kNN with {images_per_class} images per class"
        for seed in counted(draws, title, len(draws), "draws"):
            generator = np.random.default_rng(seed)
            drawn = draw_per_class(searched.bank.labels, images_per_class, generator)
            k = min(settings["num_neighbors"], len(drawn))
            top1.append(top1_of(searched, drawn, Protocol(k, temperature), subject.device))
        mean, spread = float(np.mean(top1)), float(np.std(top1, ddof=1))
        figures[f"knn_few/{images_per_class}_per_class/top1"] = mean
        figures[f"knn_few/{images_per_class}_per_class/top1_std"] = spread
        rows.append([images_per_class, f"{len(drawn):,}", k, f"{mean:.4f}", f"{spread:.4f}"])
    if not rows:
        return {}, []
    title = (
        f"Top-1 with few labels, {settings['feature']} feature, "
        f"T {temperature:g}, {settings['num_draws']} draws"
    )
    columns = ("images per class", "bank", "k", "mean", "standard deviation")
    return figures, [table_of(title, columns, rows)]


def draw_per_class(labels: np.ndarray, number: int, generator: np.random.Generator) -> np.ndarray:
    """Return rows of `number` random images of each class, in rising order.

    Of a class with fewer images all are returned.
    """
    order = generator.permutation(len(labels))
    return np.sort(order[turns_of_classes(labels[order]) < number])


def top1_of(
    searched: Searched, rows: np.ndarray, protocol: Protocol, device: torch.device
) -> float:
    """Return the accuracy with these rows of the bank alone.

    In leave one out the other rows are the queries.

    Raises:
        InputError: there is no other row.
    """
    bank, queries = searched.bank, searched.queries
    is_query = np.ones(len(queries.rows), bool)
    if searched.own_rows is not None:
        is_query[rows] = False
    if not is_query.any():
        raise InputError(
            "evaluation.images_per_class: "
            "this number of images of each class leaves none to classify"
        )
    few = bank.features[rows], bank.labels[rows]
    others = queries.features[is_query], queries.labels[is_query]
    return knn_accuracy(*few, *others, *protocol, device).top1


def classification_findings(
    group: str,
    title: str,
    votes: Votes,
    queries: Embedded,
    conditions: Mapping[str, Any],
    details: Mapping[str, Any],
    tables: Iterable[Table],
    num_neighbors: int = 5,
) -> Findings:
    """Return the findings of a classifier, with scores and conditions under ``GROUP/NAME``.

    Args:
        num_neighbors: k of a kNN vote, see `Votes.top`.
    """
    if votes.average_precision is not None:
        return Findings(
            title=title,
            scores={f"{group}/{name}": share for name, share in votes.top(num_neighbors).items()},
            protocol={f"{group}/{name}": value for name, value in conditions.items()},
            details=details,
            tables=[*tables, precision_table(votes.average_precision, queries)],
        )
    classes, confusion = confusion_matrix(queries.labels, votes.predicted)
    class_names = [queries.labelled.class_name(number) for number in classes]
    in_words = [queries.labelled.class_in_words(number) for number in classes]
    write_confusion = partial(
        np.savez,
        classes=classes,
        class_names=np.array(class_names),
        confusion=confusion,
        accuracy=confusion.diagonal() / np.maximum(confusion.sum(axis=1), 1),
        predicted=votes.predicted,
        labels=queries.labels,
        rows=queries.rows,
    )
    return Findings(
        title=title,
        scores={f"{group}/{name}": share for name, share in votes.top(num_neighbors).items()},
        protocol={f"{group}/{name}": value for name, value in conditions.items()},
        details=details,
        tables=[*tables, *class_tables(in_words, confusion)],
        headline=f"{title}: top-1 {100 * votes.accuracy(1):.1f} %",
        files={"confusion.npz": write_confusion},
    )


def precision_table(average_precision: np.ndarray, queries: Embedded) -> Table:
    """Return a table of the classes with the lowest average precision.

    Args:
        average_precision: (classes,), NaN for a class that no query has.
    """
    num_queries = queries.targets.sum(axis=0)
    order = np.argsort(average_precision, kind="stable")  # NaN comes last
    rows = []
    for number in order[:NUM_WORST].tolist():
        if num_queries[number] == 0:
            continue
        name = printable(queries.labelled.class_in_words(number))
        rows.append([name, f"{average_precision[number]:.4f}", f"{num_queries[number]:,}"])
    title = "Classes with the lowest average precision"
    return table_of(title, ("class", "average precision", "queries"), rows)


def class_tables(class_names: Sequence[str], confusion: np.ndarray) -> list[Table]:
    """Return a table of the worst classes, and one of the most confused pairs if there are any.

    Args:
        class_names: (classes,) in the order of the matrix.
        confusion: (classes, classes), see `confusion_matrix`.
    """
    classes = [printable(name) for name in class_names]
    totals = confusion.sum(axis=1)
    present = totals.nonzero()[0]
    accuracy = confusion.diagonal()[present] / totals[present]
    rows = []
    for place in np.argsort(accuracy, kind="stable")[:NUM_WORST]:
        true = present[place]
        rows.append([classes[true], f"{accuracy[place]:.4f}", f"{totals[true]:,}"])
    tables = [table_of("Classes with the lowest top-1", ("class", "top-1", "queries"), rows)]

    # Without the diagonal only mistakes are left.
    mistakes = confusion - np.diag(confusion.diagonal())
    rows = []
    for place in np.argsort(-mistakes, axis=None, kind="stable")[:NUM_WORST]:
        true, taken_for = divmod(place, len(classes))
        if count := mistakes[true, taken_for]:
            rows.append([classes[true], classes[taken_for], f"{count:,} of {totals[true]:,}"])
    if rows:
        columns = ("class", "taken for", "queries")
        tables.append(table_of("Most confused classes", columns, rows, texts=columns[:2]))
    return tables
