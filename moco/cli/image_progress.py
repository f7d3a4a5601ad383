"""The progress of a long pass over images: a bar on a terminal, else one log line per minute."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn

SECONDS_BETWEEN_LINES = 60.0

log = logging.getLogger(__name__)


@contextmanager
def image_progress(
    console: Console, title: str, start: int, total: int
) -> Iterator[Callable[[int], None]]:
    """Show the number of finished images inside a ``with`` block.

    Args:
        console: where the bar is drawn.
        title: what is being done, one word.
        start: number of images that an earlier attempt has finished.
        total: number of all images.

    Yields:
        A function that takes the number of finished images, those of earlier attempts included.
    """
    columns = (MofNCompleteColumn(), TextColumn("images {task.fields[rate]}"))
    bar = Progress(
        *Progress.get_default_columns(), *columns, console=console, disable=not console.is_terminal
    )
    task = bar.add_task(title, total=total, completed=start, rate="")
    start_time = time.monotonic()
    last_line_time = start_time

    def say(done: int) -> None:
        nonlocal last_line_time
        now = time.monotonic()
        rate = (done - start) / (now - start_time)
        bar.update(task, completed=done, rate=f"{rate:,.0f} a second")
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
