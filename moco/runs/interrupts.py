"""Ctrl-C, termination and a scheduler's signal: noticed at once, obeyed after the current step.

Between two steps a checkpoint is exact, so that the run can resume to the same bits.
"""

import logging
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from moco.errors import Interrupted
from moco.phases import about

log = logging.getLogger(__name__)

ENDING = (signal.SIGINT, signal.SIGTERM)
"""Signals that ask the run to end. Whoever sends them decides what happens next."""
REQUEUEING = (signal.SIGUSR1, signal.SIGUSR2)
"""Signals of a scheduler: the job's time is nearly up, and the job is to be queued again."""

PARTS_KEPT = "the parts that are whole are kept; the same command goes on there"
"""What becomes of a program's work in parts, such as the features of a dataset."""
LONG_STEP = 1.0
"""From this time on, seconds, a step's end is worth an announcement."""
BEFORE_TRAINING = "before training began; nothing to save"
came_early: list[int] = []
"""Scheduler's signals that came before any `StopRequest`.

They are kept because the exception may get lost: libraries catch all errors of an import.
"""
works = ["step"]
"""What runs now. The last one ends before a signal is obeyed, see `measuring`."""


class StopRequest:
    """Inside the ``with`` block the first signal sets `signal_number`; the run ends after its step.

    A second SIGINT or SIGTERM raises `Interrupted` at once. A scheduler's signal never does that:
    SIGTERM follows it, and the checkpoint that it asked for has to be finished. If something fails
    after a scheduler's signal, the block raises `Interrupted` too, so that the job is queued again
    and continues from its last good checkpoint.

    Args:
        signals: some of `ENDING` and `REQUEUEING`.
    """

    def __init__(self, signals: Sequence[int] = ENDING) -> None:
        self.signals = tuple(signals)
        self.signal_number: int | None = None
        self.seconds_per_step: float | None = None
        """Of the latest step, with its wait for data; None before the second step."""
        self._is_ending = False

    def __bool__(self) -> bool:
        return self.signal_number is not None

    @property
    def wants_requeue(self) -> bool:
        """Whether a scheduler asked for the stop."""
        return self.signal_number in REQUEUEING

    def request(self, number: int) -> None:
        """Stop as if the signal had come; any thread may call this.

        A scheduler's signal replaces another one, and is not replaced.
        """
        if self.wants_requeue:
            return
        if self.signal_number is None or number in REQUEUEING:
            self.signal_number = number

    def __enter__(self) -> "StopRequest":
        self._before: dict[int, Any] = {}
        for number in self.signals:
            self._before[number] = signal.getsignal(number)
        self.listen()
        # The process that started this one may have blocked the signals until now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.signals)
        for number in came_early:
            self.request(number)
        return self

    def listen(self) -> None:
        """Install the handlers.

        To be called again when training starts: Lightning then installs its own handler of SIGTERM,
        which would end the run in the middle of a step.
        """
        for number in self.signals:
            signal.signal(number, self._receive)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        for number, handler in self._before.items():
            if error is None and number in REQUEUEING:
                handler = signal.SIG_IGN  # the run is finished: nothing is to be queued again
            signal.signal(number, handler)
        if self.signal_number is None or not self.wants_requeue:
            return
        if isinstance(error, Interrupted):
            error.signal_number = self.signal_number
        elif isinstance(error, Exception):
            message = f"and the run failed while it was stopping: {error}"
            raise Interrupted(self.signal_number, message) from error

    def _receive(self, number: int, frame: FrameType | None) -> None:
        advice = ""
        if number in ENDING:
            if self._is_ending:
                # Not KeyboardInterrupt: Lightning would turn that into exit code 1.
                raise Interrupted(number, "at once, without a checkpoint of this step")
            self._is_ending = True
            again = "Ctrl-C again" if number == signal.SIGINT else "once more"
            advice = f"; {again} ends without a checkpoint"
        elif self.wants_requeue:
            return
        self.request(number)
        name = signal.Signals(number).name
        log.warning("%s: stopping after this %s%s", name, self._running_work(), advice)

    def _running_work(self) -> str:
        """Return what runs now, in words; of a step that takes long also how long."""
        work = works[-1]
        if work != "step" or self.seconds_per_step is None or self.seconds_per_step < LONG_STEP:
            return work
        return f"step (a step takes about {about(self.seconds_per_step)})"


@contextmanager
def measuring() -> Iterator[None]:
    """Inside the ``with`` block a signal says that the run stops after this measurement."""
    works.append("measurement")
    try:
        yield
    finally:
        works.pop()


def listen_early(signals: Iterable[int]) -> None:
    """Let a scheduler's signal raise `Interrupted` from now on, unless it has a handler already.

    By default such a signal kills the process. Before the first step there is nothing to save.

    Args:
        signals: only these; handlers of others that an earlier call installed are removed.
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
    signal.signal(number, signal.SIG_IGN)  # one is enough
    came_early.append(number)
    raise Interrupted(number, BEFORE_TRAINING)


@contextmanager
def held_back(signals: Iterable[int]) -> Iterator[None]:
    """Block the signals inside the ``with`` block.

    A process that is started inside keeps them blocked until its own `StopRequest` begins.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set(signals))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Inside the ``with`` block, Ctrl-C and SIGTERM raise `Interrupted` at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number, PARTS_KEPT)

    before = {number: signal.signal(number, stop) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
