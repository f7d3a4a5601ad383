"""What a run shows of itself while it trains, as Lightning callbacks.

They write scalars to the logger and the figures that are reported at the end to `figures`, the flat dict that becomes
``metrics.json``.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from moco.callbacks.data_wait import EPOCH_SECONDS, SECONDS, DataWait
from moco.callbacks.epoch_measurement import EpochMeasurement, is_end
from moco.callbacks.feature_plots import Embedded, FeaturePlots
from moco.callbacks.shared_embedding import embed_together
from moco.callbacks.stopwatches import MONITORS, STEPS, WAITING, epoch_time
from moco.data.loading.datamodule import PretrainingData, check_unreadable
from moco.evaluation.diagnostics import (
    MOST_ROWS,
    embedding_std,
    evenly_spaced,
    in_batch_negative_similarity,
    negative_similarity,
    positive_similarity,
    rank_me,
)
from moco.evaluation.features import EmbeddingStopped, evaluating
from moco.evaluation.knn import KNNResult, knn_accuracy, scores_of
from moco.training.distributed.collectives import (
    copy_from_rank_zero,
    from_rank_zero,
    gather_objects,
)

log = logging.getLogger(__name__)


class KNNMonitor(EpochMeasurement):
    """kNN accuracy of the query encoder's features every n epochs, on clean images in eval mode.

    Args:
        figures: gets ``knn/top1``, with at least five neighbours ``knn/top5``, ``knn/epoch`` and the
            protocol. Baselines go to ``knn_raw_pixels/top1`` and ``knn_untrained/top1``, or
            ``knn_start/top1`` of a run that starts from given weights.
        should_stop: asked before every batch; a measurement that is cut short is made up for when the run goes on.
        num_neighbors, temperature, feature, precision: the protocol, see `MonitorConfig`.
        baselines: measure raw pixels and the encoder before the first step.
        is_untrained: the encoder starts from random weights.
        images: draws what it measures.
    """

    def __init__(
        self,
        figures: dict[str, Any],
        *,
        num_neighbors: int,
        temperature: float,
        feature: str,
        precision: str = "32-true",
        every_n_epochs: int = 1,
        baselines: bool = False,
        is_untrained: bool = True,
        should_stop: Callable[[], bool] = lambda: False,
        images: FeaturePlots | None = None,
    ) -> None:
        super().__init__(figures, every_n_epochs, should_stop)
        self.num_neighbors = num_neighbors
        self.temperature = temperature
        self.feature = feature
        self.precision = precision
        self.baselines = baselines
        self.is_untrained = is_untrained
        self.images = images
        self.resumed = False  # the encoder is no longer untrained

    def state_dict(self) -> dict[str, Any]:
        # Never empty: from nothing a run would not learn that it goes on.
        return {"owed": self.owed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.resumed = True

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        source = data_of(trainer).source
        if source.bank is None or source.queries is None:
            log.info(
                "no kNN: the data set has no labelled training and test images; watch label_free/* instead"
            )
            return
        log.info(
            "kNN every %d epochs: k %d, T %s, %s feature, %d queries against a bank of %d",
            self.every_n_epochs, self.num_neighbors, self.temperature, self.feature,
            len(source.queries.labels), len(source.bank.labels),
        )  # fmt: skip
        if self.baselines and not self.resumed:
            self._measure_baselines(trainer, pl_module)
        super().on_fit_start(trainer, pl_module)

    @epoch_time.measured(MONITORS)
    def _measure_baselines(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pixels = self._result(trainer, pl_module, lambda images: images.flatten(1))
        start = self._result(trainer, pl_module, self._encoding(pl_module))
        name = "knn_untrained" if self.is_untrained else "knn_start"
        self.figures |= {"knn_raw_pixels/top1": pixels.top1, f"{name}/top1": start.top1}
        what = "untrained backbone" if self.is_untrained else "the weights of init_from"
        log.info("kNN before training: raw pixels %.4f, %s %.4f", pixels.top1, what, start.top1)

    @epoch_time.measured(MONITORS)
    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int) -> None:
        source = data_of(trainer).source
        if source.bank is None or source.queries is None:
            return

        def show(bank: Embedded, queries: Embedded) -> None:
            self._show(trainer, epoch, bank, queries)

        try:
            result = self._result(trainer, pl_module, self._encoding(pl_module), show)
        except EmbeddingStopped:
            self.owed = True
            return
        self.owed = False
        self.num_neighbors = result.num_neighbors  # if it was capped, one warning is enough
        scores = scores_of(result)
        self.figures.pop("knn/top5", None)  # of an earlier part of the run, if k is below 5 now
        conditions = protocol(result, self.temperature, self.feature) | {
            "knn/precision": self.precision
        }
        self.figures |= scores | {"knn/epoch": epoch} | conditions
        if trainer.logger:
            trainer.logger.log_metrics(scores, step=trainer.global_step)

    def _show(self, trainer: pl.Trainer, epoch: int, bank: Embedded, queries: Embedded) -> None:
        """On rank 0, what TensorBoard gets beside the scores."""
        if trainer.logger is None:
            return
        rank = rank_me(torch.from_numpy(evenly_spaced(bank.features, MOST_ROWS)))
        trainer.logger.log_metrics({"label_free/feature_rank_me": rank}, step=trainer.global_step)
        if self.images is None:
            return
        experiment = trainer.logger.experiment  # type: ignore[attr-defined]
        previous = max(0, epoch - self.every_n_epochs)
        if self.images.is_due(epoch, previous) or (
            self.images.every_n_epochs and is_end(trainer, epoch)
        ):
            k = min(self.num_neighbors, len(bank.rows))
            self.images.draw(experiment, trainer.global_step, bank, queries, k, self.temperature)
        if self.images.projector_images and is_end(trainer, epoch):
            self.images.project(experiment, queries)

    def _encoding(self, pl_module: Any) -> Callable[[Tensor], Tensor]:
        return lambda images: pl_module.query_encoder.encode(images, self.feature)

    def _result(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        encode: Callable[[Tensor], Tensor],
        show: Callable[[Embedded, Embedded], None] = lambda bank, queries: None,
    ) -> KNNResult:
        data = data_of(trainer)
        bank, queries = data.source.bank, data.source.queries
        assert bank is not None
        assert queries is not None
        # A process has running statistics of its own; what is measured are rank 0's, which the checkpoint holds.
        copy_from_rank_zero([*pl_module.query_encoder.buffers()])  # type: ignore[union-attr]
        with evaluating(pl_module):
            embedded = [
                embed_together(
                    encode,
                    data.evaluation_dataloader(labelled),
                    pl_module.device,
                    self.should_stop,
                    self.precision,
                )
                for labelled in (bank, queries)
            ]

        def search() -> KNNResult:
            sets = []
            for labelled, (features, labels, unreadable) in zip(
                (bank, queries), embedded, strict=True
            ):
                check_unreadable(set(unreadable.tolist()), labelled.images, data.max_bad_fraction)
                readable = np.delete(np.arange(len(labelled.images)), unreadable)
                sets.append(Embedded(features, labels, labelled, readable))
            show(*sets)
            (features, labels, _, _), (query_features, query_labels, _, _) = sets
            measure = partial(
                knn_accuracy,
                features,
                labels,
                query_features,
                query_labels,
                self.num_neighbors,
                self.temperature,
            )
            with contextlib.suppress(torch.OutOfMemoryError):
                return measure(pl_module.device)
            log.info("kNN: searched on the CPU, as the training leaves the GPU too little memory")
            return measure("cpu")

        return from_rank_zero(search)


def protocol(result: KNNResult, temperature: float, feature: str) -> dict[str, Any]:
    """The conditions of a kNN figure, under the names of ``metrics.json``."""
    return {
        "knn/num_neighbors": result.num_neighbors,
        "knn/temperature": temperature,
        "knn/feature": feature,
        "knn/bank_size": result.bank_size,
        "knn/num_queries": result.num_queries,
    }


class LossMonitor(pl.Callback):
    """Loss, learning rate and speed every n steps, and each epoch's mean loss and speed, of any training.

    It warns once where much of the time goes into waiting for data. Waiting begins
    when all callbacks are done with a batch, for which it adds a `BatchClock` behind them. When an epoch is over, its
    checkpoint written, it logs the seconds that each part took, ``time/NAME`` of `moco.callbacks.stopwatches`.

    Batches whose loss is not finite are left out of the mean, which is not finite only if they all are.

    Args:
        figures: gets ``train/loss`` (mean of the epoch), ``images_per_second`` and ``data_wait`` (share of the time) of the
            epoch, and ``train/seconds`` of the whole run: in steps and waiting for data, without monitors and checkpoints.
        log_every_n_steps: optimizer steps between two rows.
    """

    def __init__(self, figures: dict[str, Any], log_every_n_steps: int) -> None:
        self.figures = figures
        self.log_every_n_steps = log_every_n_steps
        self.data_wait = DataWait()
        self.loss_sum = 0.0
        self.batches = 0.0  # those with a finite loss
        self.seconds_before = 0.0  # of training, before the run went on from its checkpoint
        self.losses: list[Tensor] = []
        """Of the latest batches, on the device: to add each at once would be ten operations a step, to read it a wait."""

    def _add_losses(self) -> None:
        """Wait for the latest losses and add them; in double precision, where the order makes no difference."""
        if self.losses:
            losses = torch.stack(self.losses).double().cpu()
            finite = losses[losses.isfinite()]
            self.loss_sum += float(finite.sum())
            self.batches += len(finite)
            self.losses = []

    def state_dict(self) -> dict[str, Any]:
        """Of all processes together: the mean over them, so that each can go on from it."""
        self._add_losses()
        names, own = (
            ("loss_sum", "batches", "seconds"),
            (self.loss_sum, self.batches, self._seconds()),
        )
        return {
            name: sum(all_of) / len(all_of)
            for name, *all_of in zip(names, *gather_objects(own), strict=True)
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loss_sum, self.batches = state_dict["loss_sum"], state_dict["batches"]
        self.seconds_before = state_dict.get("seconds", 0.0)  # older runs did not count them

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        epoch_time.start()  # not with what an earlier training in this process took
        # Here, as Lightning has put checkpoints last by now, whatever the order that it was given.
        trainer.callbacks.append(BatchClock(self))  # type: ignore[attr-defined]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.loss_sum, self.batches, self.losses = 0.0, 0.0, []
        self._end_lap(trainer)
        self._start_clock()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epoch_ended = False
        epoch_time.start()
        self._start_clock()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end_lap(trainer)

    def _end_lap(self, trainer: pl.Trainer) -> None:
        """Log the times of the epoch that ended. Not at its end: Lightning calls checkpoints after all other callbacks."""
        if not self.epoch_ended:
            return
        self.epoch_ended = False
        seconds = {f"time/{name}": seconds for name, seconds in epoch_time.lap().items()}
        if trainer.logger:
            trainer.logger.log_metrics(seconds, step=trainer.global_step)

    def _start_clock(self) -> None:
        self.images, self.waited, self.started = 0, 0.0, time.perf_counter()
        self.batch_ended = self.started

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batch_waited = (
            time.perf_counter() - self.batch_ended if is_waited_for(trainer) else 0.0
        )
        self.waited += self.batch_waited
        epoch_time.give(WAITING, self.batch_waited)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # Lightning divides the loss by the accumulated batches. A copy, as the next step may reuse the memory.
        self.losses.append(outputs["loss"].detach() * trainer.accumulate_grad_batches)
        self.images += len(batch.indices) * trainer.world_size
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and trainer.global_step % self.log_every_n_steps == 0:
            self._add_losses()
            self._log_step(trainer, pl_module, outputs)

    def end_batch(self, trainer: pl.Trainer) -> None:
        """All callbacks are done with the batch: from here on training waits for the next."""
        before, self.batch_ended = self.batch_ended, time.perf_counter()
        self.data_wait.add(self.batch_waited, self.batch_ended - before)
        self.data_wait.check(SECONDS)

    def _log_step(self, trainer: pl.Trainer, pl_module: Any, outputs: dict[str, Tensor]) -> None:
        figures = {
            "train/loss": float(outputs["loss"]) * trainer.accumulate_grad_batches,
            "train/learning_rate": max(group["lr"] for group in trainer.optimizers[0].param_groups),
            **self.step_figures(trainer, pl_module, outputs),
            **self._speed(),
        }
        self.figures |= self._speed()  # for the progress bar
        if trainer.logger:
            trainer.logger.log_metrics(figures, step=trainer.global_step)

    def step_figures(
        self, trainer: pl.Trainer, pl_module: Any, outputs: dict[str, Tensor]
    ) -> dict[str, float]:
        """What else a method shows of a step, under the names of TensorBoard; `outputs` is what its step returned."""
        return {}

    def _seconds(self) -> float:
        """Of the run's training so far."""
        return self.seconds_before + epoch_time.so_far(STEPS, WAITING)

    def _speed(self) -> dict[str, float]:
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        return {"images_per_second": self.images / elapsed, "data_wait": self.waited / elapsed}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        state = LossMonitor.state_dict(self)
        mean_loss = state["loss_sum"] / state["batches"] if state["batches"] else math.nan
        figures = {"train/loss": mean_loss, **self._speed()}
        self.figures |= figures | {"train/seconds": state["seconds"]}
        self.epoch_ended = True
        self.data_wait.check(EPOCH_SECONDS)
        if trainer.logger:
            scalars = {
                "epoch/loss": figures["train/loss"],
                "epoch/images_per_second": figures["images_per_second"],
            }
            trainer.logger.log_metrics(scalars, step=trainer.global_step)


