"""The queue against one that takes a key at a time."""

from collections import deque

import pytest
import torch
import torch.nn.functional as F

from moco.methods.blocked_loss import blocked_info_nce
from moco.methods.key_queue import KeyQueue
from moco.methods.losses import info_nce


def keys_numbered(start, count, dim=4):
    return torch.arange(start, start + count, dtype=torch.float32)[:, None].expand(count, dim)


@pytest.mark.parametrize(
    ("size", "batches"), [(10, [4] * 7), (10, [3, 10, 1]), (7, [16, 5, 30]), (1, [3, 1])]
)
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


@pytest.mark.parametrize("loss_of", [info_nce, blocked_info_nce])
def test_the_loss_has_its_gradient_after_its_negatives_were_replaced(loss_of):
    queue = KeyQueue(8, 4)
    query, key = F.normalize(torch.randn(2, 2, 4), dim=2)
    expected = query.clone().requires_grad_()
    loss_of(expected, key, queue.negatives(), 0.2).backward()
    query.requires_grad_()
    loss = loss_of(query, key, queue.negatives(), 0.2)
    queue.enqueue(torch.ones(8, 4))
    loss.backward()
    torch.testing.assert_close(query.grad, expected.grad)


def test_state_dict_restores_keys_pointer_and_fill():
    queue, other = KeyQueue(10, 4), KeyQueue(10, 4)
    queue.enqueue(keys_numbered(0, 7))
    other.load_state_dict(queue.state_dict())
    for queue_ in (queue, other):
        queue_.enqueue(keys_numbered(7, 5))
    assert torch.equal(queue.keys, other.keys)
    assert (int(other.pointer), int(other.filled)) == (2, 10)


def test_a_queue_that_fills_up_goes_on_from_its_state_with_as_many_negatives():
    queue, other = KeyQueue(10, 4, "empty"), KeyQueue(10, 4, "empty")
    queue.enqueue(keys_numbered(0, 7))
    other.load_state_dict(queue.state_dict())
    assert torch.equal(other.negatives(), queue.negatives())
    assert torch.equal(other.newest(3), queue.newest(3))


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


@pytest.mark.parametrize("start", ["random", "empty"])
def test_groups_stay_beside_their_keys(start):
    queue = KeyQueue(5, 4, start, keeps_groups=True)
    assert queue.groups.tolist() == [-1] * 5  # random unit vectors are of no image
    keys = keys_numbered(0, 7)
    keys[5] = torch.nan  # the key and its group are left out together
    queue.enqueue(keys[:3], torch.tensor([10, 11, 12]))
    assert len(queue.groups_of_negatives()) == len(queue.negatives())
    queue.enqueue(keys[3:], torch.tensor([13, 14, 15, 16]))
    assert queue.keys[:, 0].tolist() == [0.0, 6.0, 2.0, 3.0, 4.0]
    assert queue.groups_of_negatives().tolist() == [10, 16, 12, 13, 14]
    other = KeyQueue(5, 4, start, keeps_groups=True)
    other.load_state_dict(queue.state_dict())
    assert torch.equal(other.groups, queue.groups)
    assert "groups" not in KeyQueue(5, 4, start).state_dict()
