"""The kNN measurement of ``moco.evaluate``: many protocols from one pass through the images."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import numpy as np
from rich.table import Table

from moco.errors import InputError
from moco.evaluation.image_names import first_names
from moco.evaluation.indexes import EXACT, build_index, empty_index, recall, set_search_effort
from moco.evaluation.knn import (
    Protocol,
    Search,
    Votes,
    capped,
    classes_of,
    classify,
    confusion_matrix,
    knn_accuracy,
    protocol_figures,
    result_of,
    scores_of,
    turns_of_classes,
)
from moco.evaluation.label_free_measurement import NOTHING, measure_label_free
from moco.evaluation.neighbors import nearest_by_block, search_index
from moco.evaluation.reports.knn_plots import Searched, knn_plots
from moco.evaluation.reports.projections import check_map
from moco.evaluation.subject import Features, Findings, Subject

log = logging.getLogger(__name__)

# The grid of protocols that is measured beside the main one.
NUM_NEIGHBORS = (1, 10, 20, 100, 200)
TEMPERATURES = (0.07, 0.1, 0.2)
# Worst classes, and most confused pairs of classes, in the tables.
NUM_WORST = 5
INDEX_KEY = "evaluation.index"


@dataclass(frozen=True)
class Sides:
    """Features of bank and queries."""

    bank: Features
    queries: Features
    is_leave_one_out: bool
    """The queries are the bank, and no image has a vote on itself."""

    @property
    def own_rows(self) -> np.ndarray | None:
        """Return each query's row in the bank, (queries,); None if the queries are others."""
        if not self.is_leave_one_out:
            return None
        return np.arange(len(self.bank.labels))

    @property
    def most_neighbors(self) -> int:
        """Return the largest possible k."""
        return len(self.bank.labels) - int(self.is_leave_one_out)

    @property
    def kind(self) -> str:
        """Return where the queries come from, in words."""
        return "leave one out" if self.is_leave_one_out else "test"


def measure_knn(subject: Subject) -> Findings:
    """Measure the accuracy of the weighted vote under the settings' protocol and a grid of others.

    Raises:
        InputError: the dataset has no labels, all are of one class, faiss has no such index, or the
            map needs a package that is missing.
    """
    settings = subject.settings
    feature, temperature = settings["feature"], settings["temperature"]
    # What can be refused is refused before the images are embedded.
    check_map(settings["map"])
    if feature == "backbone":
        empty_index(settings["index"], subject.encoder.backbone.feature_dim, INDEX_KEY)
    sides = sides_of(subject)
    main = Protocol(capped(settings["num_neighbors"], sides.most_neighbors), temperature)
    protocols = grid_of(main, sides.most_neighbors)
    searches: dict[str, Search] = {}
    votes: dict[str, dict[Protocol, Votes]] = {}
    recalls: dict[str, float] = {}
    for name in subject.feature_names:
        searches[name] = search_of(subject, sides, name, main.num_neighbors, recalls)
        queries = sides.queries.of[name], sides.queries.labels
        votes[name] = classify(
            searches[name], sides.bank.labels, *queries, protocols, sides.own_rows
        )
    main_votes = votes[feature][main]
    result = result_of(main_votes, main.num_neighbors, len(sides.bank.labels))
    classes, confusion = confusion_matrix(sides.queries.labels, main_votes.predicted)
    few_label_figures, few_label_tables = measure_few_labels(subject, sides)
    label_free = NOTHING
    if settings["label_free"]:
        label_free = measure_label_free(subject, sides.bank)
    files: dict[str, Any] = {
        "confusion.npz": confusion_file(classes, confusion, main_votes, sides.queries)
    }
    if settings["plots"]:
        searched = Searched(
            sides.bank.by(feature), sides.queries.by(feature), searches[feature], sides.own_rows
        )
        plots = knn_plots(subject, searched, confusion, classes, label_free.views)
        for name, plot in plots.items():
            files[name] = partial(plot.savefig, format="png")
    conditions = {
        "knn/encoder": settings["encoder"],
        "knn/index": settings["index"],
        "knn/queries": sides.kind,
    }
    return Findings(
        title="kNN classification of frozen features",
        scores=scores_of(result),
        protocol={**protocol_figures(result, temperature, feature), **conditions, **recalls},
        details={**grid_figures(votes), **few_label_figures, **label_free.figures},
        tables=[
            grid_table(votes, sides, settings),
            *few_label_tables,
            *class_tables(classes, confusion),
            *label_free.tables,
        ],
        files=files,
    )


