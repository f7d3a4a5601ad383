"""A long run on a CPU says so after its first steps, with a shorter one."""

from types import SimpleNamespace

import pytest

from moco.callbacks import long_run
from moco.callbacks.long_run import LongRun, in_words


@pytest.mark.parametrize(
    ("seconds_per_step", "steps_per_epoch", "num_steps", "line"),
    [
        (1.0, 4, 7199, None),
        (
            25.0,
            4,
            3200,
            "about 22 h at this speed; a shorter run: trainer.max_epochs=36 (about 1 h)",
        ),
        (2.0, 5_000, 100_000, "about 2 days at this speed; a shorter run: trainer.max_steps=1800"),
        (1.0, 4, float("inf"), None),
    ],
)
def test_only_a_run_of_hours_is_long(seconds_per_step, steps_per_epoch, num_steps, line):
    said = in_words(seconds_per_step, steps_per_epoch, num_steps)
    if line is None:
        assert said is None
    else:
        assert line in said


def test_a_new_run_on_a_cpu_says_it_once(monkeypatch, caplog):
    caplog.set_level("INFO", logger="moco")
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(long_run.time, "monotonic", lambda: clock.now)

    def said(device="cpu", resumed_step=0):
        caplog.clear()
        root = SimpleNamespace(root_device=SimpleNamespace(type=device))
        trainer = SimpleNamespace(
            global_step=resumed_step,
            strategy=root,
            num_training_batches=4,
            accumulate_grad_batches=1,
        )
        module = SimpleNamespace(num_steps=3200)
        callback = LongRun()
        callback.on_train_start(trainer, module)
        for number in range(6):
            # The first step takes long, and does not count.
            clock.now += 500.0 if number == 0 else 9.0
            trainer.global_step += 1
            callback.on_train_batch_end(trainer, module, None, None, number % 4)
        return caplog.messages

    assert said() == [
        "the training takes about 8 h at this speed; a shorter run: trainer.max_epochs=100 "
        "(about 1 h)"
    ]
    assert said(device="cuda") == []
    assert said(resumed_step=8) == []
