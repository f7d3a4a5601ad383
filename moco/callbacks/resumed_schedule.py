"""The schedule of a run that resumes with another length or with other images."""

import logging
import math
from typing import Any

import pytorch_lightning as pl

log = logging.getLogger(__name__)

KEY = "schedule_offset"
"""Of the checkpoint's item: added to the step that the schedule sees. Missing: 0."""
JUMP = 0.1
"""A change of the learning rate by more than this share is a jump."""


class ResumedSchedule(pl.Callback):
    """Keep the schedule at its epoch, and say what another length of the run does to it.

    A schedule is a function of the step. If an epoch has other steps than before, the step is
    shifted, so that the schedule goes on at the same epoch and ends with the run.

    The module has ``learning_rate_at(step)`` and ``schedule_offset``.

    Args:
        has_other_steps: an epoch had another number of steps when the checkpoint was written.
        steps_in_epoch: of an unfinished epoch, so many were done.
    """

    def __init__(self, has_other_steps: bool, steps_in_epoch: int) -> None:
        self.has_other_steps = has_other_steps
        self.steps_in_epoch = steps_in_epoch
        self.loaded: dict[str, Any] = {}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        groups = checkpoint["optimizer_states"][0]["param_groups"]
        length = checkpoint["config"]["trainer"]
        self.loaded = {
            "lr": max(group["lr"] for group in groups),
            "max_epochs": length.get("max_epochs"),
            "max_steps": length.get("max_steps", -1),
            KEY: checkpoint.get(KEY, 0),
        }

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        if pl_module.schedule_offset:
            checkpoint[KEY] = pl_module.schedule_offset

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not self.loaded:
            return
        step = trainer.global_step
        pl_module.schedule_offset = self.loaded[KEY]
        if self.has_other_steps:
            pl_module.schedule_offset = self._offset(trainer, pl_module)
        changes = []
        former = []
        for key in ("max_epochs", "max_steps"):
            there, here = self.loaded[key], getattr(trainer, key)
            if there != here:
                changes.append(f"trainer.{key}={here} instead of {there}")
                former.append(f"trainer.{key}={there}")
        is_over = step + pl_module.schedule_offset >= pl_module.num_steps
        if not changes or is_over:
            return
        before, after = self.loaded["lr"], pl_module.learning_rate_at(step)
        if math.isclose(before, after, rel_tol=JUMP):
            return
        direction = "up" if after > before else "down"
        log.warning(
            "%s: the schedule is another one, and the learning rate jumps %s from %.3g to %.3g at "
            "step %d. If you forgot %s, stop here and repeat the command with it. To train longer "
            "without a jump, start a new run from these weights, with a schedule of its own: "
            "init_from=%s and another hydra.run.dir=PATH",
            "; ".join(changes),
            direction,
            before,
            after,
            step + 1,
            " ".join(former),
            trainer.ckpt_path,
        )

    def _offset(self, trainer: pl.Trainer, pl_module: Any) -> int:
        """Return the shift with which the schedule goes on at the same epoch."""
        batches = trainer.num_training_batches
        steps_per_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
        num_steps = steps_per_epoch * (trainer.max_epochs or 0)
        if 0 < trainer.max_steps <= num_steps:
            return int(self.loaded[KEY])  # steps alone decide the length
        position = trainer.current_epoch * steps_per_epoch + self.steps_in_epoch
        return int(position) - trainer.global_step
