"""Work that may take long: a named bar on a terminal, a line of the log elsewhere.

>>> with phase("searching", total=len(queries), unit="queries") as say:
...     for number, query in enumerate(queries, start=1):
...         search(query)
...         say(number)
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from moco.screen import screen

log = logging.getLogger(__name__)

LOADING = "loading the libraries"
"""Title of the phase in which a program imports torch, which takes seconds."""
SECONDS_WITHOUT_BAR = 2.0
"""A phase that ends sooner draws nothing."""
SECONDS_WITHOUT_LINE = 10.0
"""Where the output is no terminal, a phase that ends sooner logs nothing."""
SECONDS_BETWEEN_LINES = 60.0
BAR_WIDTH = 40
"""Most columns of a bar."""
LEAST_BAR_WIDTH = 8
"""Fewest columns of a bar; with less left, a field goes."""

Item = TypeVar("Item")


@contextmanager
def phase(
    title: str, total: int | None = None, unit: str = "images", start: int = 0
) -> Iterator[Callable[[int], None]]:
    """Show how far the work inside a ``with`` block is, if it takes more than two seconds.

    On a terminal it is a bar. Elsewhere it is a line of the log after ten seconds, and one a minute
    from then on. Nothing is shown while the `screen` is off, or on a process that does not log.

    Args:
        title: what is being done, such as ``kNN: bank``.
        total: number of parts; None if nobody knows it.
        unit: what is counted, in the plural; empty if nothing is.
        start: number of parts that were done before.

    Yields:
        A function that takes the number of finished parts, with those that were done before.
    """
    running = Phase(title, total, unit, start)
    is_shown = screen.is_on and log.isEnabledFor(logging.INFO)
    if not is_shown:
        yield running.say
        return
    # A thread, because the work may be a single call that takes minutes.
    watcher = threading.Thread(target=running.watch, daemon=True)
    watcher.start()
    try:
        yield running.say
    finally:
        running.ended.set()
        watcher.join()
        screen.remove(running)


def counted(
    items: Iterable[Item],
    title: str,
    total: int | None = None,
    unit: str = "images",
    size: Callable[[Item], int] = lambda item: 1,
) -> Iterator[Item]:
    """Yield the items, and show how many were taken, as `phase` does.

    Args:
        items: what the work takes one after another.
        title, total, unit: see `phase`.
        size: how many parts an item stands for, such as the images of a batch.
    """
    done = 0
    with phase(title, total, unit) as say:
        for item in items:
            yield item
            done += size(item)
            say(done)


class Phase:
    """Long work that goes on. rich draws it as one line."""

    def __init__(self, title: str, total: int | None, unit: str, start: int) -> None:
        self.title = title
        self.total = total
        self.unit = unit
        self.start = start
        self.done = start
        self.began = time.monotonic()
        self.ended = threading.Event()

    def say(self, done: int) -> None:
        """Note the number of finished parts."""
        self.done = done

    def watch(self) -> None:
        """Show the phase once it takes long, until it has ended."""
        if screen.moves:
            if not self.ended.wait(SECONDS_WITHOUT_BAR):
                screen.add(self)
            return
        pause = SECONDS_WITHOUT_LINE
        while not self.ended.wait(pause):
            log.info(self.line())
            pause = SECONDS_BETWEEN_LINES

    def line(self) -> str:
        """Return the state of the work in words."""
        return ", ".join([f"{self.title}: {self.amount()}", *self.speed_and_rest()])

    def amount(self) -> str:
        """Return how much is done, or for how long the work goes on if nothing is counted."""
        if self.total is not None and self.unit:
            return f"{self.done:,} of {self.total:,} {self.unit}"
        if self.done:
            return f"{self.done:,} {self.unit}"
        return clock(time.monotonic() - self.began)

    def speed_and_rest(self) -> list[str]:
        """Return the parts per second and the time left, as far as they are known."""
        parts = []
        seconds = time.monotonic() - self.began
        if self.done > self.start and seconds > 0:
            speed = (self.done - self.start) / seconds
            parts.append(f"{short(speed)}/s")
            if self.total is not None:
                parts.append(f"ETA {clock((self.total - self.done) / speed)}")
        return parts

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        fields = [(0, self.amount())]
        for place, text in enumerate(reversed(self.speed_and_rest()), start=1):
            fields.insert(1, (place, text))
        yield bar_line(self.title, self.done, self.total, fields, options.max_width)


def bar_line(
    title: str, done: int, total: int | None, fields: Iterable[tuple[int, str]], width: int
) -> Any:
    """Return a title, a bar and fields on one line of a terminal.

    The bar gets the columns that the fields leave, up to `BAR_WIDTH`.

    Args:
        title: before the bar.
        done, total: parts of the bar; it moves to and fro if the total is None.
        fields: after the bar, each with its importance: 0 is the most important. The least
            important ones are left out where the line is too narrow.
        width: of the terminal, in columns.
    """
    from rich.cells import cell_len
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    shown_title = Text(title)
    shown_title.truncate(width // 2)  # the path of a folder can be long
    shown = list(fields)
    while True:
        after = "  ".join(text for _, text in shown)
        bar_width = width - shown_title.cell_len - cell_len(after) - 2
        if bar_width >= LEAST_BAR_WIDTH or len(shown) <= 1:
            break
        shown.remove(max(shown))
    line = Table.grid(padding=(0, 1, 0, 0))
    for _ in range(3):
        line.add_column(no_wrap=True)
    bar_width = min(bar_width, BAR_WIDTH)
    bar: Any = ""
    if bar_width >= 1:
        bar = ProgressBar(total=total, completed=done, width=bar_width, pulse=total is None)
    line.add_row(shown_title, bar, Text(after))
    return line


def short(speed: float) -> str:
    """Return a number per second; one digit behind the point if it is small."""
    return f"{speed:,.0f}" if speed >= 10 else f"{speed:.1f}"


def about(seconds: float) -> str:
    """Return a rough duration as ``22 h``, ``40 min`` or ``3 s``; from two days on in days."""
    if seconds >= 48 * 3600:
        return f"{seconds / 86400:.0f} days"
    if seconds >= 3300:
        return f"{max(1.0, seconds / 3600):.2g} h"
    if seconds >= 90:
        return f"{seconds / 60:.0f} min"
    return f"{max(1, seconds):.0f} s"


def clock(seconds: float) -> str:
    """Return a duration as ``5:12``, ``1 h 05 m`` or ``2 d 5 h``."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour} h"
    if hours:
        return f"{hour} h {minute:02} m"
    return f"{minute}:{second:02}"
