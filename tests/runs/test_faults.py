"""Steps without finite gradients against a plain loop that leaves them out; machines that give out, for real."""

import contextlib
import copy
import errno
import gc
import json
import math
import os
import re
import resource
import signal
import tempfile
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from moco.cli.build_pretraining import build_data
from moco.data.loading.datamodule import PretrainingData
from moco.errors import RunError
from moco.runs.faults import BadSteps, explained, failures_named, failures_without_training_named
from moco.runs.run_folder import write_json
from moco.train import run
from moco.training.logger import RunLogger
from tests.methods.test_moco import Losses
from tests.runs.test_interrupts import start

# The large eps keeps rounding errors of gradients near zero (a bias before BatchNorm) from becoming whole steps.
ADAMW = [
    "optimizer=adamw", "optimizer.warmup_epochs=0", "optimizer.lr_for_batch_size=null", "optimizer.eps=1",
]  # fmt: skip


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
    """MoCo in a plain loop that takes a copy of everything before a step, and goes back to it if its loss is not finite.

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
    # At a ReLU's kink rounding decides between two gradients; without kinks two orders of the same sums stay together.
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
    [([], [1]), ([], [0, 2]), (ADAMW, [0, 2]), (["trainer.accumulate_grad_batches=2"], [3]), (["method.queue_size=20"], [2])],
    ids=["sgd", "sgd, from the first step", "adamw", "in the second of two batches", "a batch larger than the queue"],
)  # fmt: skip
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


def test_an_infinite_loss_with_finite_gradients_is_left_out_too(of_four_steps, runner, monkeypatch):
    import moco.methods.moco as module

    def spoil(number):
        return math.inf if number == 2 else 0.0

    config, original, calls, figures = of_four_steps(), module.info_nce, iter(range(4)), {}
    expected = plain_run(runner.method(config), config, 4, spoil)
    monkeypatch.setattr(module, "info_nce", lambda *args: original(*args) + spoil(next(calls)))
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


def test_with_fp16s_loss_scaling_the_same_steps_are_left_out_as_without_us(runner):
    """PyTorch's own scaler leaves out a step that overflows; ours must come to the same and leave it its records."""

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
    monkeypatch.setattr("moco.runs.faults.is_decided_on_device", lambda optimizer, norm: True)


@pytest.mark.parametrize(
    ("variant", "bad"),
    [([], [0, 2]), (ADAMW, [0, 2]), (["trainer.accumulate_grad_batches=2"], [3]), (["method.batch_norm=split"], [1])],
    ids=["sgd", "adamw", "in the second of two batches", "split batch norm"],
)  # fmt: skip
def test_a_step_left_out_on_the_device_leaves_the_same_behind_as_one_that_is_waited_for(
    variant, bad, of_four_steps, runner, monkeypatch
):
    config = of_four_steps(*variant)
    poison(monkeypatch, config, *bad)
    figures = [{}, {}]
    waited = runner.fit(config, [bad_steps(figures[0])]).state_dict()
    monkeypatch.setattr("moco.runs.faults.is_decided_on_device", lambda optimizer, norm: True)
    ours = runner.fit(config, [bad_steps(figures[1])]).state_dict()
    assert figures[0] == figures[1] == {"skipped_steps": len(bad)}
    for name, value in waited.items():
        assert torch.equal(ours[name], value), name


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
        record.getMessage() for record in caplog.records if record.name == "moco.runs.faults"
    ]
    assert warnings == [
        f"step {step} left out: its loss or gradients are not finite" for step in (2, 5)
    ]


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


def test_a_loss_that_is_infinite_on_one_of_two_devices_is_left_out_on_both():
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
        "optimizer.lr too high", "bf16-mixed", "trainer.gradient_clip_val", "values in the data",
    ):  # fmt: skip
        assert part in str(error.value)
    assert str(error.value).endswith("; the last good checkpoint is X")


def test_shorter_streaks_are_warned_of_once_each_and_do_not_add_up(runner, monkeypatch, caplog):
    figures = {}
    config = runner.config("trainer.max_steps=7")
    poison(monkeypatch, config, 1, 2, 4, 5)
    runner.fit(config, [bad_steps(figures, limit=3)])
    assert figures["skipped_steps"] == 4
    warnings = [
        record.getMessage() for record in caplog.records if record.name == "moco.runs.faults"
    ]
    assert warnings == [
        f"step {step} left out: its loss or gradients are not finite" for step in (2, 5)
    ]


