"""The expensive figures of a run: right, and without a trace in the run."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moco.callbacks.label_free_monitor import LabelFreeMonitor, untouched
from moco.train import run
from moco.training.logger import RunLogger


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def last(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


OFTEN = ["evaluation.diagnostics_every_n_steps=1", "evaluation.plots_every_n_epochs=1"]
NEVER = [
    "evaluation.diagnostics_every_n_steps=null",
    "evaluation.plots_every_n_epochs=null",
    "evaluation.projector_images=0",
]
OF_SEVERAL_KINDS = [
    # Six steps go into the second epoch.
    ["method.batch_norm=split", "data.image_size=8", "trainer.max_steps=6"],
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
@pytest.mark.slow
def test_a_run_ends_in_the_same_bits_with_and_without_diagnostics(kind, runner, tmp_path):
    for name, how_much in (("often", OFTEN), ("never", NEVER)):
        settings = ["data.batch_size=240", *kind, *how_much]
        run(runner.config(*settings), tmp_path / name)
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
        # Each of the keys is there, once.
        places = [int((queue == key).all(dim=1).nonzero()) for key in kept.keys]
        oldest = (int(pl_module.queue.pointer) - places[0]) % len(queue) or len(queue)
        self.drifts.append(
            (super()._drift(trainer, pl_module, kept), oldest, int(pl_module.queue.filled))
        )
        return self.drifts[-1][0]


WITHOUT_BATCH_NORM = ["backbone=vit_tiny_patch4", "optimizer.lr=0.01"]


@pytest.mark.parametrize(
    "kind",
    [
        [],
        pytest.param(["method.symmetric=true"], marks=pytest.mark.slow),
        pytest.param(["trainer.accumulate_grad_batches=2"], marks=pytest.mark.slow),
    ],
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
    # One step later the batch is no longer whole.
    assert oldest + per_step > 200


@pytest.mark.slow
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
def test_of_a_step_that_is_not_finite_only_what_is_finite_is_drawn(
    bad_rows, drawn, tmp_path, monkeypatch
):
    query, histograms = unit(8, 4), {}
    query[:bad_rows] = math.nan
    logger = RunLogger(tmp_path)

    def add_histogram(name, values, step):
        histograms[name] = values

    monkeypatch.setattr(logger.experiment, "add_histogram", add_histogram)
    trainer = SimpleNamespace(
        loggers=[logger],
        global_step=1, num_training_batches=9, accumulate_grad_batches=1,
    )  # fmt: skip
    # Without gradients, as after a skipped step.
    encoder = nn.ModuleDict({"projector": nn.Linear(3, 4)})
    module = SimpleNamespace(query_encoder=encoder, key_encoder=encoder, queue=None)
    monitor = LabelFreeMonitor(1)
    monitor.on_before_optimizer_step(trainer, module, None)
    monitor.on_train_batch_end(
        trainer, module, {"query": query, "key": unit(8, 4), "negatives": unit(5, 4)}, None, 0
    )
    assert {
        name.removeprefix("2_health/similarity/"): len(values)
        for name, values in histograms.items()
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
