"""The linear measurement of ``moco.evaluate``: a grid of heads on features of plain images."""

import itertools
import logging
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table

from moco.errors import InputError
from moco.evaluation.knn import Votes, class_places, classes_of, confusion_matrix, rank_classes
from moco.evaluation.knn_measurement import (
    class_tables,
    confusion_file,
    table_of,
    with_labels,
)
from moco.evaluation.linear import (
    ROWS_AT_ONCE,
    Heads,
    accuracies,
    held_out_rows,
    scale_of,
    train_heads,
)
from moco.evaluation.subject import Features, Findings, Subject

log = logging.getLogger(__name__)

# With evaluation.linear.num_epochs=null a small dataset is trained on for this number of steps.
MIN_STEPS = 2000
# A larger dataset is trained on for this number of epochs.
NUM_EPOCHS = 30


class Head(NamedTuple):
    """One head of the grid."""

    lr: float
    weight_decay: float
    accuracy: float
    """On the images that were held out of training."""


def measure_linear(subject: Subject) -> Findings:
    """Measure the test accuracy of the head that is best on a part of the training labels.

    The best head is trained again on all training labels.

    Raises:
        InputError: settings out of range, or labels that do not allow to choose a classifier.
    """
    settings, feature = subject.settings["linear"], subject.settings["feature"]
    name = subject.data["name"]
    check_grid(settings["lrs"], settings["weight_decays"])
    bank, queries, kind = sides_of(subject, settings)
    classes = classes_of(bank.labels, name)
    warn_of_unknown(classes, queries.labels, name)
    generator = np.random.default_rng(settings["seed"])
    is_held_out = held_out_rows(bank.labels, settings["held_out"], generator)
    if not is_held_out.any():
        raise InputError(
            f"data={name}: no class has two labelled training images, "
            "one to train on and one to choose by"
        )
    scale = scale_of(bank.of[feature])
    rows = torch.from_numpy(scale.applied(bank.of[feature])).to(subject.device)
    query_rows = torch.from_numpy(scale.applied(queries.of[feature])).to(subject.device)
    own = torch.from_numpy(class_places(classes, bank.labels)).to(subject.device)
    held_out = torch.from_numpy(is_held_out).to(subject.device)

    num_epochs = settings["num_epochs"]
    if num_epochs is None:
        num_epochs = usual_epochs(len(own), settings["batch_size"])
    training = {
        "num_epochs": num_epochs,
        "batch_size": settings["batch_size"],
        "seed": settings["seed"],
    }
    num_classes = len(classes)
    started = time.monotonic()
    grid = train_grid(rows, own, held_out, num_classes, settings, training)
    # Of equally good heads the one with more weight decay and the lower learning rate.
    best = max(grid, key=lambda head: (head.accuracy, head.weight_decay, -head.lr))
    chosen = train_heads(rows, own, num_classes, [best.lr], [best.weight_decay], **training)
    seconds = time.monotonic() - started
    log.info("trained %d heads, and the best one again, in %.1f s", len(grid), seconds)
    log_edge_of_grid(best, settings["lrs"])
    protocol = {
        "lr": best.lr,
        "weight_decay": best.weight_decay,
        "held_out_top1": round(best.accuracy, 6),
        "num_epochs": num_epochs,
        "batch_size": settings["batch_size"],
        "scaling": "standardised",
        "num_training": len(own),
        "num_queries": len(query_rows),
        "queries": kind,
        "feature": feature,
        "encoder": subject.settings["encoder"],
    }
    votes = votes_of(scores_of(chosen, query_rows), classes, queries.labels)
    figures = {}
    for head in grid:
        key = f"linear_grid/lr{head.lr:g}/wd{head.weight_decay:g}/held_out_top1"
        figures[key] = head.accuracy
    title = "linear classification of frozen features"
    tables = [grid_table(grid, num_epochs)]
    return linear_findings("linear", title, votes, queries, protocol, tables, figures)


def sides_of(subject: Subject, settings: dict[str, Any]) -> tuple[Features, Features, str]:
    """Return training features, test features, and where the test images come from.

    Without a test part they are a share of each class's training images.

    Raises:
        InputError: the dataset has no labels.
    """
    source, name = subject.source, subject.data["name"]
    bank = with_labels(subject.features(subject.bank), name)
    if source.queries is not None:
        queries = with_labels(subject.features(source.queries), name)
        return bank, queries, "test"
    # Another stream of numbers than that of the images that choose the head.
    generator = np.random.default_rng([settings["seed"], 1])
    is_query = held_out_rows(bank.labels, settings["held_out"], generator)
    if not is_query.any():
        raise InputError(
            f"data={name}: there is no test part, "
            "and no class has two images of which one could serve"
        )
    num_queries = int(is_query.sum())
    log.info(
        "data=%s has no test part: %d of %d images are kept for the test",
        name,
        num_queries,
        len(is_query),
    )
    return bank.chosen(~is_query), bank.chosen(is_query), "held out"


