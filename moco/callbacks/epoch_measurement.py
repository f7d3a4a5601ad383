"""A measurement every so many epochs of a training, as a Lightning callback."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl

from moco.callbacks.running_trainer import is_end
from moco.runs.interrupts import measuring
from moco.training.stopwatches import MONITORS, epoch_time


class EpochMeasurement(pl.Callback, ABC):
    """Call `measure` every n epochs and at the end of the training.

    Args:
        figures: what the measurement reports into.
        should_stop: asked before every batch. A measurement that it stops is `owed`: it is repeated
            when the run resumes.
    """

    def __init__(
        self,
        figures: dict[str, Any],
        every_n_epochs: int = 1,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.figures = figures
        self.every_n_epochs = every_n_epochs
        self.should_stop = should_stop
        self.owed = False

    @abstractmethod
    def measure(self, trainer: pl.Trainer, pl_module: Any, epoch: int) -> None:
        """Measure the model after `epoch` epochs, and set `owed`."""

    def state_dict(self) -> dict[str, Any]:
        # If the state is empty, Lightning does not warn when a run resumes without this callback.
        return {"owed": True} if self.owed else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.owed = state_dict["owed"]

    @epoch_time.measured(MONITORS)
    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.owed:
            with measuring():
                self.measure(trainer, pl_module, self.figures["epoch"])

    @epoch_time.measured(MONITORS)
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        epoch = trainer.current_epoch + 1
        if is_end(trainer, epoch) or epoch % self.every_n_epochs == 0:
            with measuring():
                self.measure(trainer, pl_module, epoch)
