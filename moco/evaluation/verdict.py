"""Whether a run learns, in words: figures in, a verdict out.

The limits are from recorded runs of the quickstart (``tests/evaluation/recorded_runs.json``), and
from `moco.evaluation.collapse`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from moco.evaluation.collapse import DIMENSIONAL_COLLAPSE, collapse_of

YES = "yes"
NOT_YET = "not yet"
NO = "no"

AT_CHANCE = 0.01
"""A loss that is below that of chance by a smaller share, in the mean of `TREND_PARTS` tenths, is
at chance. A collapsed run was 0.1 % below it, and a run with a learning rate of 0 was above it.
A healthy run was 2 % below it after a tenth of its steps, and 42 % at its end."""

EARLY_PARTS = 3
"""Until so many tenths are done, a loss at chance and a kNN accuracy as before training are no bad
sign: the queue fills and the learning rate warms up."""

LEAST_STEPS = 100
"""Before so many optimizer steps, the answer is never yes."""
LEAST_STEPS_TO_FAIL = 50
"""Before so many optimizer steps, the answer is never no."""

SOLVED = 0.05
"""A loss below this share of that of chance means that the task is solved. If the features are no
better than before training, something else than the images gives the own key away, such as
BatchNorm's statistics of the batch (section 3.3 of arXiv 1911.05722)."""

CHANGE = 0.02
"""A loss that changes by a smaller share of that of chance within `TREND_PARTS` tenths is flat."""
TREND_PARTS = 3

LESS_RANK = 0.5
"""An effective rank below this share of its highest value falls. Of the healthy run it went from 50
to 38."""


class Look(NamedTuple):
    """The figures of a part of a run, such as a tenth. Means, unless they say otherwise."""

    step: int
    """Optimizer steps at its end."""
    loss: float
    loss_of_chance: float
    """The loss of an encoder that tells nothing apart."""
    contrast_top1: float
    """See `moco.evaluation.contrast_accuracy`."""
    contrast_top1_of_chance: float
    embedding_std: float
    """See `moco.evaluation.diagnostics.embedding_std`."""
    rank: float
    """Effective rank of the newest keys at its end, see `rank_me`."""
    num_keys: int
    """Keys that the rank is of."""
    embedding_dim: int
    knn_top1: float | None
    """The newest kNN accuracy, as a fraction; None without labels, and before the first one."""


class Baselines(NamedTuple):
    """What a run has to be better than."""

    knn_top1: float | None = None
    """kNN accuracy before the first step, as a fraction; None if it was not measured."""
    name: str = "untrained encoder"
    """Of what that was."""
    num_queries: int | None = None
    """Images that the accuracies are of."""


class Verdict(NamedTuple):
    """The answer to "is it learning?", and why."""

    answer: str
    """`YES`, `NOT_YET` or `NO`."""
    reasons: Sequence[str]

    def __str__(self) -> str:
        return f"{self.answer}: {'; '.join(self.reasons)}"


