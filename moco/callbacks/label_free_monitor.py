"""Expensive figures of embeddings, queue and encoders of a training, as a Lightning callback."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from moco.callbacks.collapse_watch import newest_keys
from moco.callbacks.running_trainer import board_of, is_step_end, log_scalars
from moco.evaluation.diagnostics import (
    alignment,
    encoder_distances,
    gradient_norms,
    pair_similarities,
    positive_similarity,
    rank_me,
    uniformity,
)
from moco.training.board_layout import tag_of
from moco.training.distributed.collectives import rank, world_size
from moco.training.stopwatches import MONITORS, epoch_time


class Kept(NamedTuple):
    """A batch whose keys went into the queue."""

    view: Tensor
    """(batch, 3, height, width) the images that the keys were made of, on the CPU."""
    keys: Tensor
    """(batch, embedding_dim) the keys of this process."""
    num_keys: int
    """How many keys the queue got of that batch, on all devices together."""
    step: int


class LabelFreeMonitor(pl.Callback):
    """Log expensive figures of embeddings, queue and encoders at every n-th step.

    The drift of the queue is measured on a kept batch. When its keys are about to be the oldest
    ones, the key encoder encodes its views again, and they are compared with the keys in the queue.

    It only reads the training: weights, running statistics and random generators are the same
    without it.

    Args:
        every_n_steps: optimizer steps between two measurements.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self.kept: Kept | None = None
        self.gradients: dict[str, float] = {}

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer
    ) -> None:
        if (trainer.global_step + 1) % self.every_n_steps == 0:
            self.gradients = gradient_norms(pl_module.query_encoder)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not is_step_end(trainer, batch_idx):
            return
        step = trainer.global_step
        figures: dict[str, float] = {}
        if step % self.every_n_steps == 0:
            figures |= self._figures(trainer, pl_module, outputs)
            if self.kept is None and pl_module.queue is not None:
                view = outputs["key_view"]
                num_keys = len(view) * world_size()
                if pl_module.symmetric and pl_module.reverse_queue is None:
                    num_keys *= 2  # both directions of the loss share a queue
                self.kept = Kept(view.cpu(), outputs["key"], num_keys, step)
        kept = self.kept
        if kept:
            # For so many steps all of the kept keys stay in the queue. A queue that takes both
            # views' keys takes the kept ones first, see `MoCo.enqueue`.
            num_others = len(pl_module.queue.keys) - kept.num_keys
            if step - kept.step >= num_others // (kept.num_keys * trainer.accumulate_grad_batches):
                figures |= self._drift(trainer, pl_module, kept)
                self.kept = None
        if figures:
            log_scalars(trainer, figures)

    @epoch_time.measured(MONITORS)
    def _figures(
        self, trainer: pl.Trainer, pl_module: Any, outputs: dict[str, Any]
    ) -> dict[str, float]:
        query, key = outputs["query"], outputs["key"]
        figures = {
            "label_free/alignment": float(alignment(query, key)),
            "label_free/uniformity": float(uniformity(query)),
            "label_free/rank_me": rank_me(newest_keys(pl_module, outputs)),
        }
        for stage, norm in self.gradients.items():
            figures[f"gradient_norm/{stage}"] = norm
        distances = encoder_distances(pl_module.key_encoder, pl_module.query_encoder)
        for stage, distance in distances.items():
            figures[f"encoder_distance/{stage}"] = distance
        board = board_of(trainer)
        if board is not None and rank() == 0:
            for name, cosines in pair_similarities(query, key, outputs["negatives"]).items():
                finite = cosines[cosines.isfinite()]
                # An empty queue has no negatives yet, and a bad step only NaN.
                if len(finite):
                    tag = tag_of(f"similarity/{name}")
                    board.add_histogram(tag, finite, trainer.global_step)
        return figures

    @epoch_time.measured(MONITORS)
    def _drift(self, trainer: pl.Trainer, pl_module: Any, kept: Kept) -> dict[str, float]:
        view = kept.view.to(pl_module.device)
        with untouched(pl_module.key_encoder), trainer.precision_plugin.train_step_context():
            now = pl_module.encode_keys([view])[0].embedding  # (batch, embedding_dim) unit norm
        per_step = kept.num_keys * trainer.accumulate_grad_batches
        return {
            "queue/drift": float(positive_similarity(kept.keys, now)),
            # The age that the next step sees: the key encoder has already moved after this step.
            "queue/drift_age": float(trainer.global_step + 1 - kept.step),
            "queue/oldest_age": float(pl_module.queue.filled) / per_step,
        }


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Let `module` run in training mode, and restore its buffers and the random generators."""
    buffers = list(module.buffers())
    before = [buffer.clone() for buffer in buffers]
    devices = []
    if buffers and buffers[0].is_cuda:
        devices.append(buffers[0].device)
    # In training mode BatchNorm changes its statistics, and stochastic depth draws numbers.
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            yield
        finally:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
