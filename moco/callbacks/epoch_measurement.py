"""What is measured every so many epochs of a training, as a Lightning callback."""

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl


class EpochMeasurement(pl.Callback):
    """Calls `measure` every n epochs and at the end of the training.

    Args:
        figures: what it reports into.
        should_stop: asked before every batch. A measurement that is cut short is `owed`: it is made up for when the run
            goes on.
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

    def measure(self, trainer: pl.Trainer, pl_module: Any, epoch: int) -> None:
        """Measure the model after `epoch` epochs; sets `owed`."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        # Without a state Lightning does not warn when the run goes on without this measurement.
        return {"owed": True} if self.owed else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.owed = state_dict["owed"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.owed:
            self.measure(trainer, pl_module, self.figures["epoch"])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if is_end(trainer, epoch) or epoch % self.every_n_epochs == 0:
            self.measure(trainer, pl_module, epoch)


def is_end(trainer: pl.Trainer, epoch: int) -> bool:
    """Whether the training ends with this epoch, counted from 1."""
    return epoch == trainer.max_epochs or trainer.global_step == trainer.max_steps