def scalars(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_a_resume_in_the_middle_of_a_streak_keeps_the_count(runner, monkeypatch, tmp_path, caplog):
    def config(max_steps, limit):
        return runner.config(
            "data.batch_size=96", "optimizer.schedule=constant", f"trainer.max_steps={max_steps}",
            f"trainer.max_bad_steps={limit}", "trainer.log_every_n_steps=1", "evaluation.every_n_epochs=100",
        )  # fmt: skip

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


def test_fine_tuning_leaves_bad_steps_out_too(tmp_path, monkeypatch):
    import moco.segmentation.segmenter as module
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


class Failing(Dataset):
    """Fails in the loader process."""

    def __init__(self, fail):
        self.fail = fail

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.fail()


def first_batch(loader):
    batches = iter(loader)
    try:
        return next(batches)
    finally:
        batches._shutdown_workers()  # left to the garbage collector, the processes take 5 s to end


def end_with_signal():
    os.kill(os.getpid(), signal.SIGKILL)


def fill_shared_memory():
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY)
    )  # also of files in shared memory
    return torch.zeros(100_000)


def lose_the_disk():
    raise OSError(errno.EIO, os.strerror(errno.EIO), "/data/x.png")


def run_out_of_memory():
    return np.empty(1 << 50)


@pytest.mark.parametrize(
    ("fail", "said"),
    [
        (end_with_signal, "a loader process was ended from outside, .* use fewer data.num_workers"),
        (fill_shared_memory, "the loader processes have used up the shared memory; .*docker run --shm-size"),
        (lose_the_disk, r"in a loader process, OSError: \[Errno 5\] Input/output error: '/data/x.png'"),
        (run_out_of_memory, "the machine is out of memory; fewer data.num_workers"),
    ],
)  # fmt: skip
def test_what_happens_to_a_loader_process_is_said_in_one_line(fail, said, tmp_path):
    loader = DataLoader(Failing(fail), 4, num_workers=1, multiprocessing_context="fork")
    with (
        pytest.raises(RunError, match=f"^{said}.*; there is no checkpoint yet$"),
        failures_named(tmp_path),
    ):
        first_batch(loader)


def divide_by_zero():
    return 1 / 0


def break_a_rule():
    raise RuntimeError("a defect")


@pytest.mark.parametrize("fail", [divide_by_zero, break_a_rule])
def test_a_defect_in_a_loader_process_keeps_its_traceback(fail, tmp_path):
    loader = DataLoader(Failing(fail), 4, num_workers=1, multiprocessing_context="fork")
    with (
        pytest.raises((RuntimeError, ZeroDivisionError), match=f"in {fail.__name__}") as caught,
        failures_named(tmp_path),
    ):
        first_batch(loader)
    assert not isinstance(caught.value, RunError)


def write_to_a_full_disk():
    with open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")


def save_to_a_full_disk():
    with open("/dev/full", "wb") as file:
        torch.save({"w": torch.zeros(100_000)}, file)


def open_too_many_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(100):
                stack.enter_context(open(os.devnull))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("fail", "said"),
    [
        (
            write_to_a_full_disk,
            r"\[Errno 28\] No space left on device; free some space and start again; in the run ",
        ),
        (
            save_to_a_full_disk,
            r"\[Errno 28\] No space left on device; free some space and start again; in the run ",
        ),
        (open_too_many_files, "too many files are open; raise the limit with 'ulimit -n"),
        (run_out_of_memory, "the machine is out of memory; "),
        (lambda: torch.empty(1 << 50), "the machine is out of memory; "),
    ],
)
def test_a_machine_that_gives_out_is_named_with_what_to_do(fail, said, tmp_path):
    with (
        pytest.raises(RunError, match=f"^{said}.*; there is no checkpoint yet$"),
        failures_named(tmp_path),
    ):
        fail()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"
        ),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_full_gpu_is_told_by_its_words(error):
    assert explained(error).startswith("the GPU is out of memory; a smaller data.batch_size, more ")


