"""The bar that long work draws on a terminal, and the progress of a pass over images."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


@contextmanager
def image_progress(
    console: Console, title: str, start: int, total: int
) -> Iterator[Callable[[int], None]]:
    """Show the number of finished images inside a ``with`` block.

    On a terminal it is a bar, elsewhere a log line per minute.

    Args:
        console: where the bar is drawn.
        title: what is being done, one word.
        start: number of images that an earlier attempt has finished.
        total: number of all images.

    Yields:
        A function that takes the number of finished images, those of earlier attempts included.
    """
    bar = progress_bar(console, "images")
    task = bar.add_task(title, total=total, completed=start, status="")
    start_time = time.monotonic()
    last_line_time = start_time

    def say(done: int) -> None:
        nonlocal last_line_time
        now = time.monotonic()
        rate = (done - start) / (now - start_time)
        bar.update(task, completed=done, status=f"{rate:,.0f} a second")
        is_line_due = now - last_line_time >= SECONDS_BETWEEN_LINES
        if bar.disable and is_line_due and done > start:
            last_line_time = now
            log.info(
                "%s: %s of %s images, %.0f per second, %.0f minutes left",
                title,
                f"{done:,}",
                f"{total:,}",
                rate,
                (total - done) / rate / 60,
            )

    with bar:
        yield say
