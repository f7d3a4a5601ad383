"""The progress bar, a line per epoch, and the tables that a program ends with."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

SECONDS_BETWEEN_LINES = 60.0
FRAMES_PER_SECOND = 4
"""Of the bar: drawing it takes milliseconds from the training thread."""


class ProgressBar(pl.Callback):
    """One bar over all steps with images/s, time left and the latest score; after each epoch, one line that stays.

    Where the output is no terminal, only the lines appear, and one a minute in between.

    Args:
        figures: the run's figures, filled in by the monitors.
        console: where to draw.
        scores: the figures to show, ``GROUP/NAME``, of which ``GROUP/epoch`` is the epoch, and what to call them.
    """

    def __init__(
        self, figures: Mapping[str, Any], console: Console, *scores: tuple[str, str]
    ) -> None:
        self.figures = figures
        self.console = console
        self.scores = scores
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps {task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=FRAMES_PER_SECOND,
            disable=not console.is_terminal,
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.task = self.progress.add_task(
            "training", total=pl_module.num_steps, completed=trainer.global_step, status=""
        )
        self.progress.start()
        self.last_line = self.last_update = time.monotonic()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        now = time.monotonic()
        if self.console.is_terminal:
            if now - self.last_update > 1 / FRAMES_PER_SECOND:
                self._update(trainer)
        elif now - self.last_line > SECONDS_BETWEEN_LINES:
            self._print(
                f"epoch {trainer.current_epoch + 1:>4}/{trainer.max_epochs}  step {trainer.global_step}"
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        line = f"epoch {epoch:>4}/{trainer.max_epochs}  loss {self.figures['train/loss']:.4f}"
        for score, name in self.scores:
            if self.figures.get(score.split("/")[0] + "/epoch") == epoch:
                line += f"  {name} {self.figures[score]:.4f}"
        line += f"  {self.figures['images_per_second']:,.0f} images/s  data wait {self.figures['data_wait']:.0%}"
        self._print(line)
        self._update(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.progress.stop()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.progress.stop()

    def _update(self, trainer: pl.Trainer) -> None:
        self.progress.update(self.task, completed=trainer.global_step, status=self._status())
        self.last_update = time.monotonic()

    def _print(self, line: str) -> None:
        self.progress.console.print(line, highlight=False)
        self.last_line = time.monotonic()

    def _status(self) -> str:
        parts = []
        if "images_per_second" in self.figures:
            parts.append(
                f"{self.figures['images_per_second']:,.0f} images/s, data wait {self.figures['data_wait']:.0%}"
            )
        parts += [
            f"{name} {self.figures[score]:.4f}"
            for score, name in self.scores
            if score in self.figures
        ]
        return " ".join(parts)


def print_table(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Two columns under a title."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")  # a path that is cut short cannot be copied
    for row in rows:
        table.add_row(*row)
    console.print(table)
