"""kNN classification of frozen features, as ``moco.evaluate`` measures it: a grid of protocols from one pass.

Letters: M bank size, Q queries, D feature width, k neighbours.
"""

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.table import Table

from moco.data.sources.source import Labelled
from moco.errors import InputError, printable
from moco.evaluation.approximate import ApproximateIndex, recall
from moco.evaluation.knn import (
    KNNResult,
    Protocol,
    Search,
    Votes,
    capped,
    classify,
    protocol_figures,
    scores_of,
)
from moco.evaluation.label_free_measurement import NOTHING, measure_label_free
from moco.evaluation.neighbors import nearest_by_block
from moco.evaluation.reports.embedded import Embedded
from moco.evaluation.reports.knn_plots import Searched, knn_plots, save_png
from moco.evaluation.reports.projections import check_map
from moco.evaluation.subject import Features, Findings, Subject

log = logging.getLogger(__name__)

NUM_NEIGHBORS = (1, 10, 20, 100, 200)
TEMPERATURES = (0.07, 0.1, 0.2)
SHOWN = 5  # worst classes, most confused pairs


@dataclass(frozen=True)
class Sides:
    """Bank and queries."""

    bank: Features
    queries: Features
    of_bank: Labelled
    of_queries: Labelled
    is_leave_one_out: bool
    """The queries are the bank, and none has a vote on itself."""

    @property
    def own_rows(self) -> np.ndarray | None:
        return np.arange(len(self.bank.labels)) if self.is_leave_one_out else None

    @property
    def most_neighbors(self) -> int:
        return len(self.bank.labels) - self.is_leave_one_out


def measure_knn(subject: Subject) -> Findings:
    """Accuracy of the weighted vote under the protocol of the settings, and under a grid of others.

    Raises:
        InputError: the data set has no labels, all are of one class, or the map needs a package that is missing.
    """
    check_map(subject.settings["map"])
    sides, settings = sides_of(subject), subject.settings
    main = Protocol(
        capped(settings["num_neighbors"], sides.most_neighbors), settings["temperature"]
    )
    grid = {
        Protocol(k, t) for k in NUM_NEIGHBORS if k <= sides.most_neighbors for t in TEMPERATURES
    } | {main}
    votes: dict[str, dict[Protocol, Votes]] = {}
    recalls: dict[str, float] = {}
    for feature in subject.feature_names:
        search, found = searcher(subject, sides, feature, main.num_neighbors)
        recalls |= found
        if feature == settings["feature"]:
            chosen_search = search
        votes[feature] = classify(
            search,
            sides.bank.labels,
            sides.queries.of[feature],
            sides.queries.labels,
            sorted(grid),
            sides.own_rows,
        )
    chosen = votes[settings["feature"]][main]
    sizes = len(sides.bank.labels), len(sides.queries.labels)
    k = main.num_neighbors
    tops = chosen.top(k)
    result = KNNResult(tops["top1"], tops.get("top5"), k, *sizes)
    few, few_table = few_label_figures(subject, sides)
    classes, confusion = confusion_matrix(sides.queries.labels, chosen.predicted)
    shares = confusion.diagonal() / np.maximum(confusion.sum(axis=1), 1)
    kind = {"knn/encoder": settings["encoder"], "knn/index": settings["index"]}
    kind["knn/queries"] = "leave one out" if sides.is_leave_one_out else "test"
    label_free = NOTHING
    if settings["label_free"]:
        label_free = measure_label_free(subject, sides.bank, sides.of_bank)
    images = {}
    if settings["plots"]:
        searched = searched_of(sides, chosen_search, settings["feature"])
        images = knn_plots(subject, searched, confusion, classes, label_free.views)
    return Findings(
        "kNN classification of frozen features",
        scores_of(result),
        {**protocol_figures(result, main.temperature, settings["feature"]), **kind, **recalls},
        {**grid_figures(votes), **few, **label_free.figures},
        [grid_table(votes, sides, kind), *few_table, *class_tables(classes, confusion), *label_free.tables],
        {
            "confusion.npz": lambda file: np.savez(
                file, classes=classes, confusion=confusion, accuracy=shares, predicted=chosen.predicted,
                labels=sides.queries.labels, rows=sides.queries.rows,
            ),
            **{name: partial(save_png, image) for name, image in images.items()},
        },
    )  # fmt: skip