def grid_of(main: Protocol, most_neighbors: int) -> list[Protocol]:
    """Return the protocols of the grid whose k is possible, and the main one."""
    protocols = {main}
    for num_neighbors in NUM_NEIGHBORS:
        if num_neighbors > most_neighbors:
            continue
        for temperature in TEMPERATURES:
            protocols.add(Protocol(num_neighbors, temperature))
    return sorted(protocols)


def sides_of(subject: Subject) -> Sides:
    """Return features of bank and queries.

    Without a test part each image of the bank is a query, and all others are its bank.

    Raises:
        InputError: the dataset has no labels, or all its images are of one class.
    """
    source, name = subject.source, subject.data["name"]
    bank = with_labels(subject.features(subject.bank), name)
    classes_of(bank.labels, name)
    if source.queries is None:
        log.info(
            "data=%s has no test part: each image is classified by all others (leave one out)", name
        )
        return Sides(bank, bank, is_leave_one_out=True)
    queries = with_labels(subject.features(source.queries), name)
    return Sides(bank, queries, is_leave_one_out=False)


def with_labels(features: Features, name: str) -> Features:
    """Return the rows that have a label, which is 0 or more; the log names the others.

    Args:
        features: of labelled images.
        name: of the dataset.

    Raises:
        InputError: no row has a label.
    """
    is_missing = features.labels < 0
    num_missing = int(is_missing.sum())
    if num_missing == len(is_missing):
        raise InputError(f"data={name}: none of {num_missing:,} readable images has a label")
    if num_missing == 0:
        return features
    names = first_names(features.labelled.images, features.rows[is_missing])
    log.warning("skipped %d images without a label: %s", num_missing, names)
    return features.chosen(~is_missing)


def search_of(
    subject: Subject, sides: Sides, feature: str, num_neighbors: int, recalls: dict[str, float]
) -> Search:
    """Return the search through the bank that the settings ask for.

    Args:
        subject: its settings name the index.
        sides: bank and queries.
        feature: which of the features.
        num_neighbors: k of the recall.
        recalls: gets the recall of an approximate index, under its name in ``metrics.json``.

    Raises:
        InputError: faiss cannot build such an index of the bank.
    """
    settings = subject.settings
    bank, queries = sides.bank.of[feature], sides.queries.of[feature]
    if settings["index"] == EXACT:
        return partial(nearest_by_block, bank, device=subject.device)
    index = build_index(bank, settings["index"], INDEX_KEY)
    set_search_effort(index, settings["index"], settings["num_probes"], settings["ef_search"])
    share = recall(index, bank, queries, num_neighbors)
    log.info(
        "index %s of the %s feature finds %.4f of the exact %d neighbours",
        settings["index"],
        feature,
        share,
        num_neighbors,
    )
    # Rounded, as it is measured on a sample.
    recalls[f"knn/recall_{feature}"] = round(share, 6)
    return partial(search_index, index)


def grid_figures(votes: Mapping[str, Mapping[Protocol, Votes]]) -> dict[str, float]:
    """Return the grid under names such as ``knn_grid/backbone/k20/t0.07/top1``."""
    figures = {}
    for feature, votes_by_protocol in votes.items():
        for protocol, found in sorted(votes_by_protocol.items()):
            k, temperature = protocol
            for name, share in found.top(k).items():
                figures[f"knn_grid/{feature}/k{k}/t{temperature:g}/{name}"] = share
    return figures


def grid_table(
    votes: Mapping[str, Mapping[Protocol, Votes]], sides: Sides, settings: Mapping[str, Any]
) -> Table:
    """Return a table of top-1 with a row for every feature and k, and a column for every T."""
    protocols = next(iter(votes.values()))
    temperatures = sorted({protocol.temperature for protocol in protocols})
    ks = sorted({protocol.num_neighbors for protocol in protocols})
    rows = []
    for feature, votes_by_protocol in votes.items():
        for k in ks:
            row = [feature, str(k)]
            for temperature in temperatures:
                found = votes_by_protocol.get(Protocol(k, temperature))
                row.append("" if found is None else f"{found.accuracy(1):.4f}")
            rows.append(row)
    title = (
        f"top-1 of {len(sides.queries.labels):,} queries ({sides.kind}) "
        f"by a bank of {len(sides.bank.labels):,}, "
        f"{settings['encoder']} encoder, {settings['index']} index"
    )
    columns = ["feature", "k"]
    for temperature in temperatures:
        columns.append(f"T {temperature:g}")
    return table_of(title, columns, rows)


