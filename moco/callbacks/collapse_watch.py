"""A warning when the embeddings of a run collapse, as a Lightning callback."""

import logging
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from moco.callbacks.running_trainer import is_logged_step
from moco.evaluation.collapse import COLLAPSED, DIMENSIONAL_COLLAPSE, collapse_of
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
        if is_logged_step(trainer, batch_idx, self.EVERY_N_STEPS):
            keys = newest_keys(pl_module, outputs)
            self.check(outputs["query"], keys, trainer.global_step)

    def check(self, query: Tensor, keys: Tensor, step: int) -> None:
        """Look at the embeddings of a step.

        Args:
            query: (batch, embedding_dim), unit norm.
            keys: (keys, embedding_dim), unit norm, the newest keys.
        """
        found = collapse_of(float(embedding_std(query)), rank_me(keys), keys.shape)
        for name in self.checks:
            if found is None or found.name != name:
                self.checks[name] = 0
                continue
            self.checks[name] += 1
            if self.checks[name] == self.CHECKS:
                log.warning("%s at step %d: %s", name, step, found.in_words())


def newest_keys(pl_module: Any, outputs: dict[str, Any]) -> Tensor:
    """Return at most `MOST_KEYS` of the newest keys (keys, embedding_dim), unit norm.

    With a queue they are of several steps, else of this one.
    """
    if pl_module.queue is None:
        return evenly_spaced(outputs["negatives"], MOST_KEYS)
    return pl_module.queue.newest(MOST_KEYS)