def sides_of(subject: Subject) -> Sides:
    """Features of bank and queries; without a test part each image of the bank is a query to all others.

    Raises:
        InputError: the data set has no labels, or all its images are of one class.
    """
    source, name = subject.source, subject.data["name"]
    if source.bank is None:
        raise InputError(
            f"data={name}: kNN needs labelled training and test images, and this set has none"
        )
    bank = with_labels(subject.features(source.bank), source.bank, name)
    classes = np.unique(bank.labels)
    if len(classes) == 1:
        raise InputError(
            f"data={name}: all {len(bank.labels):,} images of the bank are of class {classes[0]}; kNN needs two"
        )
    if source.queries is None:
        log.info(
            "data=%s has no test part: each image is classified by all others (leave one out)", name
        )
        return Sides(bank, bank, source.bank, source.bank, is_leave_one_out=True)
    queries = with_labels(subject.features(source.queries), source.queries, name)
    return Sides(bank, queries, source.bank, source.queries, is_leave_one_out=False)


def with_labels(features: Features, labelled: Labelled, name: str) -> Features:
    """Those images that have a label, which is 0 or more; the others are named in the log.

    Raises:
        InputError: none has.
    """
    missing = features.labels < 0
    if missing.all():
        raise InputError(
            f"data={name}: none of {len(missing):,} images that can be read has a label"
        )
    if not missing.any():
        return features
    first = [printable(labelled.images.name(int(row))) for row in features.rows[missing][:3]]
    more = ", ..." if missing.sum() > 3 else ""
    log.warning("left out %d images without a label: %s%s", missing.sum(), ", ".join(first), more)
    kept = {feature: values[~missing] for feature, values in features.of.items()}
    return Features(kept, features.labels[~missing], features.rows[~missing])


def searcher(
    subject: Subject, sides: Sides, feature: str, num_neighbors: int
) -> tuple[Search, dict[str, float]]:
    """The search through a bank as configured, and the recall of one that is not exact, for ``metrics.json``."""
    settings, bank = subject.settings, sides.bank.of[feature]
    if settings["index"] == "flat":
        return partial(nearest_by_block, bank, device=subject.device), {}
    index = ApproximateIndex(bank, settings["index"], settings["num_probes"], settings["ef_search"])
    share = recall(index, bank, sides.queries.of[feature], num_neighbors)
    log.info(
        "%s index of the %s feature finds %.4f of the exact %d neighbours",
        settings["index"],
        feature,
        share,
        num_neighbors,
    )
    return index.search, {f"knn/recall_{feature}": round(share, 6)}


def searched_of(sides: Sides, search: Search, feature: str) -> Searched:
    """Bank and queries by one feature, with their images."""
    bank, queries = (
        Embedded(side.of[feature], side.labels, labelled, side.rows)
        for side, labelled in ((sides.bank, sides.of_bank), (sides.queries, sides.of_queries))
    )
    return Searched(bank, queries, search, sides.own_rows)


def grid_figures(votes: Mapping[str, Mapping[Protocol, Votes]]) -> dict[str, float]:
    """Under the names of ``metrics.json``, such as ``knn_grid/backbone/k20/t0.07/top1``."""
    figures = {}
    for feature, found in votes.items():
        for k, temperature in sorted(found):
            for name, share in found[Protocol(k, temperature)].top(k).items():
                figures[f"knn_grid/{feature}/k{k}/t{temperature:g}/{name}"] = share
    return figures


def grid_table(
    votes: Mapping[str, Mapping[Protocol, Votes]], sides: Sides, kind: Mapping[str, str]
) -> Table:
    """Top-1 for every feature and k by row and T by column."""
    protocols = sorted(next(iter(votes.values())))
    temperatures = sorted({temperature for _, temperature in protocols})
    table = Table(
        title=f"top-1 of {len(sides.queries.labels):,} queries ({kind['knn/queries']}) by a bank of "
        f"{len(sides.bank.labels):,}, {kind['knn/encoder']} encoder, {kind['knn/index']} index",
        title_justify="left",
    )
    for name in ("feature", "k", *(f"T {temperature:g}" for temperature in temperatures)):
        table.add_column(name, justify="right")
    for feature, k in itertools.product(votes, sorted({k for k, _ in protocols})):
        found = votes[feature]
        cells = (found.get(Protocol(k, temperature)) for temperature in temperatures)
        shares = [f"{cell.accuracy(1):.4f}" if cell else "" for cell in cells]
        table.add_row(feature, str(k), *shares)
    return table


