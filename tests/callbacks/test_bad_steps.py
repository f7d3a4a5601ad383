"""Steps without finite gradients, compared with a plain loop that skips them."""

import copy
import gc
import json
import math
import weakref

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

from moco.callbacks.bad_steps import BadSteps
from moco.cli.build_pretraining import build_data
from moco.data.loading.datamodule import PretrainingData
from moco.errors import RunError
from moco.train import run
from moco.training.board_layout import tag_of
from tests.methods.test_moco import Losses

# With the large eps, rounding errors of gradients near zero do not become whole steps.
ADAMW = [
    "optimizer=adamw",
    "optimizer.warmup_epochs=0",
    "optimizer.lr_for_batch_size=null",
    "optimizer.eps=1",
]


def bad_steps(figures, limit=10):
    return BadSteps(figures, limit, 100, lambda: "the last good checkpoint is X")


def poison(monkeypatch, config, *batches):
    """Make the first image of these batches, counted from 0 in every epoch, NaN."""
    per_batch = config.data.batch_size // config.trainer.accumulate_grad_batches
    original = PretrainingData.on_after_batch_transfer
    poisoned = set()
    for epoch in range(config.trainer.max_epochs):
        sampler = build_data(config).sampler()
        sampler.set_epoch(epoch)
        poisoned |= {place for number, place in enumerate(sampler) if number / per_batch in batches}

    def spoiled(self, batch, dataloader_idx):
        batch = original(self, batch, dataloader_idx)
        rows = torch.tensor([(batch.epoch, index) in poisoned for index in batch.indices.tolist()])
        for view in batch.views:
            view[rows] = math.nan
        return batch

    monkeypatch.setattr(PretrainingData, "on_after_batch_transfer", spoiled)


def plain_run(method, config, num_batches, spoil=lambda number: 0.0):
    """Train MoCo in a plain loop that undoes a step whose loss is not finite.

    Args:
        spoil: added to the loss of a batch.
    """
    options, settings = config.method, config.optimizer
    query, key = copy.deepcopy(method.query_encoder), copy.deepcopy(method.key_encoder)
    if settings.name == "sgd":
        kind = torch.optim.SGD(
            query.parameters(),
            settings.lr,
            momentum=settings.sgd_momentum,
            weight_decay=settings.weight_decay,
        )
    else:
        decayed = [parameter for parameter in query.parameters() if parameter.ndim > 1]
        spared = [parameter for parameter in query.parameters() if parameter.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": spared, "weight_decay": 0.0},
        ]
        kind = torch.optim.AdamW(groups, settings.lr, eps=settings.eps)
    rows, pointer, accumulate = (
        list(method.queue.keys.clone()),
        0,
        config.trainer.accumulate_grad_batches,
    )
    data = build_data(config)
    for number, raw in zip(range(num_batches), data.train_dataloader(), strict=False):
        batch = data.on_after_batch_transfer(raw, 0)
        if number % accumulate == 0:
            before, is_good = copy.deepcopy([query.state_dict(), key.state_dict()]), True
        with torch.no_grad():
            keys = F.normalize(key(batch.views[1]), dim=1)
        queries = F.normalize(query(batch.views[0]), dim=1)
        logits = torch.cat(
            [(queries * keys).sum(dim=1, keepdim=True), queries @ torch.stack(rows).T], dim=1
        )
        loss = F.cross_entropy(
            logits / options.temperature, torch.zeros(len(keys), dtype=torch.long)
        ) + spoil(number)
        is_good &= bool(loss.isfinite())
        (loss / accumulate).backward()
        for new in keys:
            rows[pointer] = new if bool(new.isfinite().all()) else rows[pointer]
            pointer = (pointer + 1) % options.queue_size
        if (number + 1) % accumulate == 0:
            if is_good:
                kind.step()
            else:
                query.load_state_dict(before[0])
                key.load_state_dict(before[1])
            kind.zero_grad()
            with torch.no_grad():
                for q, k in zip(query.parameters(), key.parameters(), strict=True):
                    k.copy_(k * options.key_momentum + q * (1 - options.key_momentum))
    return query, key, torch.stack(rows), pointer


