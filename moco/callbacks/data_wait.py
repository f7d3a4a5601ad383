"""How long training waits for its data, and one warning where that is too long."""

import logging

import pytorch_lightning as pl

from moco.data.loading.waiting import cores_of

log = logging.getLogger(__name__)

MUCH = 0.2  # of the time
EPOCH_SECONDS = 30.0  # an epoch's end tells after so long,
SECONDS = 60.0  # any other step after so long


class DataWait:
    """Of this start of a run: a run that goes on may do so with other settings.

    The first step is left out, whose wait is that for the loader's processes to begin.
    """

    def __init__(self) -> None:
        self.seconds = self.waited = 0.0
        self.num_steps = 0
        self.is_said = False

    def add(self, waited: float, seconds: float) -> None:
        """A step that took `seconds`, of which it `waited` for its batch."""
        self.num_steps += 1
        if self.num_steps > 1:
            self.waited += waited
            self.seconds += seconds

    def check(self, trainer: pl.Trainer, at_least: float) -> None:
        """Warn once, if training has gone on for so many seconds; of the remedies its data module knows."""
        if self.is_said or self.seconds < at_least or self.waited <= MUCH * self.seconds:
            return
        self.is_said = True
        share = self.waited / self.seconds
        has_gpu = trainer.strategy.root_device.type != "cpu"
        data = trainer.datamodule  # type: ignore[attr-defined]
        remedies = data.remedies_for_waiting(share, cores_of(trainer.num_devices), has_gpu)
        if remedies:
            log.warning(
                "%.0f %% of the time goes into waiting for data; what would help: %s",
                100 * share,
                ", or ".join(remedies),
            )