def test_encoders_that_cannot_be_compiled_are_told_how_to_do_without():
    from torch._inductor.exc import InductorError

    for error in (
        torch._dynamo.exc.BackendCompilerFailed(lambda: None, RuntimeError("no kernel"), None),
        InductorError(AssertionError("mix order reduction"), None),
    ):
        assert (
            explained(error)
            == "torch.compile fails at these encoders; trainer.compile=false does without"
        )


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("DataLoader worker (pid 7) exited unexpectedly; it was reading {a}.png"),
    ],
)
def test_without_training_only_settings_that_are_there_are_named(error):
    with (
        pytest.raises(RunError) as caught,
        failures_without_training_named("evaluation.batch_size"),
    ):
        raise error
    said = str(caught.value)
    assert "a smaller evaluation.batch_size" in said
    assert "data.batch_size" not in said
    assert "trainer." not in said
    assert "{a}.png" in said or "{" not in said


@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("x"), RunError("x")],
)
def test_what_is_no_sign_of_a_weak_machine_passes_as_it_is(error, tmp_path):
    with pytest.raises(type(error)) as caught, failures_named(tmp_path):
        raise error
    assert caught.value is error


def test_a_run_folder_that_may_not_be_written_is_named_even_if_its_checkpoints_cannot_be_seen():
    with tempfile.TemporaryDirectory() as name:
        folder, user = Path(name), os.geteuid()
        if user == 0:
            os.seteuid(65534)  # permissions do not stop root
        else:
            folder.chmod(0)
        try:
            with pytest.raises(RunError) as error, failures_named(folder):
                write_json(folder / "metrics.json", {})
        finally:
            os.seteuid(user)
            folder.chmod(0o700)
    said = str(error.value)
    assert re.match(
        rf"\[Errno 13\] Permission denied: '{name}\S*'; make it writable for you and start again",
        said,
    )
    assert said.endswith(f"; its checkpoints are in {name}/checkpoints, which cannot be read now")


def draw_noise(logger):
    for step in range(3):
        logger.experiment.add_image("noise", torch.rand(3, 500, 500), step)  # 750 kB
        logger.save()


def test_a_disk_that_fills_up_under_tensorboard_is_named_and_its_threads_traceback_is_not_shown(
    tmp_path, capfd
):
    logger = RunLogger(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with (
            pytest.raises(RunError, match=r"^\[Errno 27\] File too large; "),
            failures_named(tmp_path),
        ):
            draw_noise(logger)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capfd.readouterr().err == ""


def children(process):
    return Path(f"/proc/{process}/task/{process}/children").read_text().split()


def loader_process(program):
    """The process id of a running program's loader: what its fork server has forked."""
    commands = {child: Path(f"/proc/{child}/cmdline").read_text() for child in children(program)}
    (server,) = [child for child, command in commands.items() if "forkserver" in command]
    (loader,) = children(server)
    return int(loader)


def wait_for_checkpoint(process, checkpoint):
    while not checkpoint.is_file():
        assert process.poll() is None
        time.sleep(0.05)


def test_a_loader_process_that_the_kernel_ends_ends_the_run_in_one_line_with_the_checkpoint_intact(
    tmp_path,
):
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    with start(
        "run",
        "data.engine=worker",
        "data.num_workers=1",
        "evaluation.every_n_epochs=100",
        cwd=tmp_path,
    ) as process:
        wait_for_checkpoint(process, checkpoint)
        os.kill(loader_process(process.pid), signal.SIGKILL)
        stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert re.fullmatch(
        r"failed: a loader process was ended from outside, mostly by the kernel .* use fewer data\.num_workers .*; "
        r"it was reading digits: train_images\[\d+\]; .*"
        rf"the last good checkpoint is {checkpoint}\n",
        stderr,
    )
    assert torch.load(checkpoint, weights_only=True)["global_step"] >= 22


def test_a_full_disk_ends_the_run_in_one_line_with_the_checkpoint_intact(tmp_path):
    """A limit on the size of files stands for the disk: what a write meets is the same."""
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    with start("run", "evaluation.every_n_epochs=100", cwd=tmp_path) as process:
        wait_for_checkpoint(process, checkpoint)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
        stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert stderr == (
        "failed: [Errno 27] File too large; raise the limit on the size of files (ulimit -f) and start again; "
        f"in the run {tmp_path / 'run'}; the last good checkpoint is {checkpoint}\n"
    )
    assert (
        f"failed: {json.loads((tmp_path / 'run' / 'status.json').read_text())['message']}\n"
        == stderr
    )
    assert torch.load(checkpoint, weights_only=True)["global_step"] >= 22
    assert not list(checkpoint.parent.glob(".*"))
