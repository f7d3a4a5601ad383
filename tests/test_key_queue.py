from collections import deque

import pytest
import torch
import torch.nn.functional as F

from moco.methods.key_queue import KeyQueue


def keys_numbered(start, count, dim=4):
    return torch.arange(start, start + count, dtype=torch.float32)[:, None].expand(count, dim)


@pytest.mark.parametrize(("size", "batches"), [(10, [4] * 7), (10, [3, 10, 1]), (7, [16, 5, 30]), (1, [3, 1])])
def test_contents_equal_a_queue_that_takes_one_key_at_a_time(size, batches):
    queue, reference, position, start = KeyQueue(size, 4), [None] * size, 0, 0
    newest = deque(maxlen=size)
    for count in batches:
        queue.enqueue(keys_numbered(start, count))
        for number in range(start, start + count):
            reference[position] = float(number)
            position = (position + 1) % size
            newest.append(float(number))
        start += count
        for row, number in zip(queue.keys, reference, strict=True):
            assert number is None or torch.equal(row, torch.full((4,), number))
        assert int(queue.pointer) == position
        assert int(queue.filled) == min(start, size)
    assert sorted(set(queue.keys[:, 0].tolist()) & set(newest)) == sorted(newest)


def test_random_start_offers_unit_vectors_as_negatives():
    negatives = KeyQueue(100, 16).negatives()
    assert negatives.shape == (100, 16)
    torch.testing.assert_close(negatives.norm(dim=1), torch.ones(100))


def test_empty_start_offers_only_enqueued_keys():
    queue = KeyQueue(10, 4, start="empty")
    assert len(queue.negatives()) == 0
    queue.enqueue(keys_numbered(0, 3))
    assert torch.equal(queue.negatives(), keys_numbered(0, 3))
    queue.enqueue(keys_numbered(3, 9))
    assert queue.negatives()[:, 0].tolist() == [10.0, 11.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]


def test_enqueueing_leaves_earlier_negatives_fit_for_backward():
    queue = KeyQueue(8, 4)
    query = F.normalize(torch.randn(2, 4), dim=1).requires_grad_()
    loss = (query @ queue.negatives().T).sum()
    before = queue.keys.sum(dim=0).clone()
    queue.enqueue(torch.ones(8, 4))
    loss.backward()
    torch.testing.assert_close(query.grad, before.expand(2, 4))


def test_state_dict_restores_keys_pointer_and_fill():
    queue, other = KeyQueue(10, 4), KeyQueue(10, 4)
    queue.enqueue(keys_numbered(0, 7))
    other.load_state_dict(queue.state_dict())
    for queue_ in (queue, other):
        queue_.enqueue(keys_numbered(7, 5))
    assert torch.equal(queue.keys, other.keys)
    assert (int(other.pointer), int(other.filled)) == (2, 10)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_key_that_is_not_finite_leaves_its_row_as_it_was(bad):
    queue = KeyQueue(5, 4)
    queue.enqueue(keys_numbered(0, 4))
    keys = keys_numbered(4, 3).clone()
    keys[1, 2] = bad  # would go to row 0
    queue.enqueue(keys)
    assert queue.keys[:, 0].tolist() == [0.0, 6.0, 2.0, 3.0, 4.0]
    assert queue.keys.isfinite().all()
    assert (int(queue.pointer), int(queue.filled)) == (2, 5)


def test_keys_that_are_not_finite_leave_unit_vectors_in_a_queue_that_fills_up():
    queue = KeyQueue(5, 4, start="empty")
    queue.enqueue(torch.full((3, 4), float("nan")))
    torch.testing.assert_close(queue.negatives().norm(dim=1), torch.ones(3))
