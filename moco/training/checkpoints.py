"""When a run saves its checkpoints, and what they hold: enough to go on bit for bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from moco.errors import Interrupted, RunError
from moco.training.checkpoint_files import link_atomically
from moco.training.interrupts import StopRequest
from moco.training.random_states import random_states, set_random_states
from moco.training.run_folder import (
    BEST_CHECKPOINT,
    LAST_CHECKPOINT,
    as_override,
    last_good,
    write_atomically,
    write_json,
)


class Checkpoints(pl.callbacks.Checkpoint):
    """Writes ``checkpoints/last.ckpt``, ``checkpoints/best.ckpt`` and ``metrics.json``; stops the run when asked to.

    A checkpoint also holds the run's config as plain data, its figures so far and the state of every random generator.

    Args:
        folder: the run folder.
        config: the run's config as plain data.
        figures: the flat dict that becomes ``metrics.json``; other callbacks fill it in.
        stop: a signal to save and end the run.
        every_n_epochs: between two checkpoints; the last epoch always gets one.
        monitor: the figure whose highest value makes the best checkpoint, ``GROUP/NAME``; ``GROUP/epoch`` is its epoch.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        figures: dict[str, Any],
        stop: StopRequest,
        every_n_epochs: int = 1,
        monitor: str = "knn/top1",
    ) -> None:
        self.folder = folder
        self.config = config
        self.figures = figures
        self.stop = stop
        self.every_n_epochs = every_n_epochs
        self.monitor = monitor
        self.monitor_epoch = monitor.split("/")[0] + "/epoch"
        self.best = -1.0
        self.saved_at = -1  # the step at which last.ckpt was written in the middle of an epoch
        self._random_states: dict[str, Any] | None = None
        self._loaded_monitor_epoch: int | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if (self.folder / BEST_CHECKPOINT).is_file():  # another run's best is no mark for this one
            self.best = state_dict["best"]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["config"] = self.config
        checkpoint["figures"] = dict(self.figures)
        checkpoint["random_states"] = random_states()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.figures.update(checkpoint["figures"])
        self._random_states = checkpoint["random_states"]
        self._loaded_monitor_epoch = checkpoint["figures"].get(self.monitor_epoch)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop.listen()
        if self._random_states is not None:
            set_random_states(self._random_states)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        at_step_end = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not at_step_end or batch_idx + 1 >= trainer.num_training_batches:
            return  # at an epoch's end, on_train_epoch_end saves
        if self.stop or trainer.global_step == trainer.max_steps:
            self.save_last(trainer)
            self.saved_at = trainer.global_step
        if self.stop:
            raise self._interrupted(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        self.figures |= {"epoch": epoch, "step": trainer.global_step}
        if not np.isfinite(self.figures.get("train/loss", 0.0)):
            raise RunError(f"the loss of epoch {epoch} is not finite; {last_good(self.folder)}")
        is_best = self._is_best()
        is_end = epoch == trainer.max_epochs or trainer.global_step == trainer.max_steps
        if is_best or is_end or self.stop or epoch % self.every_n_epochs == 0:
            if self.saved_at == trainer.global_step:
                self._add_figures(trainer)
            else:
                self.save_last(trainer)
        if is_best:
            link_atomically(self.folder / LAST_CHECKPOINT, self.folder / BEST_CHECKPOINT)
        write_json(self.folder / "metrics.json", self.figures)
        if self.stop:
            raise self._interrupted(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take note of a measurement that was owed from before the resume."""
        is_new = self.figures.get(self.monitor_epoch) != self._loaded_monitor_epoch
        if is_new and (self.folder / LAST_CHECKPOINT).is_file():
            is_best = self._is_best()
            self._add_figures(trainer)
            if is_best:
                link_atomically(self.folder / LAST_CHECKPOINT, self.folder / BEST_CHECKPOINT)

    def save_last(self, trainer: pl.Trainer) -> None:
        """Replace ``last.ckpt`` by the state of this moment.

        Raises:
            RunError: a weight is not finite; the old file stays.
        """
        if not all(parameter.isfinite().all() for parameter in trainer.lightning_module.parameters()):
            raise RunError(f"a weight is not finite at step {trainer.global_step}; {last_good(self.folder)}")
        trainer.save_checkpoint(self.folder / LAST_CHECKPOINT)

    def _is_best(self) -> bool:
        """Whether the monitored figure is this epoch's and the best so far; takes note of it."""
        is_new = self.monitor_epoch in self.figures and self.figures[self.monitor_epoch] == self.figures["epoch"]
        is_best = is_new and self.figures[self.monitor] > self.best
        if is_best:
            self.best = self.figures[self.monitor]
        return is_best

    def _add_figures(self, trainer: pl.Trainer) -> None:
        """Add what was measured after the last step to the checkpoint that was written at it.

        max_steps may have ended the epoch early: to Lightning it is over then, and a checkpoint of now would make a longer
        run skip the rest of it. Or a resumed run has made up for a measurement before its first step.
        """
        path = self.folder / LAST_CHECKPOINT
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["figures"] = dict(self.figures)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if state := callback.state_dict():
                checkpoint["callbacks"][callback.state_key] = state
        write_atomically(path, lambda file: torch.save(checkpoint, file))

    def _interrupted(self, trainer: pl.Trainer) -> Interrupted:
        number = self.stop.signal_number
        assert number is not None
        where = f"epoch {trainer.current_epoch + 1}, step {trainer.global_step}"
        return Interrupted(
            number,
            f"in {where}; saved {self.folder / LAST_CHECKPOINT}; to go on, add {as_override('hydra.run.dir', self.folder)}",
        )
