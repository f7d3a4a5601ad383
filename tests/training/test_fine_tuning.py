"""The learning rate of fine-tuning against its formulas."""

import math
from functools import partial

import pytest

from moco.training.schedules import fine_tuning_lr_at


def test_the_rate_rises_linearly_and_then_falls_by_a_power():
    rate = partial(
        fine_tuning_lr_at, num_steps=110, lr=0.2, schedule="poly", warmup_steps=10, power=0.9
    )
    assert [rate(0), rate(5), rate(10)] == [0.0, 0.1, 0.2]
    assert rate(60) == pytest.approx(0.2 * 0.5**0.9)
    assert rate(110) == 0.0


def test_the_rate_falls_by_a_cosine():
    rate = fine_tuning_lr_at(35, 110, lr=0.2, schedule="cosine", warmup_steps=10, power=0.9)
    assert rate == pytest.approx(0.2 * (1 + math.cos(math.pi / 4)) / 2)


@pytest.mark.parametrize(
    ("step", "num_steps", "expected"),
    [(1, 40, 0.1), (750, 10**6, 0.1), (0, 10, 0.2)],  # warm-ups of 2, 1,500 and 0 steps
)
def test_without_a_setting_the_warmup_is_a_twentieth_up_to_1500_steps(step, num_steps, expected):
    rate = fine_tuning_lr_at(step, num_steps, lr=0.2, schedule="poly", warmup_steps=None, power=0.9)
    assert rate == pytest.approx(expected)
