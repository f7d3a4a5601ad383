"""The progress of a long pass over images: a bar on a terminal, else one log line per minute."""

import logging
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 60.0

log = logging.getLogger(__name__)


class ImageProgress:
    """Shows the number of finished images inside a ``with`` block.

    Args:
        console: where the bar is drawn.
        title: what is being done, one word.
        start: number of images that an earlier attempt has finished.
        total: number of all images.
    """

    def __init__(self, console: Console, title: str, start: int, total: int) -> None:
        self.title = title
        self.start = start
        self.total = total
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("images {task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(title, total=total, completed=start, rate="")

    def __enter__(self) -> "ImageProgress":
        self.start_time = time.monotonic()
        self.last_line_time = self.start_time
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def say(self, done: int) -> None:
        """Show that `done` images are finished, those of earlier attempts included."""
        now = time.monotonic()
        rate = (done - self.start) / (now - self.start_time)
        self.bar.update(self.task, completed=done, rate=f"{rate:,.0f} a second")
        is_line_due = now - self.last_line_time >= SECONDS_BETWEEN_LINES
        if self.bar.disable and is_line_due and done > self.start:
            self.last_line_time = now
            minutes = (self.total - done) / rate / 60
            log.info(
                "%s: %s of %s images, %.0f per second, %.0f minutes left",
                self.title,
                f"{done:,}",
                f"{self.total:,}",
                rate,
                minutes,
            )
