"""Where the time of an epoch goes, in named parts that add up to it."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

STEPS, WAITING, MONITORS, CHECKPOINTS, LOGGING = (
    "steps",
    "data_wait",
    "monitors",
    "checkpoints",
    "logging",
)
WORDS = {
    STEPS: "training steps",
    WAITING: "waiting for data",
    MONITORS: "kNN and other monitors",
    CHECKPOINTS: "checkpoints",
    LOGGING: "logging",
}


class Stopwatches:
    """Every moment counts for one name: the innermost that is being measured, or `rest` where none is.

    So a logged figure of a monitor is logging and not the monitor, and the parts of an epoch add up to its length. It is the
    time of this process: what a GPU still computes counts for whoever waits for it first.

    Args:
        rest: the name of what nobody measures.
    """

    def __init__(self, rest: str) -> None:
        self.rest = rest
        self.start()

    def start(self) -> None:
        """Forget everything; from now on, the time is that of `rest`."""
        self.names = [self.rest]  # innermost last
        self.seconds: dict[str, float] = defaultdict(float)
        self.total: dict[str, float] = defaultdict(float)
        """Of all laps."""
        self.since = time.perf_counter()

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Inside, the time is that of `name`."""
        self._settle()
        self.names.append(name)
        try:
            yield
        finally:
            self._settle()
            self.names.pop()

    def give(self, name: str, seconds: float) -> None:
        """What has just been counted for the name that is being measured was time of `name`."""
        self.seconds[name] += seconds
        self.seconds[self.names[-1]] -= seconds

    def lap(self) -> dict[str, float]:
        """The seconds of every name since the last lap, or the start."""
        self._settle()
        lap, self.seconds = dict(self.seconds), defaultdict(float)
        for name, seconds in lap.items():
            self.total[name] += seconds
        return lap

    def so_far(self, *names: str) -> float:
        """The seconds of these names since the start."""
        self._settle()
        return sum(self.total.get(name, 0.0) + self.seconds.get(name, 0.0) for name in names)

    def _settle(self) -> None:
        """Count the time up to now."""
        now = time.perf_counter()
        self.seconds[self.names[-1]] += now - self.since
        self.since = now


epoch_time = Stopwatches(STEPS)
"""Of this process, which trains one thing at a time. Callbacks and logger measure themselves; `LossMonitor` takes laps."""


def in_words(seconds: Mapping[str, float]) -> str:
    """The shares of the names of `WORDS`, the largest first; those below half a percent are left out."""
    whole = sum(seconds.values())
    parts = sorted(seconds.items(), key=lambda part: -part[1])
    return ", ".join(
        f"{WORDS[name]} {part / whole:.0%}" for name, part in parts if part >= 0.005 * whole
    )
