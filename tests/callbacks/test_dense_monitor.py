"""Segmentation by patch features while a run pretrains: its figures, and no effect on training."""

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
from moco.training.board_layout import tag_of
from moco.training.random_states import random_states
from tests.evaluation.dense_images import MeanColours, dense_set, draw_halves
from tests.training.test_distributed import on_two


@pytest.fixture
def halves(tmp_path):
    return draw_halves(tmp_path / "halves", [(16, 20), (20, 16), (16, 16)] * 3)


def with_dense(root, *overrides):
    return [
        "monitor.dense.data=segmentation_folder",
        f"monitor.dense.root={root}",
        "monitor.dense.num_neighbors=5",
        "monitor.dense.maps=[1]",
        "monitor.dense.bank_size=200",
        *overrides,
    ]


def monitor_of(config, figures, **settings):
    vote = {key: getattr(config.monitor.dense, key) for key in build_pretraining.DENSE_VOTE}
    images = build_pretraining.build_dense_set(config, 16)
    return DenseMonitor(figures, images, **(vote | settings))


class ScaledColours(MeanColours):
    scale = 1.0

    def feature_maps(self, images):
        return [part * self.scale for part in super().feature_maps(images)]


class Module(nn.Module):
    """What the monitor uses of a method."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.query_encoder = nn.Module()
        self.query_encoder.backbone = ScaledColours()


@dataclasses.dataclass
class Trainer:
    """What the monitor uses of a Trainer."""

    loggers = ()
    global_step = 0


def small_monitor(root, figures, **settings):
    """A monitor of few images, to be called without a Trainer."""
    defaults = {"num_neighbors": 5, "temperature": 0.1}
    return DenseMonitor(figures, dense_set(root), **(defaults | settings))


def end_of_run(runner, config, monitors):
    """The weights and the random states after two epochs of three steps."""
    torch.manual_seed(7)
    np.random.seed(7)
    method = runner.fit(config, monitors, limit_train_batches=3)
    assert method.training
    return method.state_dict(), random_states()


@pytest.mark.slow
def test_a_run_with_the_monitor_has_the_weights_of_one_without(runner, halves):
    epochs = ["trainer.max_steps=-1", "trainer.max_epochs=2"]
    weights, states = end_of_run(runner, runner.config(*epochs), [])
    figures = {}
    config = runner.config(*epochs, *with_dense(halves))
    monitor = monitor_of(config, figures)
    monitored_weights, monitored_states = end_of_run(runner, config, [monitor])
    assert figures["dense/epoch"] == 2
    assert weights.keys() == monitored_weights.keys()
    for name, tensor in weights.items():  # running statistics are among them
        assert torch.equal(tensor, monitored_weights[name]), name
    assert torch.equal(states["torch"], monitored_states["torch"])
    assert json.dumps(states["python"]) == json.dumps(monitored_states["python"])


def test_it_reports_the_miou_and_its_protocol(runner, halves):
    figures = {}
    config = runner.config(*with_dense(halves))
    runner.fit(config, [monitor_of(config, figures)])
    assert 0 < figures["dense/knn_miou"] <= figures["dense/knn_pixel_accuracy"] <= 1
    protocol = {
        "dense/num_neighbors": 5,
        "dense/temperature": 0.02,
        "dense/maps": [1],
        "dense/bank_size": 200,
        "dense/image_size": 16,
        "dense/num_images": 6,
        "dense/num_queries": 3,
        "dense/epoch": 1,
    }
    assert figures | protocol == figures


@pytest.mark.slow
def test_a_whole_run_shows_it_and_may_continue_without_it(runner, halves, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    overrides = [
        "trainer.max_steps=-1",
        "trainer.max_epochs=2",
        "data.batch_size=1024",
        "trainer.accelerator=cpu",
    ]
    config = runner.config(*with_dense(halves, "monitor.dense.every_n_epochs=2"), *overrides)
    folder = tmp_path / "run"
    train.run(config, folder)
    shown = capsys.readouterr().out
    figures = json.loads((folder / "metrics.json").read_text())
    miou = figures["dense/knn_miou"]
    lines = [line for line in shown.splitlines() if line.startswith("epoch ")]
    assert "dense mIoU" not in lines[0]
    assert f"dense mIoU {100 * miou:.2f} %" in lines[1]
    assert "mIoU of kNN segmentation" in shown
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.value for event in events.Scalars(tag_of("dense/knn_miou"))] == [
        pytest.approx(miou)
    ]

    train.run(runner.config(*overrides, "trainer.max_epochs=3"), folder)
    assert json.loads((folder / "metrics.json").read_text())["epoch"] == 3
    assert "dense mIoU" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("monitor.dense.root=null", "monitor.dense.root=None: expected the dataset's folder"),
        (
            "monitor.dense.root=/nowhere",
            "monitor.dense.root=/nowhere: no such folder",
        ),
        ("monitor.dense.maps=[5]", r"monitor.dense.maps=\[5\]: expected numbers from 1"),
        (
            "monitor.dense.data=null",
            "monitor.dense.root=.*: without monitor.dense.data it has no effect",
        ),
    ],
)
def test_a_mistake_is_reported_before_training_under_the_name_of_its_key(
    runner, halves, tmp_path, override, message
):
    config = runner.config(*with_dense(halves), override)
    with pytest.raises(InputError, match=message):
        train.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_interrupted_measurement_is_owed(runner, halves):
    figures = {"epoch": 1}
    config = runner.config(*with_dense(halves))
    interrupted = monitor_of(config, figures, should_stop=lambda: True)
    runner.fit(config, [interrupted])
    assert interrupted.state_dict() == {"owed": True}
    assert "dense/knn_miou" not in figures
    resumed = monitor_of(config, figures)
    resumed.load_state_dict({"owed": True})
    resumed.on_fit_start(Trainer(), Module())
    assert resumed.state_dict() == {}
    assert figures["dense/epoch"] == 1


def test_features_that_are_not_finite_are_a_warning_and_no_figure(halves, caplog):
    module, figures = Module(), {}
    module.query_encoder.backbone.scale = torch.nan
    small_monitor(halves, figures).measure(Trainer(), module, 4)
    assert "no dense figure at epoch 4: the features of" in caplog.text
    assert not figures


def test_a_bank_smaller_than_k_is_named_once(halves, caplog):
    figures = {}
    monitor = DenseMonitor(
        figures, dense_set(halves, bank_size=6), num_neighbors=30, temperature=0.1
    )
    for epoch in (1, 2):
        monitor.measure(Trainer(), Module(), epoch)
    message = "monitor.dense.num_neighbors=30 is more than the bank's 6"
    assert caplog.text.count(message) == 1
    assert figures["dense/num_neighbors"] == 6


def measure_in_process(rank, root, expected):
    module, figures = Module(), {}
    if rank > 0:  # only rank 0 measures
        module.query_encoder.backbone.scale = torch.nan
    small_monitor(root, figures).measure(Trainer(), module, 3)
    assert figures == expected


@pytest.mark.slow
def test_every_process_gets_what_rank_zero_measured(halves):
    figures = {}
    small_monitor(halves, figures).measure(Trainer(), Module(), 3)
    on_two(measure_in_process, halves, figures)
