"""When a run saves its checkpoints, and what they hold: enough to go on bit for bit."""

import logging
import math
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from moco.callbacks.stopwatches import CHECKPOINTS, epoch_time
from moco.errors import Interrupted, RunError
from moco.runs.atomic_files import link_atomically, write_atomically, write_json
from moco.runs.interrupts import StopRequest
from moco.runs.run_folder import BEST_CHECKPOINT, LAST_CHECKPOINT, as_override, last_good
from moco.training.distributed.collectives import Agreement, gather_objects, largest
from moco.training.random_states import random_states, seed_generators, set_random_states

log = logging.getLogger(__name__)


class Checkpoints(pl.callbacks.Checkpoint):
    """Writes ``checkpoints/last.ckpt``, ``checkpoints/best.ckpt`` and ``metrics.json``; stops the run when asked to.

    A checkpoint also holds the run's config as plain data, its figures so far and the state of every random generator of
    every process. Rank 0 writes; all ranks decide the same.

    Args:
        folder: the run folder.
        config: the run's config as plain data.
        figures: the flat dict that becomes ``metrics.json``; other callbacks fill it in, on every rank alike. It gets
            ``GROUP/best_NAME`` and ``GROUP/best_epoch`` of the monitored figure.
        stop: a signal to save and end the run.
        every_n_epochs: between two checkpoints; the last epoch always gets one.
        every_n_minutes: after so long without a checkpoint, one at the end of the step.
        keep_every_n_epochs: keep every n-th epoch's for good, as ``checkpoints/epoch_0100.ckpt``.
        monitor: the figure whose highest value makes the best checkpoint, ``GROUP/NAME``; ``GROUP/epoch`` is its epoch.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        figures: dict[str, Any],
        stop: StopRequest,
        every_n_epochs: int = 1,
        every_n_minutes: float = 30.0,
        keep_every_n_epochs: int | None = None,
        monitor: str = "knn/top1",
    ) -> None:
        self.folder = folder
        self.config = config
        self.figures = figures
        self.stop = stop
        self.every_n_epochs = every_n_epochs
        self.every_n_seconds = 60 * every_n_minutes
        self.keep_every_n_epochs = keep_every_n_epochs
        self.monitor = monitor
        group, name = monitor.split("/")
        self.monitor_epoch, self.best_name, self.best_epoch = (
            f"{group}/epoch",
            f"{group}/best_{name}",
            f"{group}/best_epoch",
        )
        self.best = -1.0
        self.saved_at = -1  # the step at which last.ckpt was written in the middle of an epoch
        self.last_saved = 0.0  # on the monotonic clock
        self.asked_before = (
            False  # the agreement's next answer is to a question from before the last save
        )
        self.agreement = Agreement()
        self._loaded: dict[str, Any] | None = None

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
        checkpoint["random_states"] = gather_objects(random_states())

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.figures.update(checkpoint["figures"])
        self._loaded = {key: checkpoint[key] for key in ("random_states", "figures", "global_step")}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make up for what the process before did not come to after its last checkpoint."""
        if self._loaded is None or not (self.folder / LAST_CHECKPOINT).is_file():
            return
        loaded = self._loaded["figures"]
        if loaded.get("step") == self._loaded["global_step"]:  # of an epoch's end: its other names
            is_best = loaded.get(self.best_epoch) == loaded["epoch"]
            self.best = loaded[self.best_name] if is_best else self.best
            self._link(trainer, loaded["epoch"], is_best)
        if self.figures.get(self.monitor_epoch) != loaded.get(
            self.monitor_epoch
        ):  # a measurement that was owed
            is_best = self._is_best()
            self._add_figures(trainer)
            self._link(trainer, self.figures["epoch"], is_best)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop.listen()
        self.last_saved = time.monotonic()
        states = self._loaded["random_states"] if self._loaded else []
        if len(states) == trainer.world_size:
            set_random_states(states[trainer.global_rank])
            return
        if (
            trainer.global_rank > 0 or states
        ):  # the weights are equal everywhere, but not what stochastic depth draws
            seed_generators(torch.initial_seed(), trainer.global_step, trainer.global_rank)
        if states:
            log.warning(
                "%d processes instead of %d: the same images in the same global batches, but no longer the same to the "
                "last bit, as sums are taken in another order and BatchNorm and stochastic depth see other groups",
                trainer.world_size, len(states),
            )  # fmt: skip

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        is_due = time.monotonic() - self.last_saved > self.every_n_seconds
        stop, save = self.agreement.exchange([self.stop.signal_number or 0, int(is_due)])
        if self.asked_before:
            save = self.asked_before = False
        if stop:
            self.stop.request(stop)  # it may have come to another rank only
        if batch_idx + 1 >= trainer.num_training_batches:
            return  # at an epoch's end, on_train_epoch_end saves
        if stop or save or trainer.global_step == trainer.max_steps:
            self.save_last(trainer)
            self.saved_at = trainer.global_step
        if stop:
            raise self._interrupted(trainer, stop)

    @epoch_time.measured(CHECKPOINTS)
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        self.figures |= {"epoch": epoch, "step": trainer.global_step}
        is_best = self._is_best()
        is_end = epoch == trainer.max_epochs or trainer.global_step == trainer.max_steps
        is_due = time.monotonic() - self.last_saved > self.every_n_seconds
        stop, save = largest(
            [self.stop.signal_number or 0, int(is_due or epoch % self.every_n_epochs == 0)]
        )
        if stop:
            self.stop.request(stop)
        if is_best or is_end or self._is_kept(epoch) or stop or save:
            if self.saved_at == trainer.global_step:
                self._add_figures(trainer)
            else:
                self.save_last(trainer)
        self._link(trainer, epoch, is_best)
        if trainer.is_global_zero:
            write_json(self.folder / "metrics.json", self.figures)
        if stop:
            raise self._interrupted(trainer, stop)

    @epoch_time.measured(CHECKPOINTS)
    def save_last(self, trainer: pl.Trainer) -> None:
        """Replace ``last.ckpt`` by the state of this moment.

        Raises:
            RunError: a weight is not finite; the old file stays.
        """
        weights = [
            weight.detach() for weight in trainer.lightning_module.parameters() if weight.numel()
        ]
        # The largest absolute value of all: not finite if any is not, and one wait for a GPU instead of one a weight.
        if not torch.nn.utils.get_total_norm(weights, norm_type=math.inf).isfinite():
            raise RunError(
                f"a weight is not finite at step {trainer.global_step}; {last_good(self.folder)}"
            )
        for logger in trainer.loggers:
            logger.save()  # a run that goes on from here writes no point of the curves up to here again
        trainer.save_checkpoint(self.folder / LAST_CHECKPOINT)
        self.last_saved = time.monotonic()
        self.asked_before = trainer.world_size > 1

    def _link(self, trainer: pl.Trainer, epoch: int, is_best: bool) -> None:
        """Give ``last.ckpt`` of this epoch's end the other names that it deserves."""
        if not trainer.is_global_zero:
            return
        if is_best:
            link_atomically(self.folder / LAST_CHECKPOINT, self.folder / BEST_CHECKPOINT)
        if self._is_kept(epoch):
            kept = LAST_CHECKPOINT.with_name(f"epoch_{epoch:04}.ckpt")
            link_atomically(self.folder / LAST_CHECKPOINT, self.folder / kept)

    def _is_kept(self, epoch: int) -> bool:
        return self.keep_every_n_epochs is not None and epoch % self.keep_every_n_epochs == 0

    def _is_best(self) -> bool:
        """Whether the monitored figure is this epoch's and the best so far; takes note of it."""
        is_new = (
            self.monitor_epoch in self.figures
            and self.figures[self.monitor_epoch] == self.figures["epoch"]
        )
        is_best = is_new and self.figures[self.monitor] > self.best
        if is_best:
            self.best = self.figures[self.monitor]
            self.figures |= {self.best_name: self.best, self.best_epoch: self.figures["epoch"]}
        return is_best

    @epoch_time.measured(CHECKPOINTS)
    def _add_figures(self, trainer: pl.Trainer) -> None:
        """Add what was measured after the last step to the checkpoint that was written at it.

        max_steps may have ended the epoch early: to Lightning it is over then, and a checkpoint of now would make a longer
        run skip the rest of it. Or a resumed run has made up for a measurement before its first step.
        """
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        states = {
            callback.state_key: callback.state_dict() for callback in callbacks
        }  # on every rank: they may exchange
        if not trainer.is_global_zero:
            return
        path = self.folder / LAST_CHECKPOINT
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["figures"] = dict(self.figures)
        checkpoint["callbacks"] = {key: state for key, state in states.items() if state}
        write_atomically(path, lambda file: torch.save(checkpoint, file))

    def _interrupted(self, trainer: pl.Trainer, number: int) -> Interrupted:
        where = f"epoch {trainer.current_epoch + 1}, step {trainer.global_step}"
        return Interrupted(
            number,
            f"in {where}; saved {self.folder / LAST_CHECKPOINT}; to go on, add {as_override('hydra.run.dir', self.folder)}",
        )
