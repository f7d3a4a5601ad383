"""A verdict in words on whether a run learns, as a Lightning callback."""

import logging
import math
from typing import Any

import pytorch_lightning as pl

from moco.callbacks.collapse_watch import newest_keys
from moco.callbacks.running_trainer import is_end, is_step_end
from moco.callbacks.training_monitor import contrast_figures
from moco.evaluation.diagnostics import (
    alignment,
    embedding_std,
    evenly_spaced,
    in_batch_negative_similarity,
    negative_similarity,
    positive_similarity,
    rank_me,
    uniformity,
)
from moco.evaluation.verdict import Baselines, Look, judge
from moco.training.distributed.collectives import rank
from moco.training.stopwatches import MONITORS, epoch_time

log = logging.getLogger(__name__)

MOST_PAIRED = 1_024
"""Queries of which all pairs are compared."""


class LearningVerdict(pl.Callback):
    """Say in one line whether the run learns: after each tenth of its steps and at its end.

    It samples loss, contrast accuracy and embeddings at every 20th step, and takes the mean of a
    tenth. The newest kNN accuracy in `figures` counts, too. It only reads the training: weights,
    running statistics and random generators are the same without it.

    Args:
        figures: gets ``label_free/*`` and ``contrast/top1`` of the newest tenth,
            ``train/loss_of_chance``, and at the end ``verdict``, see `moco.evaluation.verdict`.
    """

    EVERY_N_STEPS = 20
    PARTS = 10
    """The run is judged this often."""
    LEAST_STEPS = 20
    """Shorter tenths are measured and not talked about."""

    def __init__(self, figures: dict[str, Any]) -> None:
        self.figures = figures
        self.looks: list[Look] = []
        self.samples: list[dict[str, float]] = []
        """Of the current tenth."""
        self.is_due = False

    def state_dict(self) -> dict[str, Any]:
        return {"looks": [look._asdict() for look in self.looks], "samples": self.samples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.looks = [Look(**look) for look in state_dict["looks"]]
        self.samples = list(state_dict["samples"])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not is_step_end(trainer, batch_idx):
            return
        step = trainer.global_step
        ends_part = self._ends_part(step, pl_module.num_steps)
        if ends_part or step % self.EVERY_N_STEPS == 0:
            self._sample(trainer, pl_module, outputs)
        if not ends_part:
            return
        self._look(pl_module, outputs, step)
        ends_epoch = batch_idx + 1 == trainer.num_training_batches
        if ends_epoch or step == trainer.max_steps:
            self.is_due = True  # the epoch's kNN accuracy comes first
        else:
            self._say(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        is_last = is_end(trainer, trainer.current_epoch + 1)
        if self.is_due or is_last:
            self.is_due = False
            self._say(trainer, pl_module, is_last=is_last)

    def _ends_part(self, step: int, num_steps: float) -> bool:
        """Return whether a tenth of the run ends with this step."""
        if not math.isfinite(num_steps) or num_steps < 1:
            return False
        parts_done = step * self.PARTS // num_steps
        return parts_done > (step - 1) * self.PARTS // num_steps

    @epoch_time.measured(MONITORS)
    def _sample(self, trainer: pl.Trainer, pl_module: Any, outputs: dict[str, Any]) -> None:
        query, key, negatives = outputs["query"], outputs["key"], outputs["negatives"]
        num_negatives = len(negatives)
        if pl_module.queue is None:
            num_negatives -= 1  # the negatives are the other keys of the batch
            others = in_batch_negative_similarity(query, key, negatives)
        elif num_negatives > 0:
            others = negative_similarity(query, negatives)
        if num_negatives < 1:
            return  # an empty queue: every query finds its own key
        loss_of_chance = pl_module.loss_of_chance(num_negatives)
        if loss_of_chance <= 0:
            return  # a method of the user's with another loss
        contrast = contrast_figures(outputs, num_negatives, pl_module.queue is None)
        sample = {
            "loss": loss_of_images(outputs, trainer.accumulate_grad_batches),
            "loss_of_chance": loss_of_chance,
            "contrast_top1": contrast["contrast/top1"],
            "contrast_top1_of_chance": 1 / (1 + num_negatives),
            "embedding_std": float(embedding_std(query)),
            "positive_similarity": float(positive_similarity(query, key)),
            "negative_similarity": float(others),
            "alignment": float(alignment(query, key)),
            "uniformity": float(uniformity(evenly_spaced(query, MOST_PAIRED))),
        }
        if all(math.isfinite(value) for value in sample.values()):
            self.samples.append(sample)

    @epoch_time.measured(MONITORS)
    def _look(self, pl_module: Any, outputs: dict[str, Any], step: int) -> None:
        """Put the samples of the tenth together."""
        if not self.samples:
            return
        means = {}
        for name in self.samples[0]:
            values = [sample[name] for sample in self.samples]
            means[name] = sum(values) / len(values)
        self.samples = []
        keys = newest_keys(pl_module, outputs)
        figures = {
            "train/loss_of_chance": means["loss_of_chance"],
            "contrast/top1": means["contrast_top1"],
            "label_free/rank_me": rank_me(keys),
        }
        for name in (
            "embedding_std",
            "positive_similarity",
            "negative_similarity",
            "alignment",
            "uniformity",
        ):
            figures[f"label_free/{name}"] = means[name]
        self.figures |= figures
        self.looks.append(
            Look(
                step=step,
                loss=means["loss"],
                loss_of_chance=means["loss_of_chance"],
                contrast_top1=means["contrast_top1"],
                contrast_top1_of_chance=means["contrast_top1_of_chance"],
                embedding_std=means["embedding_std"],
                rank=figures["label_free/rank_me"],
                num_keys=len(keys),
                embedding_dim=keys.shape[1],
                knn_top1=None,
            )
        )

    def _say(self, trainer: pl.Trainer, pl_module: Any, *, is_last: bool = False) -> None:
        """Log the verdict, with the kNN accuracy that is known by now."""
        if not self.looks:
            return
        self.looks[-1] = self.looks[-1]._replace(knn_top1=self.figures.get("knn/top1"))
        verdict = judge(self.looks, self._baselines(), is_last=is_last)
        if is_last:
            self.figures["verdict"] = str(verdict)
        is_long = pl_module.num_steps >= self.PARTS * self.LEAST_STEPS
        if rank() == 0 and (is_last or is_long):
            done = round(100 * trainer.global_step / pl_module.num_steps)
            log.info("%d %% done. Is it learning? %s", done, verdict)

    def _baselines(self) -> Baselines:
        number = self.figures.get("knn/num_queries")
        if "knn_start/top1" in self.figures:
            top1 = self.figures["knn_start/top1"]
            return Baselines(top1, "weights of init_from", number)
        return Baselines(self.figures.get("knn_untrained/top1"), num_queries=number)


def loss_of_images(outputs: dict[str, Any], accumulated: int) -> float:
    """Return the loss of the whole full views, which is what the loss of chance is of.

    Args:
        outputs: of a training step. With a dense term or local crops, its loss is a mean of terms.
        accumulated: batches of an optimizer step, by which Lightning has divided the loss.
    """
    for term in ("loss_full", "loss_global"):
        if term in outputs:
            return float(outputs[term])
    return float(outputs["loss"]) * accumulated
