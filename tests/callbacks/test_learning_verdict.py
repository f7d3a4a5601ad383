"""A run says whether it learns, and does not train differently for it."""

import json
import math

import pytest
import torch

from moco.callbacks.knn_monitor import KNNMonitor
from moco.callbacks.learning_verdict import LearningVerdict
from moco.evaluation.verdict import Look


def test_a_run_without_labels_has_label_free_figures_and_a_verdict(runner, caplog):
    caplog.set_level("INFO", logger="moco")
    config = runner.config("trainer.max_epochs=1", "trainer.max_steps=6")
    figures = {}
    verdict = LearningVerdict(figures)
    with_it = runner.fit(config, [verdict])
    assert {name for name in figures if name.startswith("label_free/")} == {
        "label_free/alignment",
        "label_free/embedding_std",
        "label_free/negative_similarity",
        "label_free/positive_similarity",
        "label_free/rank_me",
        "label_free/uniformity",
    }
    assert all(math.isfinite(figures[name]) for name in figures if name != "verdict")
    assert figures["verdict"].split(":")[0] in ("yes", "not yet", "no")
    assert "kNN" not in figures["verdict"]
    (line,) = [line for line in caplog.messages if "Is it learning?" in line]
    assert line == f"100 % done. Is it learning? {figures['verdict']}"
    # The queue is empty in the first step, so that there is nothing to tell apart.
    assert [look.step for look in verdict.looks] == [2, 3, 4, 5, 6]
    without = runner.fit(config)
    for name, tensor in without.state_dict().items():
        assert torch.equal(tensor, with_it.state_dict()[name]), name


@pytest.mark.slow
def test_the_last_word_knows_the_last_knn_accuracy(runner, caplog):
    caplog.set_level("INFO", logger="moco")
    figures = {}
    config = runner.config("trainer.max_epochs=1", "trainer.max_steps=3")
    knn = KNNMonitor(figures, num_neighbors=5, baselines=True)
    runner.fit(config, [knn, LearningVerdict(figures)])
    before = 100 * figures["knn_untrained/top1"]
    assert f"untrained encoder {before:.1f} %" in figures["verdict"]
    assert f"kNN {100 * figures['knn/top1']:.1f} %" in figures["verdict"]


def test_each_tenth_of_a_long_run_gets_a_line():
    verdict = LearningVerdict({})
    ends = [step for step in range(1, 251) if verdict._ends_part(step, 250)]
    assert ends == list(range(25, 251, 25))
    assert not verdict._ends_part(7, math.inf)


def test_its_state_is_plain_data():
    verdict = LearningVerdict({})
    verdict.looks = [Look(1, 1.0, 2.0, 0.1, 0.01, 0.05, 9.0, 64, 64, None)]
    verdict.samples = [{"loss": 1.0}]
    state = json.loads(json.dumps(verdict.state_dict()))
    again = LearningVerdict({})
    again.load_state_dict(state)
    assert (again.looks, again.samples) == (verdict.looks, verdict.samples)