def few_label_figures(subject: Subject, sides: Sides) -> tuple[dict[str, float], list[Table]]:
    """Top-1 with a bank of n images of each class: mean and standard deviation over several draws.

    Raises:
        InputError: a number of images leaves no queries.
    """
    settings, numbers = subject.settings, subject.settings["images_per_class"]
    if not numbers:
        return {}, []
    feature, temperature = settings["feature"], settings["temperature"]
    table = Table(
        title=f"top-1 with few labels, {feature} feature, T {temperature:g}, {settings['num_draws']} draws",
        title_justify="left",
    )
    for name in ("images per class", "bank", "k", "mean", "standard deviation"):
        table.add_column(name, justify="right")
    figures: dict[str, float] = {}
    for number in numbers:
        draws = [
            drawn(sides.bank.labels, number, np.random.default_rng(draw))
            for draw in range(settings["num_draws"])
        ]
        k = min(settings["num_neighbors"], len(draws[0]))
        tops = [
            top1_of(sides, rows, feature, Protocol(k, temperature), subject.device)
            for rows in draws
        ]
        mean, spread = float(np.mean(tops)), float(np.std(tops, ddof=1))
        figures |= {
            f"knn_few/{number}_per_class/top1": mean,
            f"knn_few/{number}_per_class/top1_std": spread,
        }
        table.add_row(str(number), f"{len(draws[0]):,}", str(k), f"{mean:.4f}", f"{spread:.4f}")
    return figures, [table]


def drawn(labels: np.ndarray, number: int, generator: np.random.Generator) -> np.ndarray:
    """Rows of `number` random images of each class, of all of a class that has fewer; rising."""
    order = generator.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    place = np.arange(len(labels)) - np.repeat(starts, counts)
    return np.sort(order[place < number])


def top1_of(
    sides: Sides, rows: np.ndarray, feature: str, protocol: Protocol, device: torch.device
) -> float:
    """Accuracy with these rows of the bank alone; of leave-one-out the other rows are the queries."""
    is_query = np.ones(len(sides.queries.labels), bool)
    if sides.is_leave_one_out:
        is_query[rows] = False
    if not is_query.any():
        raise InputError(
            "evaluation.images_per_class: so many images of each class leave none to classify"
        )
    queries, labels = sides.queries.of[feature][is_query], sides.queries.labels[is_query]
    search = partial(nearest_by_block, sides.bank.of[feature][rows], device=device)
    return classify(search, sides.bank.labels[rows], queries, labels, [protocol])[
        protocol
    ].accuracy(1)


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Class numbers (classes,) and how many of each true class, by row, were taken for each class, by column."""
    classes, numbers = np.unique(np.concatenate([labels, predicted]), return_inverse=True)
    cells = numbers[: len(labels)] * len(classes) + numbers[len(labels) :]
    return classes, np.bincount(cells, minlength=len(classes) ** 2).reshape(len(classes), -1)


def class_tables(classes: np.ndarray, confusion: np.ndarray) -> Sequence[Table]:
    """The classes with the lowest accuracy, and the pairs that are most often taken for one another."""
    totals = confusion.sum(axis=1)
    present = totals.nonzero()[0]
    shares = confusion.diagonal()[present] / totals[present]
    worst = present[np.argsort(shares, kind="stable")[:SHOWN]]
    rows = [
        (str(classes[i]), f"{confusion[i, i] / totals[i]:.4f}", f"{totals[i]:,}") for i in worst
    ]
    mistakes = confusion - np.diag(confusion.diagonal())
    cells = np.argsort(-mistakes, axis=None, kind="stable")[:SHOWN]
    pairs = [divmod(int(cell), len(classes)) for cell in cells if mistakes.flat[cell]]
    mixed = [
        (str(classes[i]), str(classes[j]), f"{mistakes[i, j]:,} of {totals[i]:,}") for i, j in pairs
    ]
    return [
        table_of("classes with the lowest top-1", ("class", "top-1", "queries"), rows),
        *(
            [table_of("most confused classes", ("class", "taken for", "queries"), mixed)]
            if mixed
            else []
        ),
    ]


def table_of(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """A table of text."""
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table
