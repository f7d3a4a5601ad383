"""Ctrl-C, termination, a scheduler's signal: noticed at once, acted on between two steps, where a checkpoint is exact."""

import logging
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from moco.errors import Interrupted

log = logging.getLogger(__name__)

ENDING = (signal.SIGINT, signal.SIGTERM)
"""Whoever sends one of these wants the run to end; what happens then is up to him."""
REQUEUEING = (signal.SIGUSR1, signal.SIGUSR2)
"""With one of these a scheduler says that the job's time is nearly up, and that it is to be queued again."""


BEFORE_TRAINING = "before training began; nothing to save"
came_early: list[int] = []
"""Scheduler's signals before any `StopRequest`. What they raise may be caught: many imports are tried and given up."""


class StopRequest:
    """Inside a ``with`` block the first of some signals sets `signal_number`, which ends the run after its step.

    A second SIGINT or SIGTERM raises `Interrupted` at once. A scheduler's signal never does: it comes before SIGTERM, or
    with it, and the checkpoint that it asked for is to be finished. What fails on the way to the end after a scheduler's
    signal leaves the block as `Interrupted` too, so that the job is queued again from its last good checkpoint.

    Args:
        signals: of `ENDING` and `REQUEUEING`.
    """

    def __init__(self, signals: Sequence[int] = ENDING) -> None:
        self.signals = tuple(signals)
        self.signal_number: int | None = None
        self._is_ending = False

    def __bool__(self) -> bool:
        return self.signal_number is not None

    @property
    def wants_requeue(self) -> bool:
        """Whether a scheduler asked for the stop."""
        return self.signal_number in REQUEUEING

    def request(self, number: int) -> None:
        """Stop as if the signal had come; may be called from any thread. A scheduler's signal is kept before others."""
        if not self.wants_requeue and (self.signal_number is None or number in REQUEUEING):
            self.signal_number = number

    def __enter__(self) -> "StopRequest":
        self._before: dict[int, Any] = {number: signal.getsignal(number) for number in self.signals}
        self.listen()
        # Whoever started this process may have blocked the signals until it can take them.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.signals)
        for number in came_early:
            self.request(number)
        return self

    def listen(self) -> None:
        """Take the signals, also from Lightning, which takes SIGTERM when training starts and then ends in mid-step."""
        for number in self.signals:
            signal.signal(number, self._receive)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            is_late = (
                error is None and number in REQUEUEING
            )  # the run is done: nothing to queue again
            signal.signal(number, signal.SIG_IGN if is_late else handler)
        if self.wants_requeue and isinstance(error, Exception):
            assert self.signal_number is not None
            if not isinstance(error, Interrupted):
                raise Interrupted(
                    self.signal_number, f"and the run failed while it was stopping: {error}"
                ) from error
            error.signal_number = self.signal_number

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number in ENDING:
            if self._is_ending:
                # Not KeyboardInterrupt: Lightning would turn that into exit code 1.
                raise Interrupted(number, "at once, without a checkpoint of this step")
            self._is_ending = True
        elif self.wants_requeue:
            return
        self.request(number)
        once_more = "; once more to stop without a checkpoint" if number in ENDING else ""
        log.warning("%s: stopping after this step%s", signal.Signals(number).name, once_more)


def listen_early(signals: Iterable[int]) -> None:
    """From now on a scheduler's signal raises `Interrupted` at once, unless somebody takes it already.

    Its default is to kill the process, and there is nothing to save before the first step.

    Args:
        signals: only these; others that an earlier call has taken are given back.
    """
    for number in REQUEUEING:
        handler = signal.getsignal(number)
        if number in signals and handler in (signal.SIG_DFL, signal.SIG_IGN):
            signal.signal(number, _receive_early)
        elif number not in signals and handler is _receive_early:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, set(signals))
    if came_early:
        raise Interrupted(came_early[0], BEFORE_TRAINING)


def _receive_early(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # once is enough
    came_early.append(number)
    raise Interrupted(number, BEFORE_TRAINING)


@contextmanager
def held_back(signals: Iterable[int]) -> Iterator[None]:
    """Inside, the signals wait; in a process that is started inside, until a `StopRequest` of its own lets them in."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set(signals))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def ending_at_once(message: str) -> Iterator[None]:
    """Inside the ``with`` block, Ctrl-C and SIGTERM raise `Interrupted` with this message."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number, message)

    before = {number: signal.signal(number, stop) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
