"""What a run shows of its health without labels, as Lightning callbacks, and the warnings when it is ill.

They read the training and leave no trace in it: weights, running statistics and random generators are the same without them.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from moco.callbacks.stopwatches import MONITORS, epoch_time
from moco.evaluation.diagnostics import (
    alignment,
    embedding_std,
    encoder_distances,
    evenly_spaced,
    gradient_norms,
    pair_similarities,
    positive_similarity,
    rank_me,
    uniformity,
)
from moco.training.distributed.collectives import rank, world_size

log = logging.getLogger(__name__)

CAUSES = "Usual causes: learning rate too high, key momentum too low, augmentation that erases the image."

MOST_KEYS = 4096
"""Of which a rank is told; of a long queue the newest, as old keys are of an encoder that was well."""


class CollapseWatch(pl.Callback):
    """Warns in words, once, of embeddings that are all the same, or that lie in a few dimensions.

    It looks at every 20th step, whatever is logged. That is rare enough to cost nothing, and often enough to have seen
    an illness five times in a row, and to name it, within 200 steps.
    """

    EVERY_N_STEPS = 20
    CHECKS = 5
    """In a row, 80 steps: a healthy run can be near a collapse for some steps after its start."""
    SAME = 0.07
    """Of 1 / sqrt(C), the standard deviation of embeddings that are spread out. Runs that learned were lowest soon after
    their start: at 0.08 for a moment (MoBY on CIFAR-10), or at 0.1 for some 60 steps (a small ResNet on digits), mostly at
    0.18 to 0.4. Collapsed ones stay at 0.001 to 0.05."""
    FEW_DIMENSIONS = 0.05
    """Of min(M, C), the most that the effective rank of M keys can be. The quickstart has 0.25 to 0.5 of it, and with a
    key momentum of 0, which collapses, 0.03."""

    def __init__(self) -> None:
        self.checks = {"COLLAPSED": 0, "DIMENSIONAL COLLAPSE": 0}  # in a row, in which it was so

    def state_dict(self) -> dict[str, Any]:
        return dict(self.checks)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.checks = dict(state_dict)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if is_step_end(trainer, batch_idx) and trainer.global_step % self.EVERY_N_STEPS == 0:
            self.check(
                outputs["query"], embeddings_of_keys(pl_module, outputs), trainer.global_step
            )

    def check(self, query: Tensor, keys: Tensor, step: int) -> None:
        """One look at the queries (N, C) and the newest keys (M, C), all of unit norm."""
        std, spread = float(embedding_std(query)), 1 / math.sqrt(query.shape[1])
        self._count(
            "COLLAPSED",
            std < self.SAME * spread,
            f"at step {step}: all embeddings are nearly the same (standard deviation {std:.5f}, spread out it would be "
            f"{spread:.5f}). The features will be useless. {CAUSES}",
        )
        effective, highest = rank_me(keys), min(keys.shape)
        # A batch or queue of a few keys says nothing about dimensions.
        is_flat = highest >= 1 / self.FEW_DIMENSIONS and effective < self.FEW_DIMENSIONS * highest
        self._count(
            "DIMENSIONAL COLLAPSE",
            is_flat and std >= self.SAME * spread,
            f"at step {step}: the embeddings differ in few dimensions only (effective rank {effective:.1f} of "
            f"{highest}). The features will be poor. {CAUSES}",
        )

    def _count(self, name: str, is_so: bool, words: str) -> None:
        self.checks[name] = self.checks[name] + 1 if is_so else 0
        if self.checks[name] == self.CHECKS:
            log.warning("%s %s", name, words)


class Kept(NamedTuple):
    """One batch whose keys went into the queue."""

    view: Tensor
    """(N, 3, H, W) what the keys were made of, on the CPU."""
    keys: Tensor
    """(N, C) of this process."""
    step: int


class LabelFreeMonitor(pl.Callback):
    """At every n-th step the dear figures of the embeddings, the queue and the two encoders, for TensorBoard alone.

    The drift of the queue is that of a kept batch: when its keys are about to be the oldest ones, its views are encoded
    again by the key encoder as it is then, and compared with the keys in the queue.

    Args:
        every_n_steps: optimizer steps between two measurements; None: none.
    """

    def __init__(self, every_n_steps: int | None) -> None:
        self.every_n_steps = every_n_steps
        self.kept: Kept | None = None
        self.gradients: dict[str, float] = {}

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._is_due(trainer.global_step + 1):
            self.gradients = gradient_norms(pl_module.query_encoder)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every_n_steps is None or not is_step_end(trainer, batch_idx):
            return
        step, figures = trainer.global_step, {}
        if self._is_due(step):
            figures = self._figures(trainer, pl_module, outputs)
            if self.kept is None and pl_module.queue is not None:
                view = batch.views[
                    0 if pl_module.symmetric else 1
                ]  # of the last direction, whose keys are handed out
                self.kept = Kept(view.cpu(), outputs["key"], step)
        if self.kept is not None and step - self.kept.step >= self._steps_in_queue(
            trainer, pl_module
        ):
            figures |= self._drift(trainer, pl_module, self.kept)
            self.kept = None
        if figures and trainer.logger:
            trainer.logger.log_metrics(figures, step=step)

    def _is_due(self, step: int) -> bool:
        return self.every_n_steps is not None and step % self.every_n_steps == 0

    @epoch_time.measured(MONITORS)
    def _figures(
        self, trainer: pl.Trainer, pl_module: Any, outputs: dict[str, Any]
    ) -> dict[str, float]:
        query, key = outputs["query"], outputs["key"]
        figures = {
            "label_free/alignment": float(alignment(query, key)),
            "label_free/uniformity": float(uniformity(query)),
            "label_free/rank_me": rank_me(embeddings_of_keys(pl_module, outputs)),
        }
        figures |= {f"gradient_norm/{stage}": norm for stage, norm in self.gradients.items()}
        distances = encoder_distances(pl_module.key_encoder, pl_module.query_encoder)
        figures |= {f"encoder_distance/{stage}": distance for stage, distance in distances.items()}
        if trainer.logger and rank() == 0:
            negatives = outputs["negatives"]
            similarities = pair_similarities(query, key, negatives)
            for name, values in zip(("positive", "negative"), similarities, strict=True):
                finite = values[values.isfinite()]
                if len(finite):  # an empty queue has no negatives yet, a bad step only NaN
                    trainer.logger.experiment.add_histogram(  # type: ignore[attr-defined]
                        f"similarity/{name}", finite, trainer.global_step
                    )
        return figures

    def _steps_in_queue(self, trainer: pl.Trainer, pl_module: Any) -> int:
        """Return how many steps later the kept keys are still in the queue, all of them.

        A queue that takes both views' keys takes the kept ones first, see `MoCo.enqueue`.
        """
        num_keys = len(self.kept.keys) * world_size() if self.kept else 0
        per_step = keys_per_step(pl_module, num_keys, trainer)
        of_batch = num_keys * directions_per_queue(pl_module)  # the kept ones included
        return max(0, (len(pl_module.queue.keys) - of_batch) // per_step)

    @epoch_time.measured(MONITORS)
    def _drift(self, trainer: pl.Trainer, pl_module: Any, kept: Kept) -> dict[str, float]:
        with untouched(pl_module.key_encoder), trainer.precision_plugin.train_step_context():
            now = pl_module.encode_keys([kept.view.to(pl_module.device)])[
                0
            ].embedding  # (N, C) unit norm
        return {
            "queue/drift": float(positive_similarity(kept.keys, now)),
            # As the next step sees them: the key encoder has moved after this step, too.
            "queue/drift_age": float(trainer.global_step + 1 - kept.step),
            "queue/oldest_age": float(pl_module.queue.filled)
            / keys_per_step(pl_module, len(kept.keys) * world_size(), trainer),
        }


def is_step_end(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether an optimizer step was taken after this batch."""
    is_last = batch_idx + 1 == trainer.num_training_batches
    return is_last or (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def embeddings_of_keys(pl_module: Any, outputs: dict[str, Tensor]) -> Tensor:
    """The newest keys there are, of several steps if there is a queue, but at most `MOST_KEYS`: (M, C) unit norm."""
    if pl_module.queue is None:
        return evenly_spaced(outputs["negatives"], MOST_KEYS)
    return pl_module.queue.newest(MOST_KEYS)


def keys_per_step(pl_module: Any, num_keys: int, trainer: pl.Trainer) -> int:
    """Keys that one queue gets in an optimizer step, of batches with `num_keys` on all devices together."""
    return num_keys * directions_per_queue(pl_module) * trainer.accumulate_grad_batches


def directions_per_queue(pl_module: Any) -> int:
    """How many directions' keys one queue takes."""
    return 2 if pl_module.symmetric and pl_module.reverse_queue is None else 1


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Inside, `module` may run in training mode; afterwards its buffers and the random generators are as before."""
    buffers = list(module.buffers())
    before = [buffer.clone() for buffer in buffers]
    cuda = [buffers[0].device] if buffers and buffers[0].is_cuda else []
    with torch.random.fork_rng(cuda), torch.no_grad():
        try:
            yield
        finally:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