def judge(looks: Sequence[Look], baselines: Baselines, *, is_last: bool = False) -> Verdict:
    """Return whether a run learns.

    Args:
        looks: of its parts so far, at least one; the last one is judged.
        baselines: what it has to be better than.
        is_last: whether the run ends here.
    """
    look = looks[-1]
    is_early = len(looks) <= EARLY_PARTS
    answers = []
    reasons = []
    if look.step < LEAST_STEPS:
        answers.append(NOT_YET)
        reasons.append(f"{said_steps(look.step)} too few to tell")

    spread_out = 1 / math.sqrt(look.embedding_dim)
    most = min(look.num_keys, look.embedding_dim)
    collapse = collapse_of(look.embedding_std, look.rank, (look.num_keys, look.embedding_dim))
    if collapse is not None:
        answers.append(NO)
        what = "are nearly the same"
        if collapse.name == DIMENSIONAL_COLLAPSE:
            what = "differ in few dimensions only"
        reasons.append(f"the embeddings {what} ({collapse.name.lower()})")

    answer, reason = judge_loss(looks, is_early=is_early)
    answers.append(answer)
    reasons.append(reason)
    reasons.append(
        f"a query finds its own key first in {percent(look.contrast_top1)} "
        f"(chance {percent(look.contrast_top1_of_chance)})"
    )

    if look.knn_top1 is not None:
        is_solved = look.loss < SOLVED * look.loss_of_chance
        answer, reason = judge_knn(looks, baselines, is_final=is_last or is_solved)
        answers.append(answer)
        reasons.append(reason)
        if is_solved and answer != YES:
            answers.append(NO)
            reasons.append(
                "its task is solved and the features are no better: see method.batch_norm"
            )

    reasons.append(f"spread {100 * look.embedding_std / spread_out:.0f} % of the largest possible")
    rank = f"effective rank {look.rank:.0f} of {most}"
    highest = max(one.rank for one in looks)
    if look.rank < LESS_RANK * highest:
        rank += f", down from {highest:.0f}"
    reasons.append(rank)

    if look.step < LEAST_STEPS_TO_FAIL:
        return Verdict(NOT_YET, reasons)
    for worst in (NO, NOT_YET):
        if worst in answers:
            return Verdict(worst, reasons)
    return Verdict(YES, reasons)


def said_steps(number: int) -> str:
    """Return a number of steps with its verb."""
    if number == 1:
        return "1 step is"
    return f"{number} steps are"


def judge_loss(looks: Sequence[Look], *, is_early: bool) -> tuple[str, str]:
    """Return an answer and the reason, from the loss beside that of chance and its trend."""
    look = looks[-1]
    reason = f"loss {look.loss:.2f}, chance is {look.loss_of_chance:.2f}"
    gaps = [1 - one.loss / one.loss_of_chance for one in looks[-TREND_PARTS:]]
    if sum(gaps) / len(gaps) < AT_CHANCE:
        return (NOT_YET if is_early else NO), f"{reason}: no better than chance"
    if len(looks) > TREND_PARTS:
        change = look.loss - looks[-1 - TREND_PARTS].loss
        trend = "flat"
        if abs(change) > CHANGE * look.loss_of_chance:
            trend = "still falling" if change < 0 else "rising"
        reason += f", {trend}"
    return YES, reason


def judge_knn(looks: Sequence[Look], baselines: Baselines, *, is_final: bool) -> tuple[str, str]:
    """Return an answer and the reason, from the kNN accuracy beside that before training.

    Differences below two standard errors of the accuracy are none.

    Args:
        looks: the last one has a kNN accuracy.
        baselines: what it has to be better than.
        is_final: a lower accuracy is no matter of time.
    """
    top1 = looks[-1].knn_top1
    assert top1 is not None
    reason = f"kNN {percent(top1)}"
    error = two_standard_errors(top1, baselines.num_queries)
    best = max(look.knn_top1 for look in looks if look.knn_top1 is not None)
    if best - top1 > error:
        reason += f", down from {percent(best)}"
    if baselines.knn_top1 is None:
        return YES, reason
    reason += f", {baselines.name} {percent(baselines.knn_top1)}"
    gain = top1 - baselines.knn_top1
    if gain > error:
        return YES, reason
    if gain < -error:
        return (NO if is_final else NOT_YET), f"{reason}: below it"
    return NOT_YET, f"{reason}: no clear difference"


def two_standard_errors(share: float, number: int | None) -> float:
    """Return twice the standard error of a share of `number` images; 0 if that is unknown."""
    if not number:
        return 0.0
    return 2 * math.sqrt(share * (1 - share) / number)


def percent(share: float) -> str:
    """Return a share in percent, small ones with two significant digits."""
    if 0 < share < 0.01:
        return f"{100 * share:.2g} %"
    return f"{100 * share:.1f} %"
