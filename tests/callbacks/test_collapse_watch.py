"""The warning of a collapse: a run that collapses is told from a healthy one."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moco.callbacks.collapse_watch import CollapseWatch, newest_keys
from moco.methods.key_queue import KeyQueue


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


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
        "DIMENSIONAL COLLAPSE at step 100: the embeddings differ in few dimensions only "
        "(effective rank 2.0 of 64). The features will be poor. Usual causes: "
    ) in caplog.text
    assert "\nCOLLAPSED" not in caplog.text


def test_the_newest_keys_of_a_long_queue_are_looked_at(monkeypatch):
    monkeypatch.setattr("moco.callbacks.collapse_watch.MOST_KEYS", 40)
    queue = KeyQueue(100, 16)
    queue.enqueue(unit(70, 16))
    # These are in a plane, and the last ten wrap around.
    queue.enqueue(unit(40, 2) @ F.pad(torch.eye(2), (0, 14)))
    keys = newest_keys(SimpleNamespace(queue=queue), {})
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


@pytest.mark.slow
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


@pytest.mark.slow
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
