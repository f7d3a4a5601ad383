"""Linear classification of frozen features, as ``moco.evaluate`` measures it: one pass through the images, then a grid.

Letters: M training rows, Q queries, D feature width, G heads, C classes.
"""

import itertools
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table

from moco.data.sources.source import Labelled
from moco.errors import InputError
from moco.evaluation.knn import Votes, ranked
from moco.evaluation.knn_measurement import class_tables, confusion_matrix, with_labels
from moco.evaluation.linear import BLOCK, Heads, accuracies, held_out_rows, scale_of, train_heads
from moco.evaluation.subject import Features, Findings, Subject

log = logging.getLogger(__name__)

MIN_STEPS = 2000  # what evaluation.linear.num_epochs=null makes of small sets
NUM_EPOCHS = 30  # and of larger ones


@dataclass(frozen=True)
class Classes:
    """The classes of the training labels."""

    names: np.ndarray
    """(C,) class numbers, rising."""

    def places(self, labels: np.ndarray) -> np.ndarray:
        """Where each label is among `names`; C stands for one that is not."""
        found = np.minimum(np.searchsorted(self.names, labels), len(self.names) - 1)
        return np.where(self.names[found] == labels, found, len(self.names))


class Head(NamedTuple):
    """One of the grid."""

    lr: float
    weight_decay: float
    accuracy: float
    """On the images that were held out of training."""


def measure_linear(subject: Subject) -> Findings:
    """Accuracy on the test part of the head that is best on a part of the training labels, trained again on all of them.

    Raises:
        InputError: settings out of range, or labels that no classifier can be chosen by.
    """
    settings, feature, name = (
        subject.settings["linear"],
        subject.settings["feature"],
        subject.data["name"],
    )
    check_grid(settings["lrs"], settings["weight_decays"])
    bank, queries, kind = sides_of(subject, settings)
    classes = classes_of(bank.labels, name)
    warn_of_unknown(classes, queries.labels, name)
    is_held_out = held_out_rows(
        bank.labels, settings["held_out"], np.random.default_rng(settings["seed"])
    )
    if not is_held_out.any():
        raise InputError(
            f"data={name}: no class has two labelled training images, one to train on and one to choose by"
        )
    scale = scale_of(bank.of[feature])
    rows, query_rows = (
        torch.from_numpy(scale.applied(side.of[feature])).to(subject.device)
        for side in (bank, queries)
    )
    own = torch.from_numpy(classes.places(bank.labels)).to(subject.device)

    training = {
        "num_epochs": settings["num_epochs"] or usual_epochs(len(own), settings["batch_size"]),
        "batch_size": settings["batch_size"],
        "seed": settings["seed"],
    }
    started = time.monotonic()
    grid = grid_of(
        rows,
        own,
        torch.from_numpy(is_held_out).to(subject.device),
        len(classes.names),
        settings,
        training,
    )
    best = max(grid, key=lambda head: (head.accuracy, head.weight_decay, -head.lr))
    chosen = train_heads(rows, own, len(classes.names), [best.lr], [best.weight_decay], **training)
    log.info(
        "trained %d heads, and the best one again, in %.1f s", len(grid), time.monotonic() - started
    )
    say_if_at_the_edge(best, settings["lrs"])
    protocol = {
        "linear/lr": best.lr, "linear/weight_decay": best.weight_decay, "linear/held_out_top1": round(best.accuracy, 6),
        "linear/num_epochs": training["num_epochs"], "linear/batch_size": training["batch_size"],
        "linear/scaling": "standardised", "linear/num_training": len(own), "linear/num_queries": len(query_rows),
        "linear/queries": kind, "linear/feature": feature, "linear/encoder": subject.settings["encoder"],
    }  # fmt: skip
    votes = votes_of(scores_of(chosen, query_rows), classes, queries.labels)
    figures = {
        f"linear_grid/lr{lr:g}/wd{decay:g}/held_out_top1": accuracy for lr, decay, accuracy in grid
    }
    title = "linear classification of frozen features"
    return findings(
        "linear", title, votes, queries, protocol, [grid_table(grid, protocol)], figures
    )


def sides_of(subject: Subject, settings: dict[str, Any]) -> tuple[Features, Features, str]:
    """Training and test features, and what the latter are; without a test part, a share of each class's training images.

    Raises:
        InputError: the data set has no labels.
    """
    source, name = subject.source, subject.data["name"]
    bank = with_labels(subject.features(labelled_bank(subject)), labelled_bank(subject), name)
    if source.queries is not None:
        return bank, with_labels(subject.features(source.queries), source.queries, name), "test"
    is_query = held_out_rows(
        bank.labels, settings["held_out"], np.random.default_rng([settings["seed"], 1])
    )
    if not is_query.any():
        raise InputError(
            f"data={name}: there is no test part, and no class has two images of which one could serve"
        )
    log.info(
        "data=%s has no test part: %d of %d images are kept for the test",
        name,
        is_query.sum(),
        len(is_query),
    )
    return chosen_rows(bank, ~is_query), chosen_rows(bank, is_query), "held out"


def labelled_bank(subject: Subject) -> Labelled:
    """The labelled training images.

    Raises:
        InputError: there are none.
    """
    if subject.source.bank is None:
        raise InputError(
            f"data={subject.data['name']}: a linear classifier needs labelled training images, and this set has none"
        )
    return subject.source.bank


