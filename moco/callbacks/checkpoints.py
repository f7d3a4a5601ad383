"""The checkpoints of a run: when they are saved, and what they hold to resume to the same bits."""

import logging
import math
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from moco.callbacks.running_trainer import is_end
from moco.errors import Interrupted, RunError
from moco.phases import phase
from moco.runs.atomic_files import link_atomically, write_atomically, write_json
from moco.runs.checkpoint_files import in_bytes
from moco.runs.interrupts import StopRequest
from moco.runs.run_folder import BEST_CHECKPOINT, LAST_CHECKPOINT, as_override, last_good
from moco.runs.training_set import KEY, TrainingSet
from moco.training.distributed.collectives import Agreement, gather_objects, largest
from moco.training.random_states import random_states, seed_generators, set_random_states
from moco.training.stopwatches import CHECKPOINTS, epoch_time

log = logging.getLogger(__name__)

LARGE = 200_000_000
"""From this size on, bytes, a run says once how large its checkpoints are."""


class Checkpoints(pl.callbacks.Checkpoint):
    """Write ``last.ckpt``, ``best.ckpt`` and ``metrics.json``, and stop the run when asked to.

    Beside what Lightning saves, a checkpoint holds the run's config as plain data, its figures so
    far and the state of every random generator of every process. Rank 0 writes; all ranks decide
    the same.

    Args:
        folder: the run folder.
        config: the run's config as plain data.
        figures: the flat dict that becomes ``metrics.json``. Other callbacks fill it in, on every
            rank alike. It gets ``GROUP/best_NAME`` and ``GROUP/best_epoch`` of the monitored
            figure.
        stop: a signal to save and end the run.
        every_n_epochs: epochs between two checkpoints; the last epoch always gets one.
        every_n_minutes: after this long without a checkpoint, one is saved at the end of the step.
        keep_every_n_epochs: keep every n-th epoch's checkpoint as ``epoch_0100.ckpt``.
        monitor: ``GROUP/NAME``, the figure whose highest value makes the best checkpoint.
            ``GROUP/epoch`` is the epoch of its latest value.
        training_set: the images of the run, which a checkpoint describes.
        takes_figures: the figures of the checkpoint that the run resumes from are of this run and
            of its images. Otherwise only the numbers of epochs and steps are taken.
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
        training_set: TrainingSet | None = None,
        takes_figures: bool = True,
    ) -> None:
        self.folder = folder
        self.config = config
        self.figures = figures
        self.stop = stop
        self.every_n_epochs = every_n_epochs
        self.every_n_seconds = 60 * every_n_minutes
        self.keep_every_n_epochs = keep_every_n_epochs
        self.monitor = monitor
        self.training_set = training_set
        self.takes_figures = takes_figures
        group, _, name = monitor.partition("/")
        self.monitor_epoch = f"{group}/epoch"
        self.best_name = f"{group}/best_{name}"
        self.best_epoch = f"{group}/best_epoch"
        self.best = -1.0
        self.saved_at = -1
        """The step at which last.ckpt was written in the middle of an epoch."""
        self.last_saved = 0.0
        """Seconds on the monotonic clock."""
        self.asked_before = False
        """The next answer of the agreement is to a question from before the last save."""
        self.agreement = Agreement()
        self.is_size_said = False
        self.step_ended: float | None = None
        """Seconds on the monotonic clock; None before the first step of an epoch."""
        self._loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # A run that starts from another run's checkpoint has no best checkpoint yet.
        if self.takes_figures and (self.folder / BEST_CHECKPOINT).is_file():
            self.best = state_dict["best"]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["config"] = self.config
        checkpoint["figures"] = dict(self.figures)
        if self.training_set is not None:
            checkpoint[KEY] = self.training_set.as_plain_data()
        checkpoint["random_states"] = gather_objects(random_states())

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        figures = checkpoint["figures"]
        if not self.takes_figures:
            figures = {key: figures[key] for key in ("epoch", "step") if key in figures}
        self.figures.update(figures)
        self._loaded = {key: checkpoint[key] for key in ("random_states", "global_step")}
        self._loaded["figures"] = figures

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Finish what the previous process left undone after its last checkpoint."""
        if self._loaded is None or not (self.folder / LAST_CHECKPOINT).is_file():
            return
        loaded = self._loaded["figures"]
        if loaded.get("step") == self._loaded["global_step"]:
            # The checkpoint is of an epoch's end; its other names may be missing.
            is_best = loaded.get(self.best_epoch) == loaded["epoch"]
            if is_best:
                self.best = loaded[self.best_name]
            self._link(trainer, loaded["epoch"], is_best)
        if self.figures.get(self.monitor_epoch) != loaded.get(self.monitor_epoch):
            # A measurement was owed, and the monitor has just repeated it.
            is_best = self._update_best()
            self._add_figures(trainer)
            self._link(trainer, self.figures["epoch"], is_best)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.stop.listen()
        self.last_saved = time.monotonic()
        states = self._loaded["random_states"] if self._loaded else []
        if len(states) == trainer.world_size:
            set_random_states(states[trainer.global_rank])
            return
        # All ranks start with equal weights, but each draws its own stochastic depth.
        if trainer.global_rank > 0 or states:
            seed_generators(torch.initial_seed(), trainer.global_step, trainer.global_rank)
        if states:
            log.warning(
                f"{trainer.world_size} processes instead of {len(states)}: the same images in the "
                "same global batches, but no longer the same to the last bit: sums are taken in "
                "another order, and BatchNorm sees other groups"
            )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.step_ended = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        now = time.monotonic()
        if self.step_ended is not None:
            self.stop.seconds_per_step = now - self.step_ended
        self.step_ended = now
        is_due = time.monotonic() - self.last_saved > self.every_n_seconds
        stop, save = self.agreement.exchange([self.stop.signal_number or 0, int(is_due)])
        if self.asked_before:
            self.asked_before = False
            save = 0
        if stop:
            # The signal may have come to another rank only.
            self.stop.request(stop)
        if batch_idx + 1 >= trainer.num_training_batches:
            # At an epoch's end, on_train_epoch_end saves.
            return
        if stop or save or trainer.global_step == trainer.max_steps:
            self.save_last(trainer)
            self.saved_at = trainer.global_step
        if stop:
            raise self._interrupted(trainer, stop)

    @epoch_time.measured(CHECKPOINTS)
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        epoch = trainer.current_epoch + 1
        self.figures["epoch"] = epoch
        self.figures["step"] = trainer.global_step
        is_best = self._update_best()
        is_due = time.monotonic() - self.last_saved > self.every_n_seconds
        is_due = is_due or epoch % self.every_n_epochs == 0
        stop, save = largest([self.stop.signal_number or 0, int(is_due)])
        if stop:
            self.stop.request(stop)
        if stop or save or is_best or is_end(trainer, epoch) or self._is_kept(epoch):
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
        """Replace ``last.ckpt`` by the present state.

        Raises:
            RunError: a weight is not finite; the old file stays.
        """
        parameters = trainer.lightning_module.parameters()
        weights = [weight.detach() for weight in parameters if weight.numel()]
        # The largest absolute value is finite only if all values are. One number for all weights
        # means one wait for a GPU.
        largest_weight = torch.nn.utils.get_total_norm(weights, norm_type=math.inf)
        if not largest_weight.isfinite():
            raise RunError(
                f"a weight is not finite at step {trainer.global_step}; {last_good(self.folder)}"
            )
        # A run that resumes here writes no point of the curves up to here again.
        for logger in trainer.loggers:
            logger.save()
        with phase("saving the checkpoint", unit=""):
            # False saves the optimizer, too. Lightning would take it, and log that each time.
            trainer.save_checkpoint(self.folder / LAST_CHECKPOINT, weights_only=False)
        if trainer.is_global_zero and not self.is_size_said:
            self.is_size_said = True
            self._say_size(trainer)
        self.last_saved = time.monotonic()
        self.asked_before = trainer.world_size > 1

    def _say_size(self, trainer: pl.Trainer) -> None:
        """Say how large a checkpoint is, if that is much, and why."""
        size = (self.folder / LAST_CHECKPOINT).stat().st_size
        if size < LARGE:
            return
        of_optimizers = 0
        for optimizer in trainer.optimizers:
            for state in optimizer.state.values():
                of_optimizers += sum(x.nbytes for x in state.values() if torch.is_tensor(x))
        log.info(
            "a checkpoint has %s, %s of them the optimizer's state; last.ckpt, previous.ckpt and "
            "best.ckpt take up to %s. backbone.pth, which a pretraining writes at its end, holds "
            "the backbone alone",
            in_bytes(size),
            in_bytes(of_optimizers),
            in_bytes(3 * size),
        )

    def _link(self, trainer: pl.Trainer, epoch: int, is_best: bool) -> None:
        """Give ``last.ckpt``, saved at the end of `epoch`, its other names."""
        if not trainer.is_global_zero:
            return
        if is_best:
            link_atomically(self.folder / LAST_CHECKPOINT, self.folder / BEST_CHECKPOINT)
        if self._is_kept(epoch):
            kept = LAST_CHECKPOINT.with_name(f"epoch_{epoch:04}.ckpt")
            link_atomically(self.folder / LAST_CHECKPOINT, self.folder / kept)

    def _is_kept(self, epoch: int) -> bool:
        return self.keep_every_n_epochs is not None and epoch % self.keep_every_n_epochs == 0

    def _update_best(self) -> bool:
        """Note the monitored figure if it is this epoch's and the best; return whether it is."""
        epoch = self.figures["epoch"]
        if self.figures.get(self.monitor_epoch) != epoch:
            return False
        figure = self.figures[self.monitor]
        # Not `<=`: a figure that is NaN is not the best. None: the data do not tell it.
        if figure is None or not figure > self.best:
            return False
        self.best = figure
        self.figures[self.best_name] = self.best
        self.figures[self.best_epoch] = epoch
        return True

    @epoch_time.measured(CHECKPOINTS)
    def _add_figures(self, trainer: pl.Trainer) -> None:
        """Add to the checkpoint what was measured after it was written.

        Saving anew would be wrong: if max_steps ended the epoch early, Lightning takes the epoch
        for finished, and a longer run would skip the rest of it. The other case is a resumed run
        that has repeated a measurement before its first step.
        """
        # On every rank: a callback may exchange values with the other processes here.
        states = {}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            state = callback.state_dict()
            if state:
                states[callback.state_key] = state
        if not trainer.is_global_zero:
            return
        path = self.folder / LAST_CHECKPOINT
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["figures"] = dict(self.figures)
        checkpoint["callbacks"] = states
        write_atomically(path, lambda file: torch.save(checkpoint, file))

    def _interrupted(self, trainer: pl.Trainer, number: int) -> Interrupted:
        resume = as_override("hydra.run.dir", self.folder)
        return Interrupted(
            number,
            f"in epoch {trainer.current_epoch + 1}, step {trainer.global_step}; "
            f"saved {self.folder / LAST_CHECKPOINT}; to go on, repeat the command with {resume}",
        )
