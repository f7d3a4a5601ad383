import logging
from functools import partial

import numpy as np
import pytest
import torch

from moco.evaluation import neighbors
from moco.evaluation.indexes import build_index, recall
from moco.evaluation.knn import Protocol, classify, knn_accuracy, vote, without_own
from moco.evaluation.neighbors import (
    NOTHING,
    nearest,
    nearest_by_block,
    normalized,
    search_index,
    search_with_torch,
)


def reference(bank, bank_labels, queries, num_neighbors, temperature):
    """InstDisc's weighted vote in float64, one query at a time; classes from best to worst.

    Of equally similar rows the smaller comes first.
    """
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    ranked = []
    for query in queries / np.linalg.norm(queries, axis=1, keepdims=True):
        similarity = (bank * query).sum(axis=1)
        scores = dict.fromkeys(sorted(set(bank_labels.tolist())), 0.0)
        for row in np.argsort(-similarity, kind="stable")[:num_neighbors]:
            scores[int(bank_labels[row])] += np.exp(similarity[row] / temperature)
        ranked.append(sorted(scores, key=lambda label: -scores[label]))
    return ranked


def shares(ranked, labels):
    """Top-1 and top-5 accuracy of the reference."""
    pairs = list(zip(ranked, labels, strict=True))
    return np.mean([order[0] == label for order, label in pairs]), np.mean(
        [label in order[:5] for order, label in pairs]
    )


@pytest.fixture
def small_blocks(monkeypatch):
    """Search banks and queries of hundreds of rows in several blocks."""
    monkeypatch.setattr(neighbors, "BANK_BYTES", 4 * 8 * 70)
    monkeypatch.setattr(neighbors, "RESULT_BYTES", 12 * 5 * 20)
    monkeypatch.setattr(neighbors, "PRODUCT_BYTES", 4 * 70 * 7)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("num_neighbors", [1, 5, 50])
def test_accuracy_equals_a_slow_reference(generator, num_neighbors, temperature):
    bank, queries = generator.normal(size=(200, 8)), generator.normal(size=(60, 8))
    bank_labels, query_labels = generator.integers(0, 9, 200), generator.integers(0, 9, 60)
    top1, top5 = shares(
        reference(bank, bank_labels, queries, num_neighbors, temperature), query_labels
    )
    result = knn_accuracy(bank, bank_labels, queries, query_labels, num_neighbors, temperature)
    assert (result.top1, result.top5) == (top1, top5 if num_neighbors >= 5 else None)


@pytest.mark.usefixtures("small_blocks")
def test_votes_do_not_depend_on_the_order_of_equally_similar_rows(generator):
    """All ties lie within the k neighbours: each of 16 directions has the same number of rows."""
    directions = np.array(list(np.ndindex(2, 2, 2, 2))) * 2.0 - 1  # their cosines are exact
    bank = np.repeat(directions, 5, axis=0)
    bank_labels = generator.integers(0, 9, len(bank))
    queries, query_labels = np.repeat(directions, 3, axis=0), generator.integers(0, 9, 48)
    expected = reference(bank, bank_labels, queries, 5, 0.1)
    shuffled = generator.permutation(len(bank))
    for rows in (np.arange(len(bank)), shuffled):
        search = partial(nearest_by_block, bank[rows])
        protocol = Protocol(5, 0.1)
        votes = classify(search, bank_labels[rows], queries, query_labels, [protocol])[protocol]
        assert votes.predicted.tolist() == [order[0] for order in expected]


def official_vote(bank, bank_labels, queries, num_classes, num_neighbors, temperature):
    """Return predicted classes as MoCo's CIFAR notebook computes them."""
    similarity, rows = torch.mm(queries, bank.T).topk(num_neighbors, dim=-1)
    labels = bank_labels[rows].reshape(-1, 1)
    one_hot = torch.zeros(len(labels), num_classes).scatter(-1, labels, 1.0)
    scores = (
        one_hot.view(len(queries), -1, num_classes) * (similarity / temperature).exp()[..., None]
    ).sum(dim=1)
    return scores.argmax(dim=-1)


def test_votes_are_those_of_the_official_notebook_to_the_last_sample(generator):
    centres = generator.normal(size=(10, 128))
    labels, query_labels = generator.integers(0, 10, 4000), generator.integers(0, 10, 500)
    bank = normalized(centres[labels] + 2.5 * generator.normal(size=(4000, 128)))
    queries = normalized(centres[query_labels] + 2.5 * generator.normal(size=(500, 128)))
    expected = official_vote(*map(torch.from_numpy, (bank, labels, queries)), 10, 200, 0.1)
    protocol = Protocol(200, 0.1)
    votes = classify(partial(nearest_by_block, bank), labels, queries, query_labels, [protocol])[
        protocol
    ]
    np.testing.assert_array_equal(votes.predicted, expected)
    assert 0.5 < votes.accuracy(1) < 1  # neither chance nor certainty


