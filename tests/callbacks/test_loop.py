"""What the training loop does beside the computation: counted, as a test cannot time it."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moco.callbacks.training_monitor import TrainingMonitor
from moco.data.loading.loaders import PairBatch
from tests.conftest import REPOSITORY


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do, each a kernel on a GPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def bench_loop():
    spec = importlib.util.spec_from_file_location(
        "bench_loop", REPOSITORY / "scripts" / "bench_loop.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_step_that_is_not_logged_costs_the_monitor_one_operation():
    monitor = TrainingMonitor({}, log_every_n_steps=100)
    trainer = SimpleNamespace(
        accumulate_grad_batches=2, num_training_batches=10, world_size=1, global_step=1
    )
    batch = PairBatch(
        (torch.zeros(4, 3, 1, 1),) * 2, torch.arange(4), torch.zeros(4, dtype=torch.bool), 0
    )
    monitor._start_clock()
    with Operations() as operations:
        for index, loss in enumerate([1.0, float("nan"), 2.5, float("inf")]):
            monitor.on_train_batch_end(trainer, None, {"loss": torch.tensor(loss)}, batch, index)
    counted = [
        name for name in operations.names if "lift_fresh" not in name and "detach" not in name
    ]
    assert len(counted) == 4
    state = monitor.state_dict()
    assert state == {"loss_sum": 7.0, "batches": 2.0, "seconds": state["seconds"]}


def test_the_seconds_of_training_go_on_where_the_checkpoint_was():
    monitor = TrainingMonitor({}, log_every_n_steps=100)
    before = monitor.state_dict()["seconds"]
    monitor.load_state_dict({"loss_sum": 0.0, "batches": 0.0, "seconds": 1000.0})
    assert 1000 + before <= monitor.state_dict()["seconds"] < 1001 + before
    monitor.load_state_dict(
        {"loss_sum": 0.0, "batches": 0.0}
    )  # of a run from before they were counted
    assert before <= monitor.state_dict()["seconds"] < 1 + before


def test_the_benchmark_of_the_loop_runs_all_callbacks_of_a_pretraining(bench_loop, tmp_path):
    bench_loop.register_schemas()
    seconds = (
        bench_loop.bare(3),
        bench_loop.lightning_alone(3, tmp_path),
        bench_loop.as_pretraining(3, tmp_path / "run"),
    )
    assert all(0 < value < 10 for value in seconds)
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
