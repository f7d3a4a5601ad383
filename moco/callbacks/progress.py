"""The progress bar of a training, and the line that stays after each epoch."""

import time
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from rich.console import Console

from moco.runs.progress_bar import SECONDS_BETWEEN_LINES, progress_bar


class ProgressBar(pl.Callback):
    """A bar over all steps with images/s, the time left and the latest scores.

    After each epoch one line stays. Where the output is no terminal, only these lines are printed,
    and one a minute in between.

    Args:
        figures: the run's figures; monitors write into them.
        console: where the bar is drawn.
        scores: pairs of a figure and the name to show. The figure is ``GROUP/NAME``, and
            ``GROUP/epoch`` is the epoch in which it was measured.
    """

    def __init__(
        self, figures: Mapping[str, Any], console: Console, *scores: tuple[str, str]
    ) -> None:
        self.figures = figures
        self.console = console
        self.scores = scores
        self.progress = progress_bar(console, "steps")

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.task = self.progress.add_task(
            "training", total=pl_module.num_steps, completed=trainer.global_step, status=""
        )
        self.progress.start()
        self.last_line = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.console.is_terminal:
            # A thread of rich draws, a few times per second.
            self._update(trainer)
        elif time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            epoch = f"epoch {trainer.current_epoch + 1:>4}/{trainer.max_epochs}"
            self._print(f"{epoch}  step {trainer.global_step}")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        epoch = trainer.current_epoch + 1
        parts = [
            f"epoch {epoch:>4}/{trainer.max_epochs}",
            f"loss {self.figures['train/loss']:.4f}",
        ]
        for figure, name in self.scores:
            group = figure.split("/")[0]
            is_measured = self.figures.get(figure) is not None
            if is_measured and self.figures.get(f"{group}/epoch") == epoch:
                parts.append(f"{name} {self.figures[figure]:.4f}")
        parts.append(f"{self.figures['images_per_second']:,.0f} images/s")
        parts.append(f"data wait {self.figures['data_wait']:.0%}")
        self._print("  ".join(parts))
        self._update(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.progress.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.progress.stop()

    def _update(self, trainer: pl.Trainer) -> None:
        self.progress.update(self.task, completed=trainer.global_step, status=self._status())

    def _print(self, line: str) -> None:
        self.progress.console.print(line, highlight=False)
        self.last_line = time.monotonic()

    def _status(self) -> str:
        """Return the speed and the latest scores, as far as they are known."""
        parts = []
        if "images_per_second" in self.figures:
            speed = f"{self.figures['images_per_second']:,.0f} images/s"
            parts.append(f"{speed}, data wait {self.figures['data_wait']:.0%}")
        for figure, name in self.scores:
            if self.figures.get(figure) is not None:
                parts.append(f"{name} {self.figures[figure]:.4f}")
        return " ".join(parts)