@pytest.mark.parametrize("num_rows", [13, 64, 300])
@pytest.mark.usefixtures("small_blocks")
def test_neighbours_are_those_of_a_full_sort_in_blocks(generator, num_rows):
    bank, queries = generator.normal(size=(num_rows, 8)), generator.normal(size=(50, 8))
    products = normalized(queries) @ normalized(bank).T
    expected = np.argsort(-products, axis=1)[:, :5]
    similarities, rows = nearest(bank, queries, 5)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(
        similarities, np.take_along_axis(products, expected, axis=1), atol=1e-6
    )


@pytest.mark.parametrize("num_kinds", [1, 2, 4, 8])
@pytest.mark.usefixtures("small_blocks")
def test_of_equally_similar_rows_the_first_ones_are_neighbours(generator, num_kinds):
    # With unit axes every product is a number of the query, without rounding.
    bank = np.eye(8)[generator.integers(0, num_kinds, 300)]
    queries = generator.normal(size=(50, 8))
    products = normalized(queries) @ normalized(bank).T
    expected = np.argsort(-products, axis=1, kind="stable")
    for num_neighbors in (1, 5, 299, 300):
        _, rows = nearest(bank, queries, num_neighbors)
        np.testing.assert_array_equal(rows, expected[:, :num_neighbors])


def test_a_bank_of_equal_rows_is_searched_in_bounded_memory(monkeypatch):
    import moco.evaluation.neighbors as neighbors

    sizes = []
    search = neighbors.search_with_faiss

    def measured(*arguments):
        found = search(*arguments)
        sizes.append(sum(array.nbytes for array in found))
        return found

    monkeypatch.setattr(neighbors, "search_with_faiss", measured)
    monkeypatch.setattr(neighbors, "BEYOND_BYTES", 20_000)
    similarities, rows = nearest(np.zeros((5000, 4)), np.zeros((50, 4)), 5)
    assert max(sizes) <= 20_000
    assert similarities.shape == rows.shape == (50, 5)


@pytest.mark.usefixtures("small_blocks")
def test_the_search_of_a_gpu_finds_the_same(generator):
    bank, queries = generator.normal(size=(60, 8)), generator.normal(size=(50, 8))
    bank[7] = np.nan
    expected = nearest(bank, queries, 5)
    found = search_with_torch(normalized(bank), normalized(queries), 5, torch.device("cpu"))
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)


def test_a_search_uses_as_many_threads_as_torch(generator):
    import faiss

    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        nearest(generator.normal(size=(20, 8)), generator.normal(size=(5, 8)), 3)
        assert faiss.omp_get_max_threads() == 1
    finally:
        torch.set_num_threads(num_threads)