def assert_equal_to_plain(method, expected):
    """Up to rounding; weight decay alone moves weights by 1e-3 in a step."""
    query, key, rows, pointer = expected
    for ours, theirs in ((method.query_encoder, query), (method.key_encoder, key)):
        for name, value in theirs.state_dict().items():
            assert value.isfinite().all(), name
            torch.testing.assert_close(
                ours.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name
            )
    torch.testing.assert_close(method.queue.keys, rows, rtol=1e-4, atol=1e-5)
    assert int(method.queue.pointer) == pointer


@pytest.fixture
def of_four_steps(runner, monkeypatch):
    # At a ReLU's kink, rounding decides between two gradients. A SiLU has no kink.
    monkeypatch.setattr(nn, "ReLU", nn.SiLU)

    def config(*overrides):
        constant = [
            "optimizer.schedule=constant",
            "method.queue_start=random",
            "method.batch_norm=plain",
        ]
        return runner.config(
            *constant,
            "trainer.max_steps=4",
            *overrides,
            "optimizer.weight_decay=0.5",
            "optimizer.lr=0.03",
        )

    return config


@pytest.mark.parametrize(
    ("variant", "bad"),
    [
        ([], [1]),
        pytest.param([], [0, 2], marks=pytest.mark.slow),
        pytest.param(ADAMW, [0, 2], marks=pytest.mark.slow),
        pytest.param(["trainer.accumulate_grad_batches=2"], [3], marks=pytest.mark.slow),
        pytest.param(["method.queue_size=20"], [2], marks=pytest.mark.slow),
    ],
    ids=["sgd", "first step", "adamw", "second of two batches", "batch larger than the queue"],
)
def test_a_step_with_an_image_that_is_not_finite_is_as_if_it_had_not_been(
    variant, bad, of_four_steps, runner, monkeypatch
):
    config = of_four_steps(*variant)
    poison(monkeypatch, config, *bad)
    expected = plain_run(runner.method(config), config, 4 * config.trainer.accumulate_grad_batches)
    figures = {}
    method = runner.fit(config, [bad_steps(figures)])
    assert figures["skipped_steps"] == len(bad)
    assert_equal_to_plain(method, expected)


def test_an_infinite_loss_with_finite_gradients_is_skipped_too(of_four_steps, runner, monkeypatch):
    import moco.methods.moco as module

    def spoil(number):
        return math.inf if number == 2 else 0.0

    config, original, calls, figures = (
        of_four_steps(),
        module.efficient_info_nce,
        iter(range(4)),
        {},
    )
    expected = plain_run(runner.method(config), config, 4, spoil)
    monkeypatch.setattr(
        module, "efficient_info_nce", lambda *args: original(*args) + spoil(next(calls))
    )
    method = runner.fit(config, [bad_steps(figures)])
    assert figures["skipped_steps"] == 1
    assert_equal_to_plain(method, expected)


def test_a_steps_graph_is_freed_at_once_and_not_when_python_looks_for_rings(runner):
    losses = []

    class Loss(pl.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            assert [earlier for earlier in losses if earlier() is not None] == []
            losses.append(weakref.ref(loss))

    gc.collect()
    gc.disable()
    try:
        runner.fit(runner.config(), [bad_steps({}), Loss()])
    finally:
        gc.enable()
    assert len(losses) == 3


def test_a_run_without_bad_steps_is_not_changed_in_one_bit(runner):
    config = runner.config("optimizer.lr=0.06", "trainer.gradient_clip_val=1.0")
    ours, without = (
        runner.fit(config, [bad_steps({})]).state_dict(),
        runner.fit(config).state_dict(),
    )
    for name, value in without.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.slow
def test_with_fp16s_loss_scaling_the_same_steps_are_skipped_as_without_us(runner):
    """PyTorch's own scaler skips a step that overflows; with ours the result is the same."""

    def half(*callbacks):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, backoff_factor=2.0**-4)
        plugin = pl.plugins.MixedPrecision("16-mixed", device="cpu", scaler=scaler)
        config = runner.config(
            *ADAMW, "trainer.max_steps=5", "trainer.gradient_clip_val=1.0", "data.batch_size=8"
        )
        method = runner.fit(config, callbacks, precision=None, plugins=[plugin])
        return method.state_dict(), math.log2(2.0**24 / scaler.get_scale()) / 4

    figures = {}
    ours, backoffs = half(bad_steps(figures))
    without, _ = half()
    assert 0 < figures["skipped_steps"] == backoffs < 5
    for name, value in without.items():
        if "running" not in name and "tracked" not in name:
            assert torch.equal(ours[name], value), name