def warn_of_unknown(classes: np.ndarray, labels: np.ndarray, name: str) -> None:
    """Warn of test labels (queries,) whose classes have no training images."""
    num_unknown = int((class_places(classes, labels) == len(classes)).sum())
    if num_unknown:
        log.warning(
            "data=%s: %d of %d test images are of classes without training images, "
            "and count as wrong",
            name,
            num_unknown,
            len(labels),
        )


def check_grid(lrs: Sequence[float], weight_decays: Sequence[float]) -> None:
    """Raise InputError if the grid is empty, or a value is not finite or too low."""
    if not lrs or min(lrs) <= 0 or not np.isfinite(lrs).all():
        raise InputError(f"evaluation.linear.lrs={list(lrs)}: expected finite numbers above 0")
    if not weight_decays or min(weight_decays) < 0 or not np.isfinite(weight_decays).all():
        raise InputError(
            f"evaluation.linear.weight_decays={list(weight_decays)}: "
            "expected finite numbers of 0 or more"
        )


def usual_epochs(num_rows: int, batch_size: int) -> int:
    """Return the number of epochs where the settings do not give it."""
    steps_per_epoch = math.ceil(num_rows / batch_size)
    return max(NUM_EPOCHS, math.ceil(MIN_STEPS / steps_per_epoch))


def train_grid(
    rows: torch.Tensor,
    own: torch.Tensor,
    is_held_out: torch.Tensor,
    num_classes: int,
    settings: dict[str, Any],
    training: dict[str, Any],
) -> list[Head]:
    """Train a head for each learning rate and weight decay, and measure it on the held-out rows.

    Args:
        rows: (rows, width) standardised features.
        own: (rows,) their classes.
        is_held_out: (rows,) bool.
        num_classes: number of classes.
        settings: with the learning rates and weight decays.
        training: arguments of `train_heads`.
    """
    pairs = list(
        itertools.product(sorted(set(settings["lrs"])), sorted(set(settings["weight_decays"])))
    )
    lrs = [lr for lr, _ in pairs]
    decays = [decay for _, decay in pairs]
    heads = train_heads(rows[~is_held_out], own[~is_held_out], num_classes, lrs, decays, **training)
    found = accuracies(heads, rows[is_held_out], own[is_held_out])
    grid = []
    for (lr, decay), accuracy in zip(pairs, found, strict=True):
        grid.append(Head(lr, decay, float(accuracy)))
    return grid


def log_edge_of_grid(best: Head, lrs: Sequence[float]) -> None:
    """Log that a better learning rate may lie beyond the grid, if the best is at its edge."""
    if len(set(lrs)) == 1 or best.lr not in (min(lrs), max(lrs)):
        return
    side = "smallest" if best.lr == min(lrs) else "largest"
    log.info(
        "the best learning rate, %g, is the %s of evaluation.linear.lrs: "
        "others beyond it may be better",
        best.lr,
        side,
    )


def scores_of(heads: Heads, features: torch.Tensor) -> np.ndarray:
    """Return the logits (queries, classes) of a single head."""
    scores = []
    for block in features.split(ROWS_AT_ONCE):
        scores.append(heads.logits(block)[:, :, 0].cpu().numpy())
    return np.concatenate(scores)


def votes_of(scores: np.ndarray, classes: np.ndarray, labels: np.ndarray) -> Votes:
    """Return the predictions that scores (queries, classes) make."""
    best, rank = rank_classes(scores, class_places(classes, labels))
    return Votes(classes[best], rank)


def linear_findings(
    group: str,
    title: str,
    votes: Votes,
    queries: Features,
    protocol: dict[str, Any],
    tables: list[Table],
    details: dict[str, Any],
) -> Findings:
    """Return the findings of a classifier, with all figures under ``GROUP/NAME``."""
    classes, confusion = confusion_matrix(queries.labels, votes.predicted)
    return Findings(
        title=title,
        scores={f"{group}/top1": votes.accuracy(1), f"{group}/top5": votes.accuracy(5)},
        protocol={f"{group}/{name}": value for name, value in protocol.items()},
        details=details,
        tables=[*tables, *class_tables(classes, confusion)],
        files={"confusion.npz": confusion_file(classes, confusion, votes, queries)},
    )


def grid_table(grid: Sequence[Head], num_epochs: int) -> Table:
    """Return a table of the accuracy on held-out images by learning rate and weight decay."""
    title = (
        f"top-1 on held-out training images after {num_epochs} epochs: "
        "learning rate by row, weight decay by column"
    )
    decays = sorted({head.weight_decay for head in grid})
    columns = ["", *(f"{decay:g}" for decay in decays)]
    rows = []
    for lr, heads in itertools.groupby(grid, key=lambda head: head.lr):
        rows.append([f"{lr:g}", *(f"{head.accuracy:.4f}" for head in heads)])
    return table_of(title, columns, rows)
