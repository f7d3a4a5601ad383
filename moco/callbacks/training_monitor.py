"""Loss, speed and figures of the embeddings while a run trains, as Lightning callbacks.

They write scalars to the logger. What is reported at the end of the run goes to `figures`, the
flat dict that becomes ``metrics.json``.
"""

import logging
import math
import time
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from moco.callbacks.running_trainer import is_logged_step, log_scalars
from moco.data.loading.datamodule import PretrainingData
from moco.evaluation.contrast_accuracy import contrast_accuracy
from moco.evaluation.diagnostics import (
    embedding_std,
    in_batch_negative_similarity,
    negative_similarity,
    positive_similarity,
)
from moco.training.distributed.collectives import gather_objects, rank
from moco.training.stopwatches import STEPS, WAITING, epoch_time

log = logging.getLogger(__name__)

LOSS_TERMS = (
    "loss_global",
    "loss_dense",
    "loss_full",
    "loss_local",
    "loss_key",
    "loss_neighbours",
)
"""The terms of the loss that a step may return, see `MoCo.training_step`."""
MUCH_WAITING = 0.2
"""Share of the training time that goes into waiting for data."""
SECONDS = 30.0
"""Training time after which a run can warn of it."""


class LossMonitor(pl.Callback):
    """Report loss, learning rate and speed of any training, every n steps and for each epoch.

    It warns once if a large share of the time goes into waiting for data. The wait for a batch
    starts when all callbacks are done with the batch before; `setup` adds a `BatchClock` behind
    them for that. After an epoch's checkpoint is written, it logs the seconds that each part of
    the epoch took, as ``time/NAME`` (see `moco.training.stopwatches`).

    The mean loss leaves out batches whose loss is not finite. It is NaN only if all of them are.

    Args:
        figures: gets the epoch's ``train/loss`` (mean), ``images_per_second`` and ``data_wait``
            (share of the time), and ``train/seconds`` of the whole run: seconds in steps and in
            waiting for data, without monitors and checkpoints.
        log_every_n_steps: optimizer steps between two rows of the log.
    """

    def __init__(self, figures: dict[str, Any], log_every_n_steps: int) -> None:
        self.figures = figures
        self.log_every_n_steps = log_every_n_steps
        self.has_warned = False
        self.first_wait: float | None = None
        """Seconds that the run waited for its first batch, which do not count as waiting."""
        self.loss_sum = 0.0
        self.batches = 0.0
        """Batches with a finite loss."""
        self.recent_loss = math.nan
        """Mean of the finite losses that were read last, on this process."""
        self.seconds_before = 0.0
        """Seconds of training before the run resumed from its checkpoint."""
        self.losses: list[Tensor] = []
        """Recent losses, kept on the device. Summing them later avoids extra kernels and a
        synchronisation in every step."""

    def read_losses(self) -> None:
        """Wait for the recent losses and add them to the sum. It is for now and then.

        In double precision, so that the sum does not depend on how often this is called.
        """
        if self.losses:
            losses = torch.stack(self.losses).double().cpu()
            finite = losses[losses.isfinite()]
            self.loss_sum += float(finite.sum())
            self.batches += len(finite)
            self.recent_loss = float(finite.mean()) if len(finite) else math.nan
            self.losses = []

    def state_dict(self) -> dict[str, Any]:
        """Return the means over all processes, so that each process can resume from them."""
        self.read_losses()
        seconds = self.seconds_before + epoch_time.so_far(STEPS, WAITING)
        sums = gather_objects((self.loss_sum, self.batches, seconds))
        loss_sum, batches, seconds = np.mean(sums, axis=0).tolist()
        return {"loss_sum": loss_sum, "batches": batches, "seconds": seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loss_sum = state_dict["loss_sum"]
        self.batches = state_dict["batches"]
        # Older checkpoints do not have the seconds.
        self.seconds_before = state_dict.get("seconds", 0.0)

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        # An earlier training in this process may have left its times.
        epoch_time.start()
        # Lightning has put the checkpoint callbacks last by now, so the clock comes after them.
        trainer.callbacks.append(BatchClock(self))  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.epoch_ended = False
        self.first_wait = None
        epoch_time.start()
        self._start_clock()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.loss_sum = 0.0
        self.batches = 0.0
        self.losses = []
        self._log_epoch_times(trainer)
        self._start_clock()

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._log_epoch_times(trainer)

    def _log_epoch_times(self, trainer: pl.Trainer) -> None:
        """Log the seconds of the epoch that ended.

        Not when it ends: Lightning calls the checkpoint callbacks after all others, and their time
        belongs to the epoch.
        """
        if self.epoch_ended:
            self.epoch_ended = False
            seconds = epoch_time.lap()
            log_scalars(trainer, {f"time/{name}": value for name, value in seconds.items()})

    def _start_clock(self) -> None:
        self.images = 0
        self.waited = 0.0
        self.started = time.perf_counter()
        self.batch_ended = self.started

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        waited = 0.0
        # With all images in the device's memory, the device makes the batch: that is no wait.
        if not (isinstance(data, PretrainingData) and data.in_memory):
            waited = time.perf_counter() - self.batch_ended
        self.waited += waited
        epoch_time.give(WAITING, waited)
        if self.first_wait is None:
            self.first_wait = waited

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Lightning divides the loss by the number of accumulated batches. The product is a new
        # tensor: the next step may reuse the memory of the loss.
        self.losses.append(outputs["loss"].detach() * trainer.accumulate_grad_batches)
        self.images += len(batch.indices) * trainer.world_size
        if is_logged_step(trainer, batch_idx, self.log_every_n_steps):
            self.read_losses()
            self._log_step(trainer, pl_module, outputs)
            self._warn_of_waiting()

    def _warn_of_waiting(self) -> None:
        """Warn once if training has waited for much of its time.

        A resumed run starts anew, because its settings may have changed.
        """
        share = self.waiting_share()
        if not self.has_warned and share > MUCH_WAITING:
            self.has_warned = True
            log.warning(
                f"training waited {100 * share:.0f} % of the time for images; "
                "see docs/performance.md#waiting-for-data"
            )

    def waiting_share(self) -> float:
        """Return the share of this process's training time that went into waiting for data.

        It is 0 until training has taken `SECONDS`. The first batch does not count, because it also
        waits until the loader processes have started.
        """
        waited = epoch_time.so_far(WAITING) - (self.first_wait or 0.0)
        seconds = epoch_time.so_far(STEPS) + waited
        return waited / seconds if seconds >= SECONDS else 0.0

    def _log_step(self, trainer: pl.Trainer, pl_module: Any, outputs: dict[str, Tensor]) -> None:
        if trainer.logger:
            learning_rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
            figures = {
                "train/loss": float(outputs["loss"]) * trainer.accumulate_grad_batches,
                "train/learning_rate": max(learning_rates),
                **self.step_figures(trainer, pl_module, outputs),
                **self.speed(),
            }
            log_scalars(trainer, figures)

    def step_figures(
        self, trainer: pl.Trainer, pl_module: Any, outputs: dict[str, Any]
    ) -> dict[str, float]:
        """Return what a method logs of a step beside its loss, by TensorBoard's names.

        Args:
            outputs: what the method's training step returned.
        """
        return {}

    def speed(self) -> dict[str, float]:
        """Return ``images_per_second`` and ``data_wait`` of the epoch so far."""
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        return {"images_per_second": self.images / elapsed, "data_wait": self.waited / elapsed}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        state = LossMonitor.state_dict(self)
        loss = state["loss_sum"] / state["batches"] if state["batches"] else math.nan
        speed = self.speed()
        self.figures |= {"train/loss": loss, **speed, "train/seconds": state["seconds"]}
        self.epoch_ended = True
        self._warn_of_waiting()
        images_per_second = speed["images_per_second"]
        log_scalars(trainer, {"epoch/loss": loss, "epoch/images_per_second": images_per_second})


class BatchClock(pl.Callback):
    """Tell `monitor` when all other callbacks are done with a batch; it is the last of them."""

    def __init__(self, monitor: LossMonitor) -> None:
        self.monitor = monitor

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.monitor.batch_ended = time.perf_counter()


class TrainingMonitor(LossMonitor):
    """Report label-free figures of MoCo beside what `LossMonitor` reports.

    The loss alone says little. It starts low, rises while the queue fills with real keys and falls
    afterwards; how low it gets depends on queue size and temperature. So it is logged beside its
    value for an encoder that tells nothing apart, beside its terms, the similarities that it is
    made of, the share of queries that find their key, and the spread of the embeddings.
    `moco.callbacks.collapse_watch` warns of the last.
    """

    def step_figures(
        self, trainer: pl.Trainer, pl_module: Any, outputs: dict[str, Any]
    ) -> dict[str, float]:
        query, key, negatives = outputs["query"], outputs["key"], outputs["negatives"]
        queue = pl_module.queue
        figures = {
            "train/key_momentum": pl_module.key_momentum_at(trainer.global_step - 1),
            "label_free/positive_similarity": float(positive_similarity(query, key)),
            "label_free/embedding_std": float(embedding_std(query)),
            "label_free/embedding_std_if_spread": 1 / math.sqrt(query.shape[1]),
        }
        num_negatives = len(negatives)
        similarity = 0.0
        if queue is None:
            # The negatives are the other keys of the batch.
            num_negatives -= 1
            similarity = float(in_batch_negative_similarity(query, key, negatives))
        else:
            figures["label_free/queue_fill"] = float(queue.filled) / len(queue.keys)
            if num_negatives > 0:
                similarity = float(negative_similarity(query, negatives))
        figures["train/loss_of_chance"] = pl_module.loss_of_chance(num_negatives)
        figures["label_free/negative_similarity"] = similarity
        for term in LOSS_TERMS:
            if term in outputs:
                figures[f"train/{term}"] = float(outputs[term])
        return figures | contrast_figures(outputs, num_negatives, queue is None)


def contrast_figures(
    outputs: dict[str, Any], num_negatives: int, is_in_batch: bool
) -> dict[str, float]:
    """Return how often this device's queries find their keys, see `contrast_accuracy`.

    Without negatives there is nothing to find. With fewer than five, every key is among the first
    five.

    Args:
        outputs: what the method's training step returned.
        num_negatives: of each query.
        is_in_batch: the negatives are the keys of the batch, the positives among them.

    Returns:
        ``contrast/top1`` and ``contrast/top5``, as far as there are enough negatives.
    """
    ks = tuple(k for k in (1, 5) if num_negatives >= k)
    if not ks:
        return {}
    query, key, negatives = outputs["query"], outputs["key"], outputs["negatives"]
    groups = outputs.get("of_groups")
    shares = contrast_accuracy(
        query,
        key,
        negatives,
        ks,
        # The keys of this device begin after those of the lower ranks.
        first_own_row=rank() * len(query) if is_in_batch else None,
        is_own_group=None if groups is None else groups.is_own,
    )
    names = [f"contrast/top{k}" for k in ks]
    return dict(zip(names, shares.tolist(), strict=True))
