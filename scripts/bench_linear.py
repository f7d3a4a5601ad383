"""Compare the grid of the linear probe with scikit-learn's logistic regression.

    python -m moco.embed checkpoint=PATH data=cifar10 split=train output=train.npz
    python -m moco.embed checkpoint=PATH data=cifar10 split=test output=test.npz
    OMP_NUM_THREADS=1 python scripts/bench_linear.py train.npz test.npz [--repeats 1]

Both get the same standardised features. Both choose their settings on the same held-out tenth of
the training data, train again on all of it with the best settings, and report the test accuracy.
The values of C in scikit-learn cover the weight decays of our grid, and more.
"""

import argparse
import itertools
import time
from collections.abc import Callable

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from moco.config.linear import LinearConfig
from moco.evaluation.linear import accuracies, held_out_rows, train_heads
from moco.evaluation.linear_measurement import usual_epochs

Data = tuple[np.ndarray, np.ndarray]
Found = tuple[float, str]
STRENGTHS = np.logspace(-4, 2, 7)  # C


def ours(train: Data, test: Data, is_held_out: np.ndarray) -> Found:
    """Return the test accuracy of our probe, and the settings that it chose."""
    settings = LinearConfig()
    rows, labels = torch.from_numpy(train[0]), torch.from_numpy(train[1])
    test_rows, test_labels = torch.from_numpy(test[0]), torch.from_numpy(test[1])
    held_out = torch.from_numpy(is_held_out)
    num_classes = int(labels.max()) + 1
    epochs = usual_epochs(len(rows), settings.batch_size)
    training = {"num_epochs": epochs, "batch_size": settings.batch_size, "seed": settings.seed}
    grid = list(itertools.product(settings.lrs, settings.weight_decays))
    lrs, decays = zip(*grid, strict=True)
    heads = train_heads(rows[~held_out], labels[~held_out], num_classes, lrs, decays, **training)
    best = int(accuracies(heads, rows[held_out], labels[held_out]).argmax())
    lr, decay = grid[best]
    head = train_heads(rows, labels, num_classes, [lr], [decay], **training)
    accuracy = float(accuracies(head, test_rows, test_labels)[0])
    return accuracy, f"lr {lr:g}, weight decay {decay:g} of {len(grid)} heads"


def theirs(train: Data, test: Data, is_held_out: np.ndarray) -> Found:
    """Return the test accuracy of scikit-learn, and the C that it chose."""
    rows, labels = train

    def fitted(strength: float, chosen: np.ndarray) -> LogisticRegression:
        return LogisticRegression(C=strength, max_iter=1000).fit(rows[chosen], labels[chosen])

    scores = []
    for strength in STRENGTHS:
        model = fitted(strength, ~is_held_out)
        scores.append(model.score(rows[is_held_out], labels[is_held_out]))
    best = STRENGTHS[int(np.argmax(scores))]
    model = fitted(best, np.ones(len(rows), bool))
    return model.score(*test), f"C {best:g} of {len(STRENGTHS)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train_archive, test_archive = np.load(arguments.train), np.load(arguments.test)
    scaler = StandardScaler().fit(train_archive["features"])
    train = (scaler.transform(train_archive["features"]), train_archive["labels"])
    test = (scaler.transform(test_archive["features"]), test_archive["labels"])
    num_rows, width = train[0].shape
    print(f"{num_rows:,} x {width} training features, {len(test[0]):,} test features")
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
            seconds = time.perf_counter() - began
            print(f"{name:14} top-1 {accuracy:.4f}  {seconds:7.1f} s  {chosen}", flush=True)


if __name__ == "__main__":
    main()
