"""A training says once that other programs take its processors."""

from types import SimpleNamespace

import pytest
import torch

from moco.callbacks import busy_machine
from moco.callbacks.busy_machine import BusyMachine
from moco.runs.processors import ProcessorTime


@pytest.fixture
def times(monkeypatch):
    """Two threads, and the time of the training process at each look, which the test sets."""
    times = [ProcessorTime(0, 0)]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(busy_machine, "allowed_processors", lambda: 2)
    monkeypatch.setattr(busy_machine, "processor_quota", lambda: None)
    monkeypatch.setattr(busy_machine.multiprocessing, "active_children", list)
    monkeypatch.setattr(
        busy_machine,
        "processor_time",
        lambda processes=("self",): times[-1] if processes == ("self",) else None,
    )
    return times


def looks(times, device, caplog, monkeypatch):
    """Look three times, 20 seconds apart; return what was said."""
    now = [0.0]
    monkeypatch.setattr(busy_machine.time, "monotonic", lambda: now[0])
    callback = BusyMachine()
    trainer = SimpleNamespace(is_global_zero=True)
    module = SimpleNamespace(device=torch.device(device))
    callback.on_train_start(trainer, module)
    for step in range(60):
        now[0] += 1
        # Each thread runs half of the time and waits for the other half.
        times.append(ProcessorTime(step + 1, step + 1))
        callback.on_train_batch_end(trainer, module, None, None, step)
    return caplog.messages


def test_a_busy_machine_is_said_once(times, caplog, monkeypatch):
    (message,) = looks(times, "cpu", caplog, monkeypatch)
    assert message.startswith("other programs keep this machine busy: the 2 threads of this run")
    assert "50% of the time" in message


def test_a_training_on_a_gpu_says_nothing(times, caplog, monkeypatch):
    assert looks(times, "meta", caplog, monkeypatch) == []


def test_a_kernel_without_these_times_says_nothing(times, caplog, monkeypatch):
    monkeypatch.setattr(busy_machine, "processor_time", lambda *_: None)
    assert looks(times, "cpu", caplog, monkeypatch) == []
