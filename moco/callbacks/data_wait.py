"""Measure how long training waits for its data, and warn once if that is too long."""

import logging

log = logging.getLogger(__name__)

MUCH = 0.2  # of the time
EPOCH_SECONDS = 30.0  # training time after which the end of an epoch can warn
SECONDS = 60.0  # training time after which any step can warn


class DataWait:
    """The waiting time of this process.

    A resumed run starts anew, because its settings may have changed. The first step does not count,
    because it also waits until the loader processes have started.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.waited = 0.0
        self.num_steps = 0
        self.has_warned = False

    def add(self, waited: float, seconds: float) -> None:
        """Add a step that took `seconds`, of which it `waited` for its batch."""
        self.num_steps += 1
        if self.num_steps > 1:
            self.waited += waited
            self.seconds += seconds

    def check(self, at_least: float) -> None:
        """Warn once if training waited much and has taken `at_least` this many seconds."""
        if self.has_warned or self.seconds < at_least or self.waited <= MUCH * self.seconds:
            return
        self.has_warned = True
        log.warning(
            "training waited %.0f %% of the time for images; "
            "see docs/performance.md#waiting-for-data",
            100 * self.waited / self.seconds,
        )