class BatchClock(pl.Callback):
    """The last of all callbacks: tells `monitor` when the others are done with a batch."""

    def __init__(self, monitor: LossMonitor) -> None:
        self.monitor = monitor

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.monitor.end_batch(trainer)


def is_waited_for(trainer: pl.Trainer) -> bool:
    """Whether a batch comes from elsewhere; of images in the device's memory, making it is the device's own work."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return not (isinstance(data, PretrainingData) and data.engine.in_memory)


class TrainingMonitor(LossMonitor):
    """The same of MoCo, with label-free figures beside the loss.

    The loss alone says little: it starts low, rises while the queue fills with real keys and falls afterwards, and how
    low depends on K and T. Beside it stand its value when nothing is told apart, its terms, the similarities that it is
    made of, and the spread of the embeddings, of which `moco.callbacks.collapse_watch` warns.
    """

    def step_figures(
        self, trainer: pl.Trainer, pl_module: Any, outputs: dict[str, Tensor]
    ) -> dict[str, float]:
        query = outputs["query"]
        return {
            "train/key_momentum": pl_module.key_momentum_at(trainer.global_step - 1),
            "label_free/positive_similarity": float(positive_similarity(query, outputs["key"])),
            **(in_batch_figures if pl_module.queue is None else queue_figures)(pl_module, outputs),
            "label_free/embedding_std": float(embedding_std(query)),
            "label_free/embedding_std_if_spread": 1 / math.sqrt(query.shape[1]),
            **{
                f"train/{term}": float(outputs[term])
                for term in ("loss_global", "loss_dense")
                if term in outputs
            },
        }


def queue_figures(pl_module: Any, outputs: dict[str, Any]) -> dict[str, float]:
    """Of a step whose negatives came from a queue."""
    queue, query, negatives = pl_module.queue, outputs["query"], outputs["negatives"]
    return {
        "train/loss_of_chance": pl_module.loss_of_chance(len(negatives)),
        "label_free/negative_similarity": float(negative_similarity(query, negatives))
        if len(negatives)
        else 0.0,
        "label_free/queue_fill": float(queue.filled) / len(queue.keys),
    }


def in_batch_figures(pl_module: Any, outputs: dict[str, Tensor]) -> dict[str, float]:
    """Of a step whose negatives were the other keys of its batch."""
    query, key, keys = outputs["query"], outputs["key"], outputs["negatives"]
    return {
        "train/loss_of_chance": pl_module.loss_of_chance(len(keys) - 1),
        "label_free/negative_similarity": float(in_batch_negative_similarity(query, key, keys)),
    }


def data_of(trainer: pl.Trainer) -> PretrainingData:
    """The running data module."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, PretrainingData)
    return data
