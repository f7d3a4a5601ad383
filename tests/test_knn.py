import numpy as np
import pytest

from moco.evaluation.knn import knn_accuracy, vote


def reference(bank, bank_labels, queries, num_neighbors, temperature):
    """InstDisc's weighted vote in float64, one query at a time; classes from best to worst."""
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    ranked = []
    for query in queries / np.linalg.norm(queries, axis=1, keepdims=True):
        similarity = bank @ query
        scores = dict.fromkeys(sorted(set(bank_labels.tolist())), 0.0)
        for row in np.argsort(-similarity)[:num_neighbors]:
            scores[int(bank_labels[row])] += np.exp(similarity[row] / temperature)
        ranked.append(sorted(scores, key=lambda label: -scores[label]))
    return ranked


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("num_neighbors", [1, 5, 50])
def test_accuracy_equals_a_slow_reference(generator, num_neighbors, temperature):
    bank, queries = generator.normal(size=(200, 8)), generator.normal(size=(60, 8))
    bank_labels, query_labels = generator.integers(0, 9, 200), generator.integers(0, 9, 60)
    ranked = reference(bank, bank_labels, queries, num_neighbors, temperature)
    result = knn_accuracy(bank, bank_labels, queries, query_labels, num_neighbors, temperature)
    assert result.top1 == np.mean([order[0] == label for order, label in zip(ranked, query_labels, strict=True)])
    assert result.top5 == np.mean([label in order[:5] for order, label in zip(ranked, query_labels, strict=True)])


# Four points on the circle at 0, 10, 20 and 90 degrees; the query lies at 0.
BANK = np.array([[np.cos(angle), np.sin(angle)] for angle in np.radians([0, 10, 20, 90])])
QUERY = np.array([[2.0, 0.0]])  # length does not count


@pytest.mark.parametrize(
    ("labels", "num_neighbors", "temperature", "winner"),
    [
        ([3, 7, 7, 7], 1, 0.1, 3),  # the nearest alone
        ([3, 7, 7, 7], 3, 0.1, 7),  # two near ones outvote the nearest: exp(9.85) + exp(9.40) > exp(10)
        ([3, 7, 7, 7], 3, 0.01, 3),  # at low T only the nearest counts: exp(100) > exp(98.5) + exp(94.0)
        ([3, 3, 7, 7], 4, 0.1, 3),
        ([5, 2, 9, 9], 2, 1e-4, 5),  # exp(1e4) does not overflow
    ],
)
def test_vote_on_hand_placed_points(labels, num_neighbors, temperature, winner):
    result = knn_accuracy(BANK, np.array(labels), QUERY, np.array([winner]), num_neighbors, temperature)
    assert result.top1 == 1.0


def test_equal_votes_go_to_the_smaller_class():
    bank = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert knn_accuracy(bank, np.array([8, 2]), QUERY, np.array([2]), 2, 0.1).top1 == 1.0


def test_votes_add_up_by_class():
    scores = vote(np.array([[1.0, 0.5, 0.5]]), np.array([[0, 2, 2]]), num_classes=3, temperature=0.5)
    np.testing.assert_allclose(scores, [[1.0, 0.0, 2 * np.exp(-1.0)]])


def test_more_neighbours_than_the_bank_holds_are_capped_with_a_warning(caplog):
    result = knn_accuracy(BANK, np.array([0, 0, 0, 1]), QUERY, np.array([0]), 200, 0.1)
    assert (result.num_neighbors, result.bank_size, result.top1) == (4, 4, 1.0)
    assert "evaluation.num_neighbors=200 is more than the bank's 4" in caplog.text


def test_classes_that_only_one_side_has_are_counted():
    labels = np.array([0, 4, 4, 900])  # gaps, and 4 is no query's class
    result = knn_accuracy(BANK, labels, np.vstack([QUERY, [[0.0, 1.0]], QUERY]), np.array([0, 900, 5]), 1, 0.1)
    assert result.top1 == pytest.approx(2 / 3)  # class 5 is not in the bank and can't be right


def test_fewer_than_five_classes_make_top5_certain():
    assert knn_accuracy(BANK, np.array([0, 1, 1, 1]), QUERY, np.array([1]), 4, 0.01).top5 == 1.0


def test_zero_features_do_not_divide_by_zero():
    assert np.isfinite(knn_accuracy(np.zeros((4, 2)), np.arange(4), QUERY, np.array([0]), 2, 0.1).top1)