def test_optimizers_of_one_kernel_leave_weights_alone_without_gradients():
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        layer = nn.Linear(3, 3)
        optimizer = kind(layer.parameters(), lr=0.1, weight_decay=0.5, fused=True)
        layer(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        before = copy.deepcopy([layer.state_dict(), optimizer.state_dict()])
        optimizer.zero_grad()
        optimizer.step()
        torch.testing.assert_close(
            [layer.state_dict(), optimizer.state_dict()], before, rtol=0, atol=0
        )


@pytest.fixture
def decided_on_device(monkeypatch):
    """The way of a GPU, on the CPU: the kernels of fused optimizers look at the same flag there."""
    monkeypatch.setattr(
        "moco.callbacks.bad_steps.is_decided_on_device", lambda optimizer, norm: True
    )


@pytest.mark.parametrize(
    ("variant", "bad"),
    [
        ([], [0, 2]),
        pytest.param(ADAMW, [0, 2], marks=pytest.mark.slow),
        pytest.param(["trainer.accumulate_grad_batches=2"], [3], marks=pytest.mark.slow),
        pytest.param(["method.batch_norm=split"], [1], marks=pytest.mark.slow),
    ],
    ids=["sgd", "adamw", "second of two batches", "split batch norm"],
)
def test_a_step_skipped_on_the_device_leaves_the_same_behind_as_one_that_is_waited_for(
    variant, bad, of_four_steps, runner, monkeypatch
):
    config = of_four_steps(*variant)
    poison(monkeypatch, config, *bad)
    figures = [{}, {}]
    waited = runner.fit(config, [bad_steps(figures[0])]).state_dict()
    monkeypatch.setattr(
        "moco.callbacks.bad_steps.is_decided_on_device", lambda optimizer, norm: True
    )
    ours = runner.fit(config, [bad_steps(figures[1])]).state_dict()
    assert figures[0] == figures[1] == {"skipped_steps": len(bad)}
    for name, value in waited.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.slow
def test_bad_steps_on_the_device_are_told_of_when_figures_are_logged(
    runner, monkeypatch, caplog, decided_on_device
):
    figures, told = {}, []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            told.append(figures["skipped_steps"])

    config = runner.config("trainer.max_steps=8", "method.queue_start=random")
    poison(monkeypatch, config, 1, 2, 4, 5)
    monitor = BadSteps(figures, 3, 3, lambda: "X")
    runner.fit(config, [monitor, Watch()])
    assert told == [0, 0, 2, 2, 2, 4, 4, 4]
    assert monitor.state_dict()["in_a_row"] == 0
    warnings = [
        record.getMessage()
        for record in caplog.records
        if record.name == "moco.callbacks.bad_steps"
    ]
    assert [message.split(":")[0] for message in warnings] == ["step 2 skipped", "step 5 skipped"]


def test_too_many_in_a_row_on_the_device_end_the_run_with_the_step_that_was_too_many(
    runner, monkeypatch, decided_on_device
):
    config = runner.config("trainer.max_steps=8", "method.queue_start=random")
    poison(monkeypatch, config, 1, 2, 3)
    with pytest.raises(
        RunError, match=r"in 3 steps in a row, up to step 4 .* last good checkpoint is X"
    ):
        runner.fit(config, [BadSteps({}, 3, 5, lambda: "the last good checkpoint is X")])


class Loop:
    """What BadSteps asks of Lightning's Trainer."""

    global_step, accumulate_grad_batches, precision, logger = 0, 1, "32-true", None


def test_a_loss_that_is_infinite_on_one_of_two_devices_is_skipped_on_both():
    layers = [nn.Linear(3, 1), nn.Linear(3, 1)]
    for layer, added in zip(layers, (0.0, math.inf), strict=True):
        loss = layer(torch.ones(2, 3)).sum() + added
        bad_steps({}).on_before_backward(Loop, layer, loss)
        loss.backward()
    both = zip(*(layer.parameters() for layer in layers), strict=True)
    averaged = [(one.grad + other.grad) / 2 for one, other in both]
    for layer in layers:
        for parameter, gradient in zip(layer.parameters(), averaged, strict=True):
            parameter.grad = gradient
        monitor = bad_steps({})
        monitor.on_train_start(Loop, layer)
        monitor.on_before_optimizer_step(Loop, layer, None)
        assert monitor.skipped == 1
        assert layer.weight.grad is None


def test_too_many_in_a_row_end_the_run_with_step_loss_causes_and_checkpoint(runner):
    losses = Losses()
    config = runner.config("optimizer.lr=1e30", "trainer.max_steps=20")
    with pytest.raises(RunError) as error:
        runner.fit(config, [losses, bad_steps({}, limit=3)])
    finite = [loss for loss in losses.values if math.isfinite(loss)]
    assert len(losses.values) == len(finite) + 2
    for part in (
        f"not finite in 3 steps in a row, up to step {len(losses.values) + 1} (trainer.max_bad_steps=3)",
        f"the last finite loss was {finite[-1]:.4g}. ",
        "optimizer.lr is too high",
        "bf16-mixed",
        "trainer.gradient_clip_val",
        "values in the data",
    ):
        assert part in str(error.value)
    assert str(error.value).endswith("; the last good checkpoint is X")


@pytest.mark.slow
def test_shorter_streaks_are_warned_of_once_each_and_do_not_add_up(runner, monkeypatch, caplog):
    figures = {}
    config = runner.config("trainer.max_steps=7")
    poison(monkeypatch, config, 1, 2, 4, 5)
    runner.fit(config, [bad_steps(figures, limit=3)])
    assert figures["skipped_steps"] == 4
    warnings = [
        record.getMessage()
        for record in caplog.records
        if record.name == "moco.callbacks.bad_steps"
    ]
    assert [message.split(":")[0] for message in warnings] == ["step 2 skipped", "step 5 skipped"]


def scalars(folder, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag_of(name))}


