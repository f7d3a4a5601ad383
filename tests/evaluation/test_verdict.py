"""The verdict on recorded runs of the quickstart.

They were recorded with evaluation.every_n_epochs=4, and 20 epochs for the healthy run, 10 for the
others: method.key_momentum=0 (collapsed), optimizer.lr=1e-9 (learning rate of 0) and
optimizer.lr=30 (learning rate too high). The state of `LearningVerdict` in their last checkpoint
has these looks.
"""

import json

import pytest

from moco.evaluation.verdict import NO, NOT_YET, YES, Baselines, Look, judge
from tests.conftest import REPOSITORY

RECORDED = json.loads((REPOSITORY / "tests" / "evaluation" / "recorded_runs.json").read_text())
UNHEALTHY = [name for name in RECORDED if name != "healthy"]


def run_of(name, *, has_labels):
    """The looks and baselines of a recorded run, as if it had had no labels if so asked."""
    run = RECORDED[name]
    looks = [Look(**look) for look in run["looks"]]
    if not has_labels:
        return [look._replace(knn_top1=None) for look in looks], Baselines()
    return looks, Baselines(run["knn_untrained"], num_queries=run["num_queries"])


def answers_of(looks, baselines):
    return [judge(looks[: place + 1], baselines).answer for place in range(len(looks))]


@pytest.mark.parametrize("has_labels", [True, False])
def test_a_healthy_run_learns_from_early_on(has_labels):
    looks, baselines = run_of("healthy", has_labels=has_labels)
    answers = answers_of(looks, baselines)
    assert NO not in answers
    assert set(answers[3:]) == {YES}


@pytest.mark.parametrize("has_labels", [True, False])
@pytest.mark.parametrize("name", UNHEALTHY)
def test_a_run_that_does_not_learn_is_told_by_the_fourth_tenth(name, has_labels):
    looks, baselines = run_of(name, has_labels=has_labels)
    answers = answers_of(looks, baselines)
    assert YES not in answers
    assert set(answers[3:]) == {NO}


def test_the_reasons_name_figures_beside_what_to_compare_them_with():
    looks, baselines = run_of("healthy", has_labels=True)
    assert str(judge(looks, baselines)) == (
        "yes: loss 2.81, chance is 4.86, still falling; a query finds its own key first in 29.2 % "
        "(chance 0.78 %); kNN 98.9 %, untrained encoder 96.7 %; spread 86 % of the largest "
        "possible; effective rank 38 of 128"
    )
    looks, baselines = run_of("collapsed", has_labels=True)
    verdict = judge(looks, baselines)
    assert verdict.reasons[:2] == [
        "the embeddings are nearly the same (collapsed)",
        "loss 4.86, chance is 4.86: no better than chance",
    ]
    assert "kNN 96.1 %, untrained encoder 96.7 %: no clear difference" in verdict.reasons


def test_features_that_are_no_better_at_the_end_are_told_with_the_reason():
    looks, baselines = run_of("healthy", has_labels=True)
    same = [look._replace(knn_top1=0.967) for look in looks]
    assert judge(same, baselines).answer == NOT_YET
    worse = [look._replace(knn_top1=0.8) for look in looks]
    assert judge(worse[:5], baselines).answer == NOT_YET
    assert judge(worse, baselines).answer == NOT_YET
    assert judge(worse, baselines, is_last=True).answer == NO
    solved = [look._replace(loss=0.05) for look in worse]
    verdict = judge(solved[:5], baselines)
    assert verdict.answer == NO
    assert any("see method.batch_norm" in reason for reason in verdict.reasons)
    fallen = [*looks[:-1], looks[-1]._replace(knn_top1=0.9)]
    assert any("kNN 90.0 %, down from 98.9 %" in reason for reason in judge(fallen, baselines)[1])
    start = Baselines(0.5, "weights of init_from", 360)
    assert any("weights of init_from 50.0 %" in reason for reason in judge(looks, start)[1])


def test_a_falling_rank_is_named():
    looks, baselines = run_of("healthy", has_labels=False)
    fallen = [*looks[:-1], looks[-1]._replace(rank=20.0)]
    assert judge(fallen, baselines).reasons[-1] == "effective rank 20 of 128, down from 50"


def test_a_run_of_few_steps_has_not_failed():
    looks, baselines = run_of("collapsed", has_labels=False)
    few = [looks[-1]._replace(step=1)]
    verdict = judge(few, baselines, is_last=True)
    assert (verdict.answer, verdict.reasons[0]) == (NOT_YET, "1 step is too few to tell")
