import math

import pytest

from moco.training.optimizers import learning_rate_at


def official(epoch, epochs, lr=0.06):
    """adjust_learning_rate of the official CIFAR notebook, epochs counted from 1."""
    return lr * 0.5 * (1.0 + math.cos(math.pi * epoch / epochs))


@pytest.mark.parametrize("epoch", [1, 2, 100, 199, 200])
def test_cosine_by_epoch_equals_the_official_notebook(epoch):
    step = (epoch - 1) * 97 + 50
    ours = learning_rate_at(
        step, 200 * 97, 97, lr=0.06, schedule="cosine", schedule_interval="epoch", schedule_offset_epochs=1
    )
    assert ours == pytest.approx(official(epoch, 200), abs=1e-12)


def test_cosine_by_step_goes_from_lr_to_zero():
    rates = [learning_rate_at(step, 100, 10, lr=1.0, schedule="cosine") for step in (0, 50, 100)]
    assert rates == pytest.approx([1.0, 0.5, 0.0])


def test_step_schedule_drops_at_its_milestones():
    rates = [
        learning_rate_at(epoch * 5, 1000, 5, lr=0.03, schedule="step", schedule_interval="epoch", milestones=[120, 160])
        for epoch in (0, 119, 120, 159, 160, 199)
    ]
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003])


def test_warmup_is_linear_from_zero_and_the_cosine_starts_after_it():
    rates = [
        learning_rate_at(step, 110, 10, lr=1.0, schedule="cosine", warmup_epochs=1) for step in (0, 5, 10, 60, 110)
    ]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0])


def test_constant_schedule_stays():
    assert learning_rate_at(77, 100, 10, lr=0.3, schedule="constant") == 0.3