class Products(torch.utils.data.Dataset):
    """Items that loader processes compute with torch."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return (torch.ones(300, 300) @ torch.ones(300, 300)).sum()


def test_a_search_between_batches_of_loader_processes_disturbs_neither(generator):
    """faiss and torch each bring an OpenMP library, and loader processes are forked after both."""
    bank = generator.normal(size=(3000, 8))
    queries = generator.normal(size=(50, 8))
    expected = nearest(bank, queries, 5)
    loader = torch.utils.data.DataLoader(Products(), num_workers=1, timeout=60)
    sums = []
    for item in loader:
        sums.append(float(item))
        np.testing.assert_array_equal(nearest(bank, queries, 5)[1], expected[1])
    assert sums == [300.0**3] * 4


@pytest.mark.usefixtures("small_blocks")
def test_equally_similar_rows_come_in_their_order(generator):
    bank = np.repeat(np.eye(8)[:2], [5, 295], axis=0)[generator.permutation(300)]
    _, rows = nearest(bank, np.eye(8)[:1], 5)
    np.testing.assert_array_equal(rows[0], (bank[:, 0] == 1).nonzero()[0])


@pytest.mark.usefixtures("small_blocks")
def test_a_bank_mapped_from_a_file_is_searched_and_left_as_it_is(generator, tmp_path):
    bank = generator.normal(size=(300, 8)).astype(np.float32)
    queries = generator.normal(size=(50, 8))
    np.save(tmp_path / "bank.npy", bank)
    mapped = np.load(tmp_path / "bank.npy", mmap_mode="r")
    expected, found = nearest(bank, queries, 5), nearest(mapped, queries, 5)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(mapped, bank)


@pytest.mark.usefixtures("small_blocks")
def test_left_out_of_the_bank_a_query_has_no_vote_on_itself(generator):
    features, labels = generator.normal(size=(90, 8)), generator.integers(0, 4, 90)
    features[40:60] = features[40]  # a query may not be among its own first neighbours
    labels[40:60] = 3  # which of these are found makes no difference
    protocol = Protocol(5, 0.1)
    search = partial(nearest_by_block, features)
    found = classify(search, labels, features, labels, [protocol], np.arange(90))[protocol]
    for row in range(90):
        others = np.delete(np.arange(90), row)
        best = reference(features[others], labels[others], features[row : row + 1], 5, 0.1)[0][0]
        assert found.predicted[row] == best


def test_a_grid_of_protocols_is_the_protocols_one_by_one(generator):
    bank, queries = generator.normal(size=(300, 8)), generator.normal(size=(80, 8))
    labels, query_labels = generator.integers(0, 9, 300), generator.integers(0, 9, 80)
    grid = [Protocol(k, temperature) for k in (1, 20, 7) for temperature in (0.07, 1.0)]
    together = classify(partial(nearest_by_block, bank), labels, queries, query_labels, grid)
    for protocol in grid:
        alone = knn_accuracy(bank, labels, queries, query_labels, *protocol)
        assert together[protocol].top(protocol.num_neighbors).get("top5") == alone.top5
        assert together[protocol].accuracy(1) == alone.top1


@pytest.mark.parametrize("name", ["IVF16,Flat", "HNSW32", "SQfp16"])
def test_an_approximate_index_finds_most_of_the_exact_neighbours_and_says_how_many(generator, name):
    centres = generator.normal(size=(20, 16))
    bank = centres[generator.integers(0, 20, 3000)] + 0.5 * generator.normal(size=(3000, 16))
    queries = centres[generator.integers(0, 20, 100)] + 0.5 * generator.normal(size=(100, 16))
    index = build_index(bank, name, "evaluation.index", num_probes=8, ef_search=64)
    exact = np.argsort(-(normalized(queries) @ normalized(bank).T), axis=1)[:, :10]
    _, rows = next(iter(search_index(index, queries, 10)))
    num_found = 0
    for expected, found in zip(exact, rows, strict=True):
        num_found += len({*expected} & {*found})
    assert recall(index, bank, queries, 10) == pytest.approx(num_found / 1000, abs=2e-3)
    assert num_found > 900


def test_cells_with_too_few_rows_give_no_votes_for_the_rest(generator):
    bank, labels = generator.normal(size=(300, 8)), np.repeat([0, 1], 150)
    index = build_index(bank, "IVF4,Flat", "evaluation.index", num_probes=1)
    similarities, rows = next(iter(search_index(index, bank, 290)))
    is_missing = similarities == NOTHING
    assert is_missing.any()
    assert ((rows >= 0) & (rows < 300)).all()
    protocol = Protocol(290, 0.1)
    votes = classify(partial(search_index, index), labels, bank, labels, [protocol])[protocol]
    weights = np.exp(np.where(is_missing, -np.inf, similarities) / 0.1)
    is_second_class = (weights * (2 * labels[rows] - 1)).sum(axis=1) > 0
    np.testing.assert_array_equal(votes.predicted, is_second_class)


# Four points on the circle at 0, 10, 20 and 90 degrees; the query lies at 0.
BANK = np.array([[np.cos(angle), np.sin(angle)] for angle in np.radians([0, 10, 20, 90])])
QUERY = np.array([[2.0, 0.0]])  # length does not count


@pytest.mark.parametrize(
    ("labels", "num_neighbors", "temperature", "winner"),
    [
        ([3, 7, 7, 7], 1, 0.1, 3),  # the nearest alone
        (
            [3, 7, 7, 7],
            3,
            0.1,
            7,
        ),  # two near ones outvote the nearest: exp(9.85) + exp(9.40) > exp(10)
        (
            [3, 7, 7, 7],
            3,
            0.01,
            3,
        ),  # at low T only the nearest counts: exp(100) > exp(98.5) + exp(94.0)
        ([3, 3, 7, 7], 4, 0.1, 3),
        ([5, 2, 9, 9], 2, 1e-4, 5),  # exp(1e4) does not overflow
    ],
)
def test_vote_on_hand_placed_points(labels, num_neighbors, temperature, winner):
    result = knn_accuracy(
        BANK, np.array(labels), QUERY, np.array([winner]), num_neighbors, temperature
    )
    assert result.top1 == 1.0


def test_equal_votes_go_to_the_smaller_class():
    bank = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert knn_accuracy(bank, np.array([8, 2]), QUERY, np.array([2]), 2, 0.1).top1 == 1.0


def test_votes_add_up_by_class():
    scores = vote(
        np.array([[1.0, 0.5, 0.5]]), np.array([[0, 2, 2]]), num_classes=3, temperature=0.5
    )
    np.testing.assert_allclose(scores, [[1.0, 0.0, 2 * np.exp(-1.0)]])


def test_more_neighbours_than_the_bank_holds_are_capped_with_a_warning(caplog):
    caplog.set_level(logging.WARNING)
    result = knn_accuracy(BANK, np.array([0, 0, 0, 1]), QUERY, np.array([0]), 200, 0.1)
    assert (result.num_neighbors, result.bank_size, result.top1) == (4, 4, 1.0)
    assert "evaluation.num_neighbors=200 is more than the bank's 4" in caplog.text


def test_classes_that_only_one_side_has_are_counted():
    labels = np.array([0, 4, 4, 900])  # gaps, and 4 is no query's class
    result = knn_accuracy(
        BANK, labels, np.vstack([QUERY, [[0.0, 1.0]], QUERY]), np.array([0, 900, 5]), 1, 0.1
    )
    assert result.top1 == pytest.approx(2 / 3)  # class 5 is not in the bank and can't be right


def test_fewer_than_five_classes_make_top5_certain():
    bank = np.vstack([BANK, [[0.0, -1.0]]])
    assert knn_accuracy(bank, np.array([0, 1, 1, 1, 1]), QUERY, np.array([1]), 5, 0.01).top5 == 1.0


@pytest.mark.parametrize(("num_neighbors", "size"), [(1, 9), (4, 9), (200, 4)])
def test_fewer_than_five_neighbours_give_no_top5(num_neighbors, size, generator):
    """Asked for, or all that a small bank has."""
    bank, labels = generator.normal(size=(size, 8)), np.arange(size)
    result = knn_accuracy(bank, labels, bank, labels, num_neighbors, 0.1)
    assert result.top5 is None
    enough = knn_accuracy(np.tile(bank, (2, 1)), np.tile(labels, 2), bank, labels, 5, 0.1)
    assert enough.top5 == 1.0


def test_zero_features_do_not_divide_by_zero():
    assert np.isfinite(
        knn_accuracy(np.zeros((4, 2)), np.arange(4), QUERY, np.array([0]), 2, 0.1).top1
    )


def test_features_that_are_no_numbers_do_not_pass_for_right(generator):
    bank, queries = generator.normal(size=(40, 8)), np.full((30, 8), np.nan)
    labels, query_labels = np.arange(40) % 4, np.arange(30) % 4
    assert knn_accuracy(bank, labels, queries, query_labels, 5, 0.1).top1 < 0.3  # that of a guess
    assert (
        knn_accuracy(np.full((40, 8), np.nan), labels, bank[:30], query_labels, 5, 0.1).top1 < 0.3
    )


def test_a_query_that_is_no_number_has_no_neighbours_and_the_others_theirs(generator):
    bank, queries = generator.normal(size=(10, 8)), generator.normal(size=(3, 8))
    bank[4], queries[1] = np.nan, np.nan
    for num_neighbors in (9, 10):  # 10: all of a bank that its columns do not fill
        similarities, rows = nearest(bank, queries, num_neighbors)
        assert (similarities[1] < -1e30).all()
        expected = nearest(np.delete(bank, 4, axis=0), queries[[0, 2]], 9)
        np.testing.assert_array_equal(rows[[0, 2], :9], expected[1] + (expected[1] >= 4))
        assert (similarities[[0, 2], 9:] < -1e30).all()


@pytest.mark.parametrize("size", [513, 1027])
def test_a_row_that_stands_twice_is_found_twice(generator, size):
    bank = generator.normal(size=(size, 100)).astype(np.float32)
    bank[-1] = bank[0]
    similarities, rows = nearest(bank, bank, 2)
    assert {*rows[0]} == {*rows[-1]} == {0, size - 1}
    np.testing.assert_allclose(similarities[[0, -1]], 1, atol=1e-6)


def test_features_that_have_collapsed_have_neighbours_in_rising_order(monkeypatch):
    monkeypatch.setattr(neighbors, "BANK_BYTES", 4 * 8 * 100)  # blocks of 100 rows
    bank = np.ones((1000, 8), np.float32)
    bank[[700, 300]] = np.random.default_rng(0).normal(size=(2, 8))
    queries = np.concatenate([np.ones((3, 8)), bank[300:301]]).astype(np.float32)
    similarities, rows = nearest(bank, queries, 20)
    assert (np.diff(rows[:3], axis=1) > 0).all()
    np.testing.assert_allclose(similarities[:3], 1, atol=1e-6)
    assert rows[3, 0] == 300


def test_leave_one_out_drops_one_place_where_an_index_fills_its_lists_with_the_first_row():
    similarities = np.array([[1.0, 0.5, -9, -9], [1.0, 0.2, -9, -9]], np.float32)
    rows = np.array([[0, 3, 0, 0], [1, 2, 0, 0]])
    kept, left = without_own(similarities, rows, np.array([0, 1]))
    assert left.tolist() == [[3, 0, 0], [2, 0, 0]]
    np.testing.assert_allclose(kept[:, 0], [0.5, 0.2])