def chosen_rows(features: Features, is_chosen: np.ndarray) -> Features:
    """Those of the rows."""
    kept = {name: values[is_chosen] for name, values in features.of.items()}
    return Features(kept, features.labels[is_chosen], features.rows[is_chosen])


def classes_of(labels: np.ndarray, name: str) -> Classes:
    """Raises InputError if all are of one class."""
    classes = np.unique(labels)
    if len(classes) == 1:
        raise InputError(
            f"data={name}: all {len(labels):,} training images are of class {classes[0]}; a classifier needs two"
        )
    return Classes(classes)


def warn_of_unknown(classes: Classes, labels: np.ndarray, name: str) -> None:
    """Name the classes of the test labels that training lacks."""
    unknown = labels[classes.places(labels) == len(classes.names)]
    if len(unknown):
        names = np.unique(unknown)
        more = ", ..." if len(names) > 5 else ""
        log.warning(
            "data=%s: %d of %d test images are of classes without training images, and count as wrong: %s%s",
            name, len(unknown), len(labels), ", ".join(map(str, names[:5])), more,
        )  # fmt: skip


def check_grid(lrs: Sequence[float], weight_decays: Sequence[float]) -> None:
    """Raises InputError if there are none, or one is not finite or too low."""
    if not lrs or not all(math.isfinite(lr) and lr > 0 for lr in lrs):
        raise InputError(f"evaluation.linear.lrs={list(lrs)}: expected finite numbers above 0")
    if not weight_decays or not all(math.isfinite(decay) and decay >= 0 for decay in weight_decays):
        raise InputError(
            f"evaluation.linear.weight_decays={list(weight_decays)}: expected finite numbers of 0 or more"
        )


def usual_epochs(num_rows: int, batch_size: int) -> int:
    """Where the settings say nothing."""
    return max(NUM_EPOCHS, math.ceil(MIN_STEPS / math.ceil(num_rows / batch_size)))


def grid_of(
    rows: torch.Tensor,
    own: torch.Tensor,
    is_held_out: torch.Tensor,
    num_classes: int,
    settings: dict[str, Any],
    training: dict[str, Any],
) -> list[Head]:
    """A head for each learning rate and weight decay, trained on the rows (M, D) that are not held out."""
    pairs = list(
        itertools.product(sorted(set(settings["lrs"])), sorted(set(settings["weight_decays"])))
    )
    lrs, decays = zip(*pairs, strict=True)
    heads = train_heads(rows[~is_held_out], own[~is_held_out], num_classes, lrs, decays, **training)
    found = accuracies(heads, rows[is_held_out], own[is_held_out]).tolist()
    return [Head(lr, decay, accuracy) for (lr, decay), accuracy in zip(pairs, found, strict=True)]


def say_if_at_the_edge(best: Head, lrs: Sequence[float]) -> None:
    """A better learning rate may lie outside."""
    if len(set(lrs)) > 1 and best.lr in (min(lrs), max(lrs)):
        side = "smallest" if best.lr == min(lrs) else "largest"
        log.info(
            "the best learning rate, %g, is the %s of evaluation.linear.lrs: others beyond may be better",
            best.lr,
            side,
        )


def scores_of(heads: Heads, features: torch.Tensor) -> np.ndarray:
    """Of the only head: logits (Q, C)."""
    return np.concatenate(
        [heads.logits(part)[:, :, 0].cpu().numpy() for part in features.split(BLOCK)]
    )


def votes_of(scores: np.ndarray, classes: Classes, labels: np.ndarray) -> Votes:
    """What the scores (Q, C) say of each query."""
    predicted, rank = ranked(scores, classes.places(labels))
    return Votes(classes.names[predicted], rank)


def findings(
    group: str,
    title: str,
    votes: Votes,
    queries: Features,
    protocol: dict[str, Any],
    tables: list[Table],
    details: dict[str, Any],
) -> Findings:
    """Of any classifier: its accuracy as ``GROUP/top1`` and ``GROUP/top5``, and by class."""
    classes, confusion = confusion_matrix(queries.labels, votes.predicted)
    shares = confusion.diagonal() / np.maximum(confusion.sum(axis=1), 1)
    return Findings(
        title,
        {f"{group}/top1": votes.accuracy(1), f"{group}/top5": votes.accuracy(5)},
        protocol,
        details,
        [*tables, *class_tables(classes, confusion)],
        {
            "confusion.npz": lambda file: np.savez(
                file, classes=classes, confusion=confusion, accuracy=shares, predicted=votes.predicted,
                labels=queries.labels, rows=queries.rows,
            )
        },
    )  # fmt: skip


def grid_table(grid: Sequence[Head], protocol: dict[str, Any]) -> Table:
    """Accuracy on the held-out training images, learning rates by row and weight decays by column."""
    decays = sorted({head.weight_decay for head in grid})
    table = Table(
        title=f"top-1 on held-out training images after {protocol['linear/num_epochs']} epochs: "
        "learning rate by row, weight decay by column",
        title_justify="left",
    )
    for name in ("", *(f"{decay:g}" for decay in decays)):
        table.add_column(name, justify="right")
    for lr, row in itertools.groupby(grid, key=lambda head: head.lr):
        table.add_row(f"{lr:g}", *(f"{head.accuracy:.4f}" for head in row))
    return table
