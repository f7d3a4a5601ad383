"""A warning when the embeddings of a run collapse, as a Lightning callback."""

import logging
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from moco.callbacks.running_trainer import is_step_end
from moco.evaluation.collapse import (
    CAUSES,
    COLLAPSED,
    DIMENSIONAL_COLLAPSE,
    collapsed_words,
    flat_words,
    is_collapsed,
    is_flat,
)
from moco.evaluation.diagnostics import embedding_std, evenly_spaced, rank_me

log = logging.getLogger(__name__)

MOST_KEYS = 4096
"""Keys that a rank is computed from. Of a long queue it is the newest: the oldest keys are of an
encoder that may still have been healthy."""


class CollapseWatch(pl.Callback):
    """Warn once if all embeddings become the same, or if they differ in a few dimensions only.

    It looks at every 20th step, whatever is logged: rarely enough to cost nothing, and often enough
    to see a collapse five times in a row, and to warn of it, within 200 steps. It only reads the
    training: weights, running statistics and random generators are the same without it.
    """

    EVERY_N_STEPS = 20
    CHECKS = 5
    """Looks in a row before a warning: a healthy run can be near a collapse for some steps after
    its start."""

    def __init__(self) -> None:
        self.checks = {COLLAPSED: 0, DIMENSIONAL_COLLAPSE: 0}
        """How often each was seen in a row."""

    def state_dict(self) -> dict[str, Any]:
        return dict(self.checks)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.checks = dict(state_dict)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if is_step_end(trainer, batch_idx) and step % self.EVERY_N_STEPS == 0:
            self.check(outputs["query"], newest_keys(pl_module, outputs), step)

    def check(self, query: Tensor, keys: Tensor, step: int) -> None:
        """Look at the embeddings of a step.

        Args:
            query: (batch, embedding_dim), unit norm.
            keys: (keys, embedding_dim), unit norm, the newest keys.
        """
        std = float(embedding_std(query))
        rank = rank_me(keys)
        embedding_dim = query.shape[1]
        collapsed = is_collapsed(std, embedding_dim)
        if self._is_fifth(COLLAPSED, collapsed):
            words = collapsed_words(std, embedding_dim)
            log.warning(
                "%s at step %d: %s. The features will be useless. %s",
                COLLAPSED, step, words, CAUSES,
            )  # fmt: skip
        if self._is_fifth(DIMENSIONAL_COLLAPSE, not collapsed and is_flat(rank, keys.shape)):
            words = flat_words(rank, keys.shape)
            log.warning(
                "%s at step %d: %s. The features will be poor. %s",
                DIMENSIONAL_COLLAPSE, step, words, CAUSES,
            )  # fmt: skip

    def _is_fifth(self, name: str, is_seen: bool) -> bool:
        """Count a look, and return whether it is the fifth in a row that saw the collapse."""
        if is_seen:
            self.checks[name] += 1
        else:
            self.checks[name] = 0
        return self.checks[name] == self.CHECKS


def newest_keys(pl_module: Any, outputs: dict[str, Any]) -> Tensor:
    """Return at most `MOST_KEYS` of the newest keys (keys, embedding_dim), unit norm.

    With a queue they are of several steps, else of this one.
    """
    if pl_module.queue is None:
        return evenly_spaced(outputs["negatives"], MOST_KEYS)
    return pl_module.queue.newest(MOST_KEYS)
