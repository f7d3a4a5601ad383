"""Diagnostics of a run leave no trace in it, and an ill run is told from a healthy one."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moco.callbacks.collapse_watch import (
    CollapseWatch,
    LabelFreeMonitor,
    embeddings_of_keys,
    untouched,
)
from moco.methods.key_queue import KeyQueue
from moco.train import run


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def last(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


OFTEN = ["evaluation.diagnostics_every_n_steps=1", "evaluation.plots_every_n_epochs=1"]
NEVER = [
    "evaluation.diagnostics_every_n_steps=null", "evaluation.plots_every_n_epochs=null", "evaluation.projector_images=0",
]  # fmt: skip
OF_SEVERAL_KINDS = [
    ["method.batch_norm=split", "trainer.max_steps=6"],  # into the second epoch
    pytest.param(
        ["method.symmetric=true", "trainer.accumulate_grad_batches=2"], marks=pytest.mark.slow
    ),
    pytest.param(
        [
            "method.negatives=batch",
            "method.queue_size=null",
            "backbone=swin_v2_tiny_patch2",
            "backbone.window_size=2",
        ],
        marks=pytest.mark.slow,
    ),
]


def assert_same_run(one, other):
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name
    for states, other_states in zip(one["random_states"], other["random_states"], strict=True):
        assert torch.equal(states["torch"], other_states["torch"])
        assert torch.equal(states["numpy"][1], other_states["numpy"][1])


@pytest.mark.parametrize("kind", OF_SEVERAL_KINDS)
def test_a_run_ends_in_the_same_bits_with_and_without_diagnostics(kind, runner, tmp_path):
    for name, how_much in (("often", OFTEN), ("never", NEVER)):
        run(runner.config("data.batch_size=240", *kind, *how_much), tmp_path / name)
    assert_same_run(last(tmp_path / "often"), last(tmp_path / "never"))


@pytest.mark.slow
def test_two_processes_measure_together_and_end_in_the_same_bits(runner, tmp_path):
    settings = [
        "data.batch_size=240",
        "trainer.devices=2",
        "trainer.max_steps=7",
        "method.queue_size=480",
    ]
    for name, how_much in (("often", OFTEN), ("never", NEVER)):
        run(runner.config(*settings, *how_much), tmp_path / name)
    assert_same_run(last(tmp_path / "often"), last(tmp_path / "never"))


class Watched(LabelFreeMonitor):
    """Keeps what would be logged, and looks for the kept keys in the queue."""

    def __init__(self, every_n_steps):
        super().__init__(every_n_steps)
        self.drifts, self.shown = [], []

    def _figures(self, trainer, pl_module, outputs):
        self.shown.append(super()._figures(trainer, pl_module, outputs))
        return self.shown[-1]

    def _drift(self, trainer, pl_module, kept):
        queue = pl_module.queue.keys
        places = [
            int((queue == key).all(dim=1).nonzero()) for key in kept.keys
        ]  # each is there, once
        oldest = (int(pl_module.queue.pointer) - places[0]) % len(queue) or len(queue)
        self.drifts.append(
            (super()._drift(trainer, pl_module, kept), oldest, int(pl_module.queue.filled))
        )
        return self.drifts[-1][0]


WITHOUT_BATCH_NORM = ["backbone=vit_tiny_patch4", "optimizer.lr=0.01"]


@pytest.mark.parametrize(
    "kind", [[], ["method.symmetric=true"], ["trainer.accumulate_grad_batches=2"]]
)
def test_drift_is_of_the_oldest_whole_batch_in_the_queue(kind, runner):
    monitor = Watched(1)
    runner.fit(runner.config("method.queue_size=200", "trainer.max_steps=9", *kind), [monitor])
    at_once = 16 if "trainer.accumulate_grad_batches=2" in kind else 32
    per_step = 64 if "method.symmetric=true" in kind else 32
    steps = (200 - at_once) // per_step
    figures, oldest, filled = monitor.drifts[-1]
    assert figures["queue/drift_age"] == steps + 1
    assert figures["queue/oldest_age"] == filled / per_step
    assert oldest + per_step > 200  # one step later it is no longer whole


def test_keys_of_an_encoder_that_stands_still_do_not_drift_and_those_of_a_fast_one_do(runner):
    drifts = []
    for momentum in (1.0, 0.5):
        monitor = Watched(1)
        settings = (
            f"method.key_momentum={momentum}",
            "method.queue_size=128",
            "trainer.max_steps=5",
        )
        runner.fit(runner.config(*WITHOUT_BATCH_NORM, *settings), [monitor])
        drifts.append(monitor.drifts[-1][0]["queue/drift"])
    assert drifts[0] == pytest.approx(1, abs=1e-5)
    assert 0 < drifts[1] < 0.999


def test_figures_come_at_every_nth_step_and_are_finite(runner):
    monitor = Watched(2)
    runner.fit(runner.config("trainer.max_steps=5"), [monitor])
    assert len(monitor.shown) == 2
    for figures in monitor.shown:
        assert all(math.isfinite(value) for value in figures.values())
        assert figures["label_free/rank_me"] <= 48
        assert figures["gradient_norm/backbone.layer4"] > 0
        assert 0 < figures["encoder_distance/projector"] < 1


@pytest.mark.parametrize(("bad_rows", "drawn"), [(1, {"positive": 7, "negative": 7 * 5}), (8, {})])
def test_of_a_step_that_is_not_finite_only_what_is_finite_is_drawn(bad_rows, drawn):
    query, histograms = unit(8, 4), {}
    query[:bad_rows] = math.nan
    experiment = SimpleNamespace(
        add_histogram=lambda name, values, step: histograms.update({name: values})
    )
    trainer = SimpleNamespace(
        logger=SimpleNamespace(experiment=experiment, log_metrics=lambda figures, step: None),
        global_step=1, num_training_batches=9, accumulate_grad_batches=1,
    )  # fmt: skip
    encoder = nn.ModuleDict(
        {"projector": nn.Linear(3, 4)}
    )  # without gradients: the step was left out
    module = SimpleNamespace(query_encoder=encoder, key_encoder=encoder, queue=None)
    monitor = LabelFreeMonitor(1)
    monitor.on_before_optimizer_step(trainer, module, None)
    monitor.on_train_batch_end(
        trainer, module, {"query": query, "key": unit(8, 4), "negatives": unit(5, 4)}, None, 0
    )
    assert {
        name.removeprefix("similarity/"): len(values) for name, values in histograms.items()
    } == drawn
    assert all(values.isfinite().all() for values in histograms.values())


def test_a_module_that_ran_untouched_has_its_statistics_and_the_generator_its_state():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())
    before, state = net[0].running_mean.clone(), torch.get_rng_state()
    with untouched(net):
        net(torch.randn(8, 3) + 5)
        assert not torch.equal(net[0].running_mean, before)
    assert torch.equal(net[0].running_mean, before)
    assert int(net[0].num_batches_tracked) == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_a_collapse_is_named_at_the_fifth_look_in_a_row_and_once(caplog):
    watch, same, spread = CollapseWatch(), unit(1, 64).expand(32, 64), unit(32, 64)
    for query in (same, same, same, same, spread, same, same, same, same):
        watch.check(query, spread, 20)
    assert not caplog.text
    watch.check(same, spread, 140)
    assert (
        "COLLAPSED at step 140: all embeddings are nearly the same (standard deviation 0.00000"
        in caplog.text
    )
    watch.check(same, spread, 160)
    assert caplog.text.count("COLLAPSED") == 1


def test_embeddings_in_a_plane_are_a_dimensional_collapse(caplog):
    watch, flat = CollapseWatch(), F.pad(unit(500, 2), (0, 62))
    for step in range(20, 120, 20):
        watch.check(flat[:32], flat, step)
    assert (
        "DIMENSIONAL COLLAPSE at step 100: the embeddings differ in few dimensions only (effective rank 2.0 of 64)"
        in caplog.text
    )
    assert "\nCOLLAPSED" not in caplog.text


def test_the_newest_keys_of_a_long_queue_are_looked_at(monkeypatch):
    monkeypatch.setattr("moco.callbacks.collapse_watch.MOST_KEYS", 40)
    queue = KeyQueue(100, 16)
    queue.enqueue(unit(70, 16))
    queue.enqueue(
        unit(40, 2) @ F.pad(torch.eye(2), (0, 14))
    )  # in a plane, the last ten wrap around
    keys = embeddings_of_keys(SimpleNamespace(queue=queue), {})
    assert len(keys) == 40
    assert torch.linalg.matrix_rank(keys) == 2


def test_a_few_keys_say_nothing_about_dimensions(caplog):
    watch = CollapseWatch()
    for step in range(9):
        watch.check(unit(16, 64), unit(1, 64).expand(10, 64), step)
    assert not caplog.text


def test_a_run_that_goes_on_goes_on_counting():
    watch, again, same = CollapseWatch(), CollapseWatch(), unit(1, 64).expand(32, 64)
    for step in range(3):
        watch.check(same, unit(64, 64), step)
    again.load_state_dict(watch.state_dict())
    assert again.checks == {"COLLAPSED": 3, "DIMENSIONAL COLLAPSE": 0}


def test_a_run_without_key_momentum_collapses_and_is_named_soon_however_rarely_it_logs(
    runner, caplog
):
    settings = [
        "method.key_momentum=0",
        "method.queue_size=128",
        "data.batch_size=64",
        "trainer.log_every_n_steps=1000",
    ]
    runner.fit(
        runner.config(*settings, "trainer.max_epochs=20", "trainer.max_steps=120"),
        [CollapseWatch()],
    )
    assert "COLLAPSED at step " in caplog.text


def test_a_constant_encoder_is_named(runner, caplog, monkeypatch):
    class Constant(CollapseWatch):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            nn.init.zeros_(pl_module.query_encoder.projector.weight)

    monkeypatch.setattr(CollapseWatch, "EVERY_N_STEPS", 1)
    runner.fit(runner.config("trainer.max_steps=6"), [Constant()])
    assert "COLLAPSED at step 5" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_healthy_run_is_not_warned_of(seed, runner, caplog):
    settings = [
        "method.queue_size=128",
        "data.batch_size=64",
        "trainer.max_epochs=15",
        "trainer.max_steps=-1",
    ]
    runner.fit(runner.config(*settings, f"seed={seed}"), [CollapseWatch()])
    assert "COLLAPSE" not in caplog.text
