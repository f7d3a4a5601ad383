"""Ctrl-C and termination: noticed at once, acted on between two steps, where a checkpoint is exact."""

import logging
import signal
from types import FrameType
from typing import Any

from moco.errors import Interrupted

log = logging.getLogger(__name__)


class StopRequest:
    """Inside a ``with`` block the first SIGINT or SIGTERM sets `signal_number`; a second one raises `Interrupted`."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def __enter__(self) -> "StopRequest":
        self._before: dict[int, Any] = {number: signal.getsignal(number) for number in self.SIGNALS}
        self.listen()
        return self

    def listen(self) -> None:
        """Take the signals, also from Lightning, which takes SIGTERM when training starts and then ends in mid-step."""
        for number in self.SIGNALS:
            signal.signal(number, self._receive)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self:
            # Not KeyboardInterrupt: Lightning would turn that into exit code 1.
            raise Interrupted(number, "at once, without a checkpoint of this step")
        self.signal_number = number
        log.warning("%s: stopping after this step; once more to stop without a checkpoint", signal.Signals(number).name)