@pytest.mark.slow
def test_a_resume_in_the_middle_of_a_streak_keeps_the_count(runner, monkeypatch, tmp_path, caplog):
    def config(max_steps, limit):
        return runner.config(
            "data.batch_size=96",
            "optimizer.schedule=constant",
            f"trainer.max_steps={max_steps}",
            f"trainer.max_bad_steps={limit}",
            "trainer.log_every_n_steps=1",
            "evaluation.every_n_epochs=100",
        )

    poison(monkeypatch, config(9, 4), 1, 2, 3, 4)  # steps 2 to 5
    run(config(3, 4), tmp_path)
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"][
        "BadSteps"
    ]
    assert (state["skipped"], state["in_a_row"]) == (2, 2)
    assert json.loads((tmp_path / "metrics.json").read_text())["skipped_steps"] == 2
    with pytest.raises(
        RunError, match=r"in 4 steps in a row, up to step 5 .* last good checkpoint is .*last\.ckpt"
    ):
        run(config(9, 4), tmp_path)
    run(config(9, 5), tmp_path)  # the limit may change between a run and its continuation
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert (figures["skipped_steps"], figures["step"]) == (4, 9)
    assert math.isfinite(figures["train/loss"])
    norms = scalars(tmp_path, "train/gradient_norm")
    assert [step for step, norm in norms.items() if not math.isfinite(norm)] == [2, 3, 4, 5]
    assert scalars(tmp_path, "train/skipped_steps")[9] == 4


def test_fine_tuning_skips_bad_steps_too(tmp_path, monkeypatch):
    import moco.segmentation.pixel_losses as module
    from moco.segment import run as segment
    from tests.segmentation.shapes import draw_shapes
    from tests.segmentation.test_segment import FROM_SCRATCH, config_of

    original, calls = module.pixel_cross_entropy, iter(range(100))
    monkeypatch.setattr(
        module,
        "pixel_cross_entropy",
        lambda *args: original(*args) * (math.nan if next(calls) == 1 else 1),
    )
    shapes = draw_shapes(tmp_path / "shapes", num_train=24, num_val=4)
    segment(config_of(shapes, *FROM_SCRATCH, "trainer.max_epochs=1"), tmp_path / "run")
    figures = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (figures["skipped_steps"], figures["step"]) == (1, 3)
    assert math.isfinite(figures["train/loss"])
