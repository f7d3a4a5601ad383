"""How long a run takes, said early where that is long, as a Lightning callback."""

import logging
import math
import time
from typing import Any

import pytorch_lightning as pl

from moco.callbacks.running_trainer import is_step_end
from moco.phases import about
from moco.training.distributed.collectives import rank

log = logging.getLogger(__name__)

HOUR = 3600
LONG = 2 * HOUR
"""A run that takes less, in seconds, says nothing."""
LEAST_STEPS = 2
"""Steps that are measured at least. The first one also starts everything, and is not."""
LEAST_SECONDS = 20.0
"""For so long the speed is measured at least."""


class LongRun(pl.Callback):
    """Say after the first steps on a CPU how long the run takes, and how to make it shorter.

    Whoever starts a preset on a CPU may not know that it takes a day. A run that resumes has been
    told before, and another number of epochs would change its schedule.
    """

    def __init__(self) -> None:
        self.is_done = True
        self.first_step = 0
        """The step after which the clock runs."""
        self.began = math.nan

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        is_new = trainer.global_step == 0
        is_on_cpu = trainer.strategy.root_device.type == "cpu"
        self.is_done = not (is_new and is_on_cpu and rank() == 0)
        self.began = math.nan

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.is_done or not is_step_end(trainer, batch_idx):
            return
        now = time.monotonic()
        if math.isnan(self.began):
            self.first_step = trainer.global_step
            self.began = now
        num_steps = trainer.global_step - self.first_step
        if num_steps < LEAST_STEPS or now - self.began < LEAST_SECONDS:
            return
        self.is_done = True
        batches = trainer.num_training_batches / trainer.accumulate_grad_batches
        line = in_words((now - self.began) / num_steps, math.ceil(batches), pl_module.num_steps)
        if line is not None:
            log.info(line)


def in_words(seconds_per_step: float, steps_per_epoch: int, num_steps: float) -> str | None:
    """Return how long a run takes, and a run of about an hour; None if it is not long.

    Args:
        seconds_per_step: the speed.
        steps_per_epoch: steps of an epoch.
        num_steps: steps of the run; infinite if nothing ends it.
    """
    seconds = seconds_per_step * num_steps
    if not math.isfinite(seconds) or seconds < LONG:
        return None
    seconds_per_epoch = seconds_per_step * steps_per_epoch
    if seconds_per_epoch <= HOUR:
        epochs = max(1, math.floor(HOUR / seconds_per_epoch))
        setting, shorter = f"trainer.max_epochs={epochs}", epochs * seconds_per_epoch
    else:
        steps = max(1, math.floor(HOUR / seconds_per_step))
        setting, shorter = f"trainer.max_steps={steps}", steps * seconds_per_step
    return (
        f"the training takes about {about(seconds)} at this speed; a shorter run: {setting} "
        f"(about {about(shorter)})"
    )
