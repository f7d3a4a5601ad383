"""How far a long pass over images is: a bar where the output is a terminal, else a line a minute."""

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

from moco.cli.progress import SECONDS_BETWEEN_LINES

log = logging.getLogger(__name__)


class ImageProgress:
    """Inside a ``with`` block, shows what `say` is told.

    Args:
        title: what is being done, one word.
        start: images that were done before.
        total: of all.
    """

    def __init__(self, console: Console, title: str, start: int, total: int) -> None:
        self.title = title
        self.start, self.total = start, total
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
        self.began = self.said = time.monotonic()
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
        """So many images are done by now, those of earlier attempts too."""
        now = time.monotonic()
        rate = (done - self.start) / (now - self.began)
        self.bar.update(self.task, completed=done, rate=f"{rate:,.0f} a second")
        if self.bar.disable and done > self.start and now - self.said >= SECONDS_BETWEEN_LINES:
            self.said = now
            minutes = (self.total - done) / rate / 60
            log.info(
                "%s: %s of %s images, %.0f a second, %.0f minutes left",
                self.title, f"{done:,}", f"{self.total:,}", rate, minutes,
            )  # fmt: skip
