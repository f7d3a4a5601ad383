"""A machine that gives out, for real: one line says what happened and what to do."""

import contextlib
import errno
import json
import os
import re
import resource
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from moco.errors import RunError
from moco.methods.moco import MoCo
from moco.runs.atomic_files import write_json
from moco.runs.failures import explained, failures_named, failures_without_training_named
from moco.train import run
from moco.training.logger import RunLogger
from tests.processes import children_of


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
        (
            fill_shared_memory,
            "the loader processes have used up the shared memory; .*docker run --shm-size",
        ),
        (
            lose_the_disk,
            r"in a loader process, OSError: \[Errno 5\] Input/output error: '/data/x.png'",
        ),
        (run_out_of_memory, "the machine is out of memory; fewer data.num_workers"),
    ],
)
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


@pytest.fixture
def with_a_checkpoint(runner):
    """A config whose run writes its first checkpoint after one epoch of five steps."""

    def config(*overrides):
        return runner.config(
            "data.batch_size=240",
            "trainer.max_epochs=4",
            "trainer.max_steps=-1",
            "checkpoint.every_n_epochs=1",
            "evaluation.every_n_epochs=100",
            *overrides,
        )

    return config


def before_step(step, action, monkeypatch):
    """Call `action` once, when the run has done that many optimizer steps."""
    called = []

    def on_train_batch_start(self, batch, batch_idx):
        if self.trainer.global_step == step and not called:
            called.append(step)
            action()

    monkeypatch.setattr(MoCo, "on_train_batch_start", on_train_batch_start)


def kill_loader_process():
    """Kill the training's only loader process, which its fork server has forked."""
    (server,) = children_of(os.getpid(), "forkserver")
    (loader,) = children_of(server)
    os.kill(loader, signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_loader_process_ends_the_run_with_the_checkpoint_intact(
    with_a_checkpoint, tmp_path, monkeypatch
):
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    before_step(6, kill_loader_process, monkeypatch)
    with pytest.raises(RunError) as caught:
        run(with_a_checkpoint("data.engine=worker", "data.num_workers=1"), tmp_path)
    assert re.fullmatch(
        r"a loader process was ended from outside, mostly by the kernel .* use fewer "
        r"data\.num_workers .*; it was reading digits: train_images\[\d+\]; .*"
        rf"the last good checkpoint is {checkpoint}",
        str(caught.value),
    )
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 5


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_the_checkpoint_intact(
    with_a_checkpoint, tmp_path, monkeypatch
):
    """A limit on the size of files stands for the full disk: a write meets the same error."""
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before_step(6, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard)), monkeypatch)
    try:
        with pytest.raises(RunError) as caught:
            run(with_a_checkpoint(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == (
        "[Errno 27] File too large; raise the limit on the size of files (ulimit -f) and start "
        f"again; in the run {tmp_path}; the last good checkpoint is {checkpoint}"
    )
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["message"] == str(caught.value)
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 5
    assert not list(checkpoint.parent.glob(".*"))
