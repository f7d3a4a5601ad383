import pytest

from moco.training import stopwatches
from moco.training.stopwatches import Stopwatches, in_words


@pytest.fixture
def clock(monkeypatch):
    """The time, in a list; a test moves it on."""
    now = [100.0]
    monkeypatch.setattr(stopwatches.time, "perf_counter", lambda: now[0])
    return now


def test_time_inside_another_counts_for_the_inner_name_alone(clock):
    watches = Stopwatches("steps")
    clock[0] += 5
    with watches.measured("monitors"):
        clock[0] += 2
        with watches.measured("logging"):
            clock[0] += 1
        clock[0] += 3
    clock[0] += 4
    assert watches.lap() == {"steps": 9, "monitors": 5, "logging": 1}


def test_the_parts_of_a_lap_add_up_to_it_whatever_is_raised(clock):
    watches = Stopwatches("steps")

    @watches.measured("checkpoints")
    def save():
        clock[0] += 7
        raise OSError("disk full")

    def measure():
        with watches.measured("monitors"):
            clock[0] += 1
            save()

    with pytest.raises(OSError, match="disk full"):
        measure()
    clock[0] += 2
    assert watches.lap() == {"steps": 2, "monitors": 1, "checkpoints": 7}
    clock[0] += 6
    assert watches.lap() == {"steps": 6}
    assert watches.total == {"steps": 8, "monitors": 1, "checkpoints": 7}


def test_what_was_counted_already_can_be_given_to_another_name(clock):
    watches = Stopwatches("steps")
    clock[0] += 10
    watches.give("data_wait", 4)
    assert watches.lap() == {"steps": 6, "data_wait": 4}


def test_shares_are_told_largest_first_without_what_is_nearly_nothing():
    seconds = {
        "steps": 60.0,
        "data_wait": 9.9,
        "monitors": 29.7,
        "checkpoints": 0.0,
        "logging": 0.4,
    }
    assert (
        in_words(seconds) == "training steps 60%, kNN and other monitors 30%, waiting for data 10%"
    )
