"""The progress bar of a training, and the line that stays after each epoch."""

import math
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl

from moco.callbacks.training_monitor import MUCH_WAITING, LossMonitor
from moco.phases import bar_line, clock, short
from moco.runs.log_file import write_to_log_files
from moco.screen import screen

if TYPE_CHECKING:
    from rich.console import Console

SECONDS_BETWEEN_READINGS = 2.0
"""The bar reads the loss this often. Each reading waits for the device."""
SECONDS_BEFORE_LINE = 10.0
"""Where the output is no terminal, a line shows after this long how far the training is. Each next
line comes after twice the time, up to `MOST_SECONDS`."""
MOST_SECONDS = 60.0


class ProgressBar(pl.Callback):
    """A bar over the steps of the epoch, with loss, speed, the time left and the latest scores.

    After each epoch one line stays. Where the output is no terminal, only these lines are printed,
    and some in between.

    Args:
        figures: the run's figures; monitors write into them.
        console: where the lines are printed. The bar moves on the `screen`.
        losses: counts losses and images. It is called before this callback.
        scores: pairs of a figure and the name to show. The figure is ``GROUP/NAME``, a fraction,
            and ``GROUP/epoch`` is the epoch in which it was measured.
    """

    def __init__(
        self,
        figures: Mapping[str, Any],
        console: "Console",
        losses: LossMonitor,
        *scores: tuple[str, str],
    ) -> None:
        self.figures = figures
        self.console = console
        self.losses = losses
        self.scores = scores
        self.loss = math.nan
        self.images_per_second = math.nan
        self.waiting_share = 0.0
        self.seconds_left = math.nan
        """Until the end of the training."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.num_steps = pl_module.num_steps
        batches = trainer.num_training_batches / trainer.accumulate_grad_batches
        self.steps_per_epoch = max(1, math.ceil(batches))
        # With max_steps, the training may end before max_epochs.
        self.num_epochs = max(1, math.ceil(self.num_steps / self.steps_per_epoch))
        done = trainer.global_step - trainer.current_epoch * self.steps_per_epoch
        self._begin_epoch(trainer, min(max(0, done), self.steps_per_epoch))
        self.first_step: int | None = None
        """The step after which the time left is measured: the first one also starts everything."""
        self.first_step_ended = 0.0
        self.last_reading = 0.0
        self.last_line = time.monotonic()
        self.pause = SECONDS_BEFORE_LINE
        if screen.moves and not self.console.quiet:
            screen.add(self)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch + 1 != self.epoch:
            self._begin_epoch(trainer, 0)

    def _begin_epoch(self, trainer: pl.Trainer, done: int) -> None:
        """Note the number of the epoch, counted from 1, and its steps: done ones and all."""
        self.epoch = trainer.current_epoch + 1
        self.done = done
        left = self.num_steps - trainer.global_step
        self.total = min(self.steps_per_epoch, done + left)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.done = (batch_idx + 1) // trainer.accumulate_grad_batches
        if batch_idx + 1 == trainer.num_training_batches:
            self.done = self.total  # the last step may take fewer batches
        now = time.monotonic()
        if self.first_step is None:
            self.first_step = trainer.global_step
            self.first_step_ended = now
        steps = trainer.global_step - self.first_step
        if steps > 0:
            seconds_per_step = (now - self.first_step_ended) / steps
            self.seconds_left = seconds_per_step * (self.num_steps - trainer.global_step)
        # Here, and not where it is drawn: another thread must not touch the stopwatches.
        self.images_per_second = self.losses.speed()["images_per_second"]
        self.waiting_share = self.losses.waiting_share()
        if screen.moves:
            # A thread of rich draws, a few times per second.
            if now - self.last_reading > SECONDS_BETWEEN_READINGS:
                self.last_reading = now
                self._read_loss()
        elif now - self.last_line > self.pause:
            self.pause = min(2 * self.pause, MOST_SECONDS)
            self._read_loss()
            fields = [text for _, text in self._fields()]
            self._print(f"{self._epoch()}  step {self.done}/{self.total}", *fields)

    def _read_loss(self) -> None:
        self.losses.read_losses()
        self.loss = self.losses.recent_loss

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        parts = [self._epoch(), f"loss {self.figures['train/loss']:.4f}"]
        parts.append(f"{short(self.figures['images_per_second'])} img/s")
        for figure, name in self.scores:
            group = figure.split("/")[0]
            is_measured = self.figures.get(figure) is not None
            if is_measured and self.figures.get(f"{group}/epoch") == self.epoch:
                parts.append(f"{name} {100 * self.figures[figure]:.2f} %")
        # Not in the first seconds: the first batch always waits.
        if self.losses.waiting_share() > MUCH_WAITING:
            parts.append(f"data wait {100 * self.figures['data_wait']:.0f} %")
        self._print(*parts)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        screen.remove(self)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        screen.remove(self)

    def _epoch(self) -> str:
        return f"epoch {self.epoch:>4}/{self.num_epochs}"

    def _print(self, *parts: str) -> None:
        line = "  ".join(parts)
        self.console.print(line, soft_wrap=True)
        if not self.console.quiet:
            write_to_log_files(line)
        self.last_line = time.monotonic()

    def _fields(self) -> list[tuple[int, str]]:
        """Return what is known of the training, each with its importance, see `bar_line`."""
        fields = []
        if math.isfinite(self.loss):
            fields.append((1, f"loss {self.loss:#.3g}"))
        if math.isfinite(self.images_per_second):
            fields.append((4, f"{short(self.images_per_second)} img/s"))
        if math.isfinite(self.seconds_left):
            fields.append((2, f"ETA {clock(self.seconds_left)}"))
        for place, (figure, name) in enumerate(self.scores):
            if self.figures.get(figure) is not None:
                importance = 3 if place == 0 else 5 + place
                fields.append((importance, f"{name} {100 * self.figures[figure]:.1f} %"))
        if self.waiting_share > MUCH_WAITING:
            fields.append((5, f"data wait {100 * self.waiting_share:.0f} %"))
        return fields

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        title = f"epoch {self.epoch}/{self.num_epochs}"
        steps = f"{self.done:>{len(str(self.total))}}/{self.total}"
        fields = [(0, steps), *self._fields()]
        yield bar_line(title, self.done, self.total, fields, options.max_width)
