"""The bar that long work draws on a terminal, and the progress of a pass over images."""

import logging
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Where the output is no terminal, a line shows this often that the work goes on.
SECONDS_BETWEEN_LINES = 60.0

log = logging.getLogger(__name__)


def progress_bar(console: Console, unit: str) -> Progress:
    """Return a bar with the number of finished parts, a status and the time left.

    It is invisible where the output is no terminal. Each task has a field ``status``.

    Args:
        unit: what is counted, in the plural.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit + " {task.fields[status]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        refresh_per_second=4,  # drawing takes milliseconds of the other threads' time
    )


class ImageProgress:
    """Shows the number of finished images inside a ``with`` block.

    On a terminal it is a bar, elsewhere a log line per minute.

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
        self.bar = progress_bar(console, "images")
        self.task = self.bar.add_task(title, total=total, completed=start, status="")

    def __enter__(self) -> "ImageProgress":
        self.start_time = time.monotonic()
        self.last_line_time = self.start_time
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def say(self, done: int) -> None:
        """Show that `done` images are finished, those of earlier attempts included."""
        now = time.monotonic()
        rate = (done - self.start) / (now - self.start_time)
        self.bar.update(self.task, completed=done, status=f"{rate:,.0f} a second")
        is_line_due = now - self.last_line_time >= SECONDS_BETWEEN_LINES
        if self.bar.disable and is_line_due and done > self.start:
            self.last_line_time = now
            minutes = (self.total - done) / rate / 60
            log.info(
                f"{self.title}: {done:,} of {self.total:,} images, "
                f"{rate:.0f} per second, {minutes:.0f} minutes left"
            )
