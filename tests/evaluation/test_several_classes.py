import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.classification import multilabel_average_precision

from moco.data.sources.label_sets import is_matrix_of_classes, numbered_sets
from moco.data.sources.registry import build_source
from moco.evaluation.knn import Protocol, average_precision, classify, knn_accuracy
from moco.evaluation.neighbors import nearest_by_block


def drawn(num_images=60, num_classes=4, seed=0):
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(num_images, 8)).astype(np.float32)
    is_class = generator.random((num_images, num_classes)) < 0.3
    return features, is_class


def by_hand(bank, bank_classes, queries, k, temperature, own_rows=None):
    """Each query and class for itself, in double precision."""
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (bank, queries)]
    shares = np.zeros((len(queries), bank_classes.shape[1]))
    for number, query in enumerate(unit[1]):
        similarity = unit[0] @ query
        if own_rows is not None:
            similarity[own_rows[number]] = -np.inf
        nearest = np.argsort(-similarity)[:k]
        weights = np.exp(similarity[nearest] / temperature)
        for row, weight in zip(nearest, weights, strict=True):
            shares[number] += weight * bank_classes[row]
        shares[number] /= weights.sum()
    return shares


@pytest.mark.parametrize("leaves_one_out", [False, True])
def test_average_precision_is_that_of_torchmetrics_on_shares_by_hand(leaves_one_out):
    bank, bank_classes = drawn()
    queries, query_classes = (bank, bank_classes) if leaves_one_out else drawn(40, seed=1)
    own_rows = np.arange(len(bank)) if leaves_one_out else None
    protocols = [Protocol(5, 0.1), Protocol(20, 0.5)]
    votes = classify(
        lambda rows, k: nearest_by_block(bank, rows, k, device="cpu"),
        bank_classes, queries, query_classes, protocols, own_rows,
    )  # fmt: skip
    for protocol in protocols:
        shares = by_hand(bank, bank_classes, queries, *protocol, own_rows)
        expected = multilabel_average_precision(
            torch.from_numpy(shares), torch.from_numpy(query_classes).long(), 4, average="none"
        )
        found = votes[protocol]
        np.testing.assert_allclose(found.average_precision, expected, atol=1e-6)
        first = shares.argmax(axis=1)
        is_right = query_classes[np.arange(len(queries)), first]
        assert found.accuracy(1) == pytest.approx(is_right[query_classes.any(axis=1)].mean())


def test_a_class_that_no_image_has_does_not_count():
    is_class = np.array([[1, 0], [0, 0], [1, 0]], bool)
    precision = average_precision(np.array([[0.9, 0.1], [0.5, 0.5], [0.2, 0.3]]), is_class)
    assert precision[0] == pytest.approx((1 + 2 / 3) / 2)
    assert np.isnan(precision[1])


def test_combinations_are_numbered_and_come_back():
    is_class = np.array([[0, 1], [1, 1], [0, 1], [0, 0]])
    numbers, label_sets = numbered_sets(is_class)
    assert len(label_sets) == 3
    np.testing.assert_array_equal(label_sets[numbers], is_class.astype(bool))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (np.eye(3, dtype=np.uint8), True),
        (np.eye(3), True),
        (np.zeros((3, 1), np.uint8), False),
        (np.arange(3), False),
        (np.array([[0, 2]] * 3), False),
        (np.zeros((4, 2)), False),
    ],
)
def test_a_matrix_of_classes_has_a_row_for_each_image_of_0_and_1(labels, expected):
    assert is_matrix_of_classes(labels, 3) is expected


def test_knn_accuracy_takes_rows_of_0_and_1():
    bank, bank_classes = drawn()
    queries, query_classes = drawn(40, seed=1)
    result = knn_accuracy(bank, bank_classes, queries, query_classes, 5, 0.1)
    shares = by_hand(bank, bank_classes, queries, 5, 0.1)
    expected = multilabel_average_precision(
        torch.from_numpy(shares), torch.from_numpy(query_classes).long(), 4, average="macro"
    )
    assert result.mean_average_precision == pytest.approx(float(expected), abs=1e-6)
    one_class = knn_accuracy(bank, bank_classes[:, 0], queries, query_classes[:, 0], 5, 0.1)
    assert one_class.mean_average_precision is None


def test_a_table_gives_several_classes(tmp_path):
    for number in range(6):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
    lines = ["name,water,forest", "0,1,1", "1,0,0", "2,0,1", "3,1,0", "4,1,1", "5,0,0"]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    source = build_source("images", str(tmp_path), labels="labels.csv", held_out=0)
    expected = [[1, 1], [0, 0], [0, 1], [1, 0], [1, 1], [0, 0]]
    assert source.bank.class_names == ("water", "forest")
    assert source.bank.targets_of(source.bank.labels).tolist() == np.array(expected, bool).tolist()
    names = [source.bank.label_name(label) for label in source.bank.labels]
    assert names == ["water + forest", "no class", "forest", "water", "water + forest", "no class"]
