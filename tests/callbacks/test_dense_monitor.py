"""Segmentation by patch features while a run pretrains: what it reports, and that training does not notice it."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from moco import train
from moco.callbacks.dense_monitor import DenseMonitor
from moco.cli import build_pretraining
from moco.errors import InputError
from moco.training.random_states import random_states
from tests.evaluation.test_dense import MeanColours, dense_set, draw_quarters
from tests.processes import on_two


@pytest.fixture
def quarters(tmp_path):
    return draw_quarters(tmp_path / "quarters", [(16, 20), (20, 16), (16, 16)] * 3)


def with_dense(root, *overrides):
    return [
        "monitor.dense.data=segmentation_folder", f"monitor.dense.root={root}", "monitor.dense.num_neighbors=5",
        "monitor.dense.maps=[1]", "monitor.dense.bank_size=200", *overrides,
    ]  # fmt: skip


def monitor_of(config, figures, **settings):
    vote = {key: getattr(config.monitor.dense, key) for key in train.DENSE_VOTE}
    return DenseMonitor(figures, build_pretraining.build_dense_set(config, 16), **vote | settings)


def test_a_run_with_the_monitor_has_the_weights_of_one_without(runner, quarters):
    ends = []
    for overrides in ([], with_dense(quarters)):
        config, figures = (
            runner.config("trainer.max_steps=-1", "trainer.max_epochs=2", *overrides),
            {},
        )
        monitors = [monitor_of(config, figures)] if overrides else []
        torch.manual_seed(7)
        np.random.seed(7)
        method = runner.fit(config, monitors, limit_train_batches=3)
        ends.append((method.state_dict(), random_states()))
        assert method.training
    assert figures["dense/epoch"] == 2
    (weights, states), (watched, states_watched) = ends
    assert weights.keys() == watched.keys()
    assert all(
        torch.equal(weights[name], watched[name]) for name in weights
    )  # running statistics too
    assert torch.equal(states["torch"], states_watched["torch"])
    assert json.dumps(states["python"]) == json.dumps(states_watched["python"])


def test_it_reports_miou_and_its_protocol(runner, quarters):
    config, figures = runner.config(*with_dense(quarters)), {}
    runner.fit(config, [monitor_of(config, figures)])
    assert 0 < figures["dense/knn_miou"] <= figures["dense/knn_pixel_accuracy"] <= 1
    protocol = {
        "dense/num_neighbors": 5, "dense/temperature": 0.02, "dense/maps": [1], "dense/bank_size": 200,
        "dense/image_size": 16, "dense/num_images": 6, "dense/num_queries": 3, "dense/epoch": 1,
    }  # fmt: skip
    assert figures | protocol == figures


def test_a_whole_run_shows_it_and_may_go_on_without_it(runner, quarters, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    overrides = [
        "trainer.max_steps=-1",
        "trainer.max_epochs=2",
        "data.batch_size=1024",
        "trainer.accelerator=cpu",
    ]
    config = runner.config(*with_dense(quarters, "monitor.dense.every_n_epochs=2"), *overrides)
    folder = tmp_path / "run"
    train.run(config, folder)
    shown = capsys.readouterr().out
    figures = json.loads((folder / "metrics.json").read_text())
    lines = [line for line in shown.splitlines() if line.startswith("epoch ")]
    assert "dense mIoU" not in lines[0]
    assert f"dense mIoU {figures['dense/knn_miou']:.4f}" in lines[1]
    assert "mIoU of kNN segmentation" in shown
    events = EventAccumulator(str(folder))
    events.Reload()
    assert len(events.Scalars("dense/knn_miou")) == 1
    assert events.Scalars("dense/knn_miou")[0].value == pytest.approx(figures["dense/knn_miou"])
    without = runner.config(*overrides, "trainer.max_epochs=3")
    train.run(without, folder)  # goes on without the monitor
    assert json.loads((folder / "metrics.json").read_text())["epoch"] == 3
    assert "dense mIoU" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["monitor.dense.root=null"], "monitor.dense.root=None: expected the data set's folder"),
        (["monitor.dense.root=/nowhere"], "monitor.dense.root=/nowhere: no such folder"),
        (["monitor.dense.maps=[5]"], r"monitor.dense.maps=\[5\]: expected numbers from 1"),
        (
            ["monitor.dense.data=null"],
            "monitor.dense.root=.*: without monitor.dense.data it has no effect",
        ),
    ],
)
def test_a_mistake_is_told_before_training_under_the_name_of_the_key(
    runner, quarters, tmp_path, overrides, message
):
    config = runner.config(*with_dense(quarters), *overrides)
    with pytest.raises(InputError, match=message):
        train.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_measurement_that_was_cut_short_is_owed(runner, quarters):
    config, figures = runner.config(*with_dense(quarters)), {"epoch": 1}
    stopped = monitor_of(config, figures, should_stop=lambda: True)
    runner.fit(config, [stopped])
    assert stopped.state_dict() == {"owed": True}
    assert "dense/knn_miou" not in figures
    later = monitor_of(config, figures)
    later.load_state_dict({"owed": True})
    later.on_fit_start(Trainer(), Module())
    assert later.state_dict() == {}
    assert figures["dense/epoch"] == 1


def test_features_that_are_not_finite_are_a_warning_and_no_figure(quarters, caplog):
    module, figures = Module(), {}
    monitor = DenseMonitor(figures, dense_set(quarters), num_neighbors=3, temperature=0.1)
    module.query_encoder.backbone.scale = torch.nan
    monitor.measure(Trainer(), module, 4)
    assert "no dense figure at epoch 4: the features of" in caplog.text
    assert not figures


def test_a_bank_smaller_than_k_is_said_once(quarters, caplog):
    figures = {}
    monitor = DenseMonitor(
        figures, dense_set(quarters, bank_size=6), num_neighbors=30, temperature=0.1
    )
    for epoch in (1, 2):
        monitor.measure(Trainer(), Module(), epoch)
    assert (
        caplog.text.count("monitor.dense.num_neighbors=30 is more than the bank's 6 patches") == 1
    )
    assert figures["dense/num_neighbors"] == 6


def measured_by(rank, root, expected):
    module, figures = Module(), {}
    module.query_encoder.backbone.scale = torch.nan if rank else 1.0  # only rank 0's counts
    monitor = DenseMonitor(figures, dense_set(root), num_neighbors=5, temperature=0.1)
    monitor.measure(Trainer(), module, 3)
    assert figures == expected


@pytest.mark.slow
def test_every_process_learns_what_rank_zero_measured(quarters):
    figures = {}
    DenseMonitor(figures, dense_set(quarters), num_neighbors=5, temperature=0.1).measure(
        Trainer(), Module(), 3
    )
    on_two(measured_by, quarters, figures)


class Scaled(MeanColours):
    scale = 1.0

    def feature_maps(self, images):
        return [part * self.scale for part in super().feature_maps(images)]


class Module(nn.Module):
    """As much of a method as the monitor looks at."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.query_encoder = nn.Module()
        self.query_encoder.backbone = Scaled()


@dataclasses.dataclass
class Trainer:
    logger = None
    global_step = 0
