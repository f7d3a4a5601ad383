"""The linear probe's grid against scikit-learn's logistic regression, tuned over C, on the same features.

    python -m moco.embed checkpoint=PATH data=cifar10 split=train output=train.npz     # and split=test output=test.npz
    OMP_NUM_THREADS=1 python scripts/bench_linear.py train.npz test.npz [--repeats 1]

Both get standardised features, hold out the same tenth of the training labels to choose by, train the best once more on all
of them, and are reported on the test features. scikit-learn's C covers the weight decays of our grid, and more.
"""

import argparse
import itertools
import time
from collections.abc import Callable

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from moco.config.linear import LinearConfig
from moco.evaluation.linear import accuracies, held_out_rows, scale_of, train_heads
from moco.evaluation.linear_measurement import usual_epochs

Data = tuple[np.ndarray, np.ndarray]
Found = tuple[float, str]
STRENGTHS = np.logspace(-4, 2, 7)  # C


def ours(train: Data, test: Data, is_held_out: np.ndarray) -> Found:
    """Test accuracy, and what was chosen."""
    settings = LinearConfig()
    (rows, labels), (test_rows, test_labels) = (
        [torch.from_numpy(part) for part in side] for side in (train, test)
    )
    held_out, num_classes = torch.from_numpy(is_held_out), int(labels.max()) + 1
    epochs = usual_epochs(len(rows), settings.batch_size)
    training = {"num_epochs": epochs, "batch_size": settings.batch_size, "seed": settings.seed}
    grid = list(itertools.product(settings.lrs, settings.weight_decays))
    lrs, decays = zip(*grid, strict=True)
    heads = train_heads(rows[~held_out], labels[~held_out], num_classes, lrs, decays, **training)
    lr, decay = grid[int(accuracies(heads, rows[held_out], labels[held_out]).argmax())]
    best = train_heads(rows, labels, num_classes, [lr], [decay], **training)
    return float(
        accuracies(best, test_rows, test_labels)[0]
    ), f"lr {lr:g}, weight decay {decay:g} of {len(grid)} heads"


def theirs(train: Data, test: Data, is_held_out: np.ndarray) -> Found:
    """The same of scikit-learn."""
    rows, labels = train

    def fitted(strength: float, chosen: np.ndarray) -> LogisticRegression:
        return LogisticRegression(C=strength, max_iter=1000).fit(rows[chosen], labels[chosen])

    found = [
        fitted(strength, ~is_held_out).score(rows[is_held_out], labels[is_held_out])
        for strength in STRENGTHS
    ]
    best = STRENGTHS[int(np.argmax(found))]
    return fitted(best, np.ones(len(rows), bool)).score(*test), f"C {best:g} of {len(STRENGTHS)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    archives = [np.load(path) for path in (arguments.train, arguments.test)]
    scale = scale_of(archives[0]["features"])
    train, test = ((scale.applied(archive["features"]), archive["labels"]) for archive in archives)
    print(
        f"{train[0].shape[0]:,} x {train[0].shape[1]} training features, {len(test[0]):,} test features"
    )
    programs: dict[str, Callable[[Data, Data, np.ndarray], Found]] = {
        "scikit-learn": theirs,
        "moco": ours,
    }
    for repeat in range(arguments.repeats):
        is_held_out = held_out_rows(
            train[1], LinearConfig().held_out, np.random.default_rng(repeat)
        )
        for name, program in programs.items():
            began = time.perf_counter()
            accuracy, chosen = program(train, test, is_held_out)
            print(
                f"{name:14} top-1 {accuracy:.4f}  {time.perf_counter() - began:7.1f} s  {chosen}",
                flush=True,
            )


if __name__ == "__main__":
    main()
