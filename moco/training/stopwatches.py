"""Stopwatches that split the time of an epoch into named parts."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

STEPS = "steps"
WAITING = "data_wait"
MONITORS = "monitors"
CHECKPOINTS = "checkpoints"
LOGGING = "logging"

WORDS = {
    STEPS: "training steps",
    WAITING: "waiting for data",
    MONITORS: "kNN and other monitors",
    CHECKPOINTS: "checkpoints",
    LOGGING: "logging",
}
"""How the closing table calls the parts."""


class Stopwatches:
    """Count every moment for one name: the innermost that is measured, or `rest` outside of all.

    So the time in which a monitor logs a figure counts as logging, not as the monitor, and the
    parts of an epoch add up to its length. It is the time of this process: while a GPU computes,
    the time counts for whoever waits for it first.

    Args:
        rest: the name for the time in which nothing is measured.
    """

    def __init__(self, rest: str) -> None:
        self.rest = rest
        self.start()

    def start(self) -> None:
        """Forget everything and count for `rest` from now on."""
        self.names = [self.rest]
        """The names that are being measured, the innermost last."""
        self.seconds: dict[str, float] = defaultdict(float)
        """Seconds of the running lap."""
        self.total: dict[str, float] = defaultdict(float)
        """Seconds of all finished laps."""
        self.since = time.perf_counter()

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Count the time inside for `name`; also usable as a decorator."""
        self._settle()
        self.names.append(name)
        try:
            yield
        finally:
            self._settle()
            self.names.pop()

    def give(self, name: str, seconds: float) -> None:
        """Move seconds that were counted for the innermost name to `name`."""
        self.seconds[name] += seconds
        self.seconds[self.names[-1]] -= seconds

    def lap(self) -> dict[str, float]:
        """Return the seconds of every name since the last lap, or since the start."""
        self._settle()
        lap = dict(self.seconds)
        self.seconds = defaultdict(float)
        for name, seconds in lap.items():
            self.total[name] += seconds
        return lap

    def so_far(self, *names: str) -> float:
        """Return the seconds of these names together since the start."""
        self._settle()
        seconds = 0.0
        for name in names:
            seconds += self.total.get(name, 0.0) + self.seconds.get(name, 0.0)
        return seconds

    def _settle(self) -> None:
        """Count the time up to now."""
        now = time.perf_counter()
        self.seconds[self.names[-1]] += now - self.since
        self.since = now


epoch_time = Stopwatches(STEPS)
"""The stopwatches of this process, which runs one training at a time.

Callbacks and logger measure themselves. `LossMonitor` takes the laps.
"""


def in_words(seconds: Mapping[str, float]) -> str:
    """Return the share of each part, the largest first; parts under half a percent are skipped.

    Args:
        seconds: by the names of `WORDS`.
    """
    whole = sum(seconds.values())
    shares = []
    for name, part in sorted(seconds.items(), key=lambda item: -item[1]):
        if part >= 0.005 * whole:
            shares.append(f"{WORDS[name]} {part / whole:.0%}")
    return ", ".join(shares)
