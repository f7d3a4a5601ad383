"""The linear measurement of ``moco.evaluate``: a grid of heads on features of plain images."""

import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table

from moco.errors import InputError
from moco.evaluation.knn import class_places, classes_of, refuse_several_classes, votes_of
from moco.evaluation.knn_measurement import classification_findings, labelled_features
from moco.evaluation.linear import Heads, accuracies, held_out_rows, train_heads
from moco.evaluation.reports.embedded import Embedded
from moco.evaluation.subject import Findings, Subject, table_of

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
    from sklearn.preprocessing import StandardScaler

    settings, feature = subject.settings["linear"], subject.settings["feature"]
    name = subject.data["name"]
    check_grid(settings["lrs"], settings["weight_decays"])
    bank, queries, kind = sides_of(subject, settings)
    refuse_several_classes(bank.labelled, "evaluation=linear")
    classes = classes_of(bank.labels, name)
    warn_of_unknown(classes, queries.labels, name)
    is_held_out = hold_out(bank.labels, settings, name, settings["seed"])
    scaler = StandardScaler().fit(bank.features)
    rows = torch.from_numpy(scaler.transform(bank.features)).to(subject.device)
    query_rows = torch.from_numpy(scaler.transform(queries.features)).to(subject.device)
    own = torch.from_numpy(class_places(classes, bank.labels)).to(subject.device)

    num_epochs = settings["num_epochs"]
    if num_epochs is None:
        num_epochs = usual_epochs(len(own), settings["batch_size"])
    train = partial(
        train_heads,
        num_classes=len(classes),
        num_epochs=num_epochs,
        batch_size=settings["batch_size"],
        seed=settings["seed"],
    )
    started = time.monotonic()
    held_out = torch.from_numpy(is_held_out).to(subject.device)
    grid = train_grid(train, rows, own, held_out, settings)
    # Of equally good heads the one with more weight decay and the lower learning rate.
    best = max(grid, key=lambda head: (head.accuracy, head.weight_decay, -head.lr))
    chosen = train(rows, own, lrs=[best.lr], weight_decays=[best.weight_decay])
    seconds = time.monotonic() - started
    log.info("trained %d heads, and the best one again, in %.1f s", len(grid), seconds)
    log_edge_of_grid(best, settings["lrs"])
    conditions = {
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
    figures = {}
    for head in grid:
        key = f"linear_grid/lr{head.lr:g}/wd{head.weight_decay:g}/held_out_top1"
        figures[key] = head.accuracy
    scores = chosen.logits(query_rows)[:, :, 0].cpu().numpy()
    return classification_findings(
        "linear",
        "Linear classification of frozen features",
        votes_of(scores, classes, class_places(classes, queries.labels)),
        queries,
        conditions,
        figures,
        [grid_table(grid, num_epochs)],
    )


def sides_of(subject: Subject, settings: dict[str, Any]) -> tuple[Embedded, Embedded, str]:
    """Return training features, test features, and where the test images come from.

    Without a test part they are a share of each class's training images.

    Raises:
        InputError: the dataset has no labels.
    """
    name, feature = subject.data["name"], subject.settings["feature"]
    bank = labelled_features(subject, subject.bank)[feature]
    if subject.source.queries is not None:
        return bank, labelled_features(subject, subject.source.queries)[feature], "test"
    # Another stream of numbers than that of the images that choose the head.
    is_query = hold_out(bank.labels, settings, name, [settings["seed"], 1])
    log.info(
        f"data={name} has no test part: "
        f"{is_query.sum():,} of {len(is_query):,} images are kept for the test"
    )
    return bank.chosen(~is_query), bank.chosen(is_query), "held out"


def hold_out(
    labels: np.ndarray, settings: dict[str, Any], name: str, seed: int | list[int]
) -> np.ndarray:
    """Return which of the training images are held out, (images,) bool, see `held_out_rows`.

    Raises:
        InputError: none can be. The message names the dataset.
    """
    generator = np.random.default_rng(seed)
    is_held_out = held_out_rows(labels, settings["held_out"], generator)
    if not is_held_out.any():
        raise InputError(
            f"data={name}: no class has two labelled training images, "
            "one to train on and one to hold out"
        )
    return is_held_out


def warn_of_unknown(classes: np.ndarray, labels: np.ndarray, name: str) -> None:
    """Warn of test labels (queries,) whose classes have no training images."""
    num_unknown = int((class_places(classes, labels) == len(classes)).sum())
    if num_unknown:
        log.warning(
            f"data={name}: {num_unknown:,} of {len(labels):,} test images are of classes without "
            "training images, and count as wrong"
        )


def check_grid(lrs: Sequence[float], weight_decays: Sequence[float]) -> None:
    """Raise InputError if the grid is empty, or a value is not finite or too low."""
    # A NaN fails every comparison, so it is refused, too.
    if not lrs or not all(0 < lr < math.inf for lr in lrs):
        raise InputError(f"evaluation.linear.lrs={list(lrs)}: expected finite numbers above 0")
    if not weight_decays or not all(0 <= decay < math.inf for decay in weight_decays):
        raise InputError(
            f"evaluation.linear.weight_decays={list(weight_decays)}: "
            "expected finite numbers of 0 or more"
        )


def usual_epochs(num_rows: int, batch_size: int) -> int:
    """Return the number of epochs where the settings do not give it."""
    steps_per_epoch = math.ceil(num_rows / batch_size)
    return max(NUM_EPOCHS, math.ceil(MIN_STEPS / steps_per_epoch))


def train_grid(
    train: Callable[..., Heads],
    rows: torch.Tensor,
    own: torch.Tensor,
    is_held_out: torch.Tensor,
    settings: dict[str, Any],
) -> list[Head]:
    """Train a head for each learning rate and weight decay, and measure it on the held-out rows.

    Args:
        train: `train_heads` with the number of classes and epochs.
        rows: (rows, width) standardised features.
        own: (rows,) their classes.
        is_held_out: (rows,) bool.
        settings: with the learning rates and weight decays.
    """
    pairs = list(
        itertools.product(sorted(set(settings["lrs"])), sorted(set(settings["weight_decays"])))
    )
    lrs, decays = zip(*pairs, strict=True)
    heads = train(rows[~is_held_out], own[~is_held_out], lrs=lrs, weight_decays=decays)
    found = accuracies(heads, rows[is_held_out], own[is_held_out])
    grid = []
    for (lr, decay), accuracy in zip(pairs, found, strict=True):
        grid.append(Head(lr, decay, float(accuracy)))
    return grid


def log_edge_of_grid(best: Head, lrs: Sequence[float]) -> None:
    """Log that a better learning rate may lie beyond the grid, if the best is at its edge."""
    if len(set(lrs)) > 1 and best.lr in (min(lrs), max(lrs)):
        log.info(
            "the best learning rate, %g, is at the edge of evaluation.linear.lrs: "
            "others beyond it may be better",
            best.lr,
        )


def grid_table(grid: Sequence[Head], num_epochs: int) -> Table:
    """Return a table of the accuracy on held-out images by learning rate and weight decay."""
    title = f"Held-out top-1 after {num_epochs:,} epochs, by lr (rows) and weight decay (columns)"
    decays = sorted({head.weight_decay for head in grid})
    columns = ["lr", *(f"{decay:g}" for decay in decays)]
    rows = []
    for lr, heads in itertools.groupby(grid, key=lambda head: head.lr):
        rows.append([f"{lr:g}", *(f"{head.accuracy:.4f}" for head in heads)])
    return table_of(title, columns, rows)