def measure_few_labels(subject: Subject, sides: Sides) -> tuple[dict[str, float], list[Table]]:
    """Measure top-1 with a bank of a few images of each class.

    The images are drawn several times, and the mean and the standard deviation are reported.

    Returns:
        Figures under the names of ``metrics.json`` and the table; both are empty if the settings do
        not ask for them.

    Raises:
        InputError: a number of images leaves no queries.
    """
    settings = subject.settings
    if not settings["images_per_class"]:
        return {}, []
    feature, temperature = settings["feature"], settings["temperature"]
    figures: dict[str, float] = {}
    rows = []
    for images_per_class in settings["images_per_class"]:
        top1 = []
        for seed in range(settings["num_draws"]):
            drawn = draw_per_class(sides.bank.labels, images_per_class, np.random.default_rng(seed))
            k = min(settings["num_neighbors"], len(drawn))
            top1.append(top1_of(subject, sides, drawn, Protocol(k, temperature)))
        mean, spread = float(np.mean(top1)), float(np.std(top1, ddof=1))
        figures[f"knn_few/{images_per_class}_per_class/top1"] = mean
        figures[f"knn_few/{images_per_class}_per_class/top1_std"] = spread
        rows.append(
            [str(images_per_class), f"{len(drawn):,}", str(k), f"{mean:.4f}", f"{spread:.4f}"]
        )
    title = (
        f"top-1 with few labels, {feature} feature, "
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


def top1_of(subject: Subject, sides: Sides, rows: np.ndarray, protocol: Protocol) -> float:
    """Return the accuracy with these rows of the bank alone.

    In leave one out the other rows are the queries.

    Raises:
        InputError: there is no other row.
    """
    feature = subject.settings["feature"]
    is_query = np.ones(len(sides.queries.labels), bool)
    if sides.is_leave_one_out:
        is_query[rows] = False
    if not is_query.any():
        raise InputError(
            "evaluation.images_per_class: "
            "this number of images of each class leaves none to classify"
        )
    bank = sides.bank.of[feature][rows], sides.bank.labels[rows]
    queries = sides.queries.of[feature][is_query], sides.queries.labels[is_query]
    return knn_accuracy(*bank, *queries, *protocol, subject.device).top1


def confusion_file(
    classes: np.ndarray, confusion: np.ndarray, votes: Votes, queries: Features
) -> Callable[[BinaryIO], None]:
    """Return the function that writes ``confusion.npz``.

    Args:
        classes: (classes,) class numbers.
        confusion: (classes, classes) counts, the true class by row.
        votes: of the queries.
        queries: features of the queries.
    """
    return partial(
        np.savez,
        classes=classes,
        confusion=confusion,
        accuracy=confusion.diagonal() / np.maximum(confusion.sum(axis=1), 1),
        predicted=votes.predicted,
        labels=queries.labels,
        rows=queries.rows,
    )


def class_tables(classes: np.ndarray, confusion: np.ndarray) -> list[Table]:
    """Return a table of the worst classes, and one of the most confused pairs if there are any."""
    totals = confusion.sum(axis=1)
    present = totals.nonzero()[0]
    accuracy = confusion.diagonal()[present] / totals[present]
    worst_first = np.argsort(accuracy, kind="stable")[:NUM_WORST]
    worst_rows = []
    for place in worst_first:
        true = present[place]
        worst_rows.append([str(classes[true]), f"{accuracy[place]:.4f}", f"{totals[true]:,}"])
    tables = [table_of("classes with the lowest top-1", ("class", "top-1", "queries"), worst_rows)]

    # Without the diagonal only mistakes are left.
    mistakes = confusion - np.diag(confusion.diagonal())
    most_frequent = np.argsort(-mistakes, axis=None, kind="stable")[:NUM_WORST]
    mistake_rows = []
    for true, taken_for in zip(*np.unravel_index(most_frequent, mistakes.shape), strict=True):
        count = mistakes[true, taken_for]
        if count > 0:
            share = f"{count:,} of {totals[true]:,}"
            mistake_rows.append([str(classes[true]), str(classes[taken_for]), share])
    if mistake_rows:
        columns = ("class", "taken for", "queries")
        tables.append(table_of("most confused classes", columns, mistake_rows))
    return tables


def table_of(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table with columns that are aligned to the right."""
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table
