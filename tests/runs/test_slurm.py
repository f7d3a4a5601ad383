"""A run as a job of SLURM, without a SLURM: names, signals, and how it is queued again."""

import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from moco.callbacks.epoch_measurement import EpochMeasurement
from moco.cli.launch import queued_again
from moco.cli.run_names import job_name, run_name, sweep_name, swept_keys
from moco.errors import InputError, Interrupted, RunError
from moco.runs.interrupts import ENDING, StopRequest, held_back, listen_early
from moco.runs.run_status import read_status, write_status
from moco.runs.slurm import run_name as job_run_name
from moco.runs.slurm import stop_signals
from tests.conftest import REPOSITORY, run_program
from tests.processes import children_of

JOB = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "ENVIRONMENT": "BATCH"}
ARRAY = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}


@pytest.fixture
def job(monkeypatch):
    """Sets the environment of a job, whatever this process runs in."""

    def set_up(**variables):
        for name in list(os.environ):
            if name.startswith(("SLURM_", "SUBMITIT_", "TORCHELASTIC_")) or name in (
                "ENVIRONMENT",
                "WORLD_SIZE",
            ):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    set_up()
    return set_up


@pytest.fixture
def same_signals():
    """Afterwards every signal is blocked and handled as before."""
    numbers = (*ENDING, signal.SIGUSR1, signal.SIGUSR2)
    mask, handlers = (
        signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        {number: signal.getsignal(number) for number in numbers},
    )
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def scontrol(folder, code=0, says=""):
    """A `scontrol` that writes its arguments to ``folder/calls``; the PATH that finds it first."""
    script = folder / "scontrol"
    script.write_text(f'#!/bin/sh\necho "$@" >>{folder}/calls\necho "{says}" >&2\nexit {code}\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return f"{folder}:{os.environ['PATH']}"


def calls(folder):
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_a_job_and_its_requeue_have_one_name(job):
    assert job_run_name() is None
    for variables, name in (
        (JOB, "slurm-7"),
        (JOB | ARRAY, "slurm-5_2"),
        (JOB | {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3"}, "slurm-7"),
        (
            {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "4"},
            "slurm-7.4",
        ),  # srun from an interactive shell
        ({"SLURM_JOB_ID": "7"}, None),  # that shell itself
        (
            {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PTY_PORT": "1"},
            None,
        ),  # srun --pty bash
    ):
        job(**variables)
        assert job_run_name() == name
        assert run_name("12:00") == (name or "12:00")


def test_torchrun_needs_a_named_folder(job):
    job(TORCHELASTIC_RUN_ID="x", WORLD_SIZE="2")
    with pytest.raises(InputError, match=r"hydra\.run\.dir=PATH"):
        run_name("12:00")


@pytest.mark.slow
def test_torchrun_without_a_named_folder_ends_in_one_line(tmp_path):
    started = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "RANK": "0"}
    done = run_program("moco.train", "+experiment=quickstart", cwd=tmp_path, **started)
    assert done.returncode == 2
    assert done.stderr == (
        "error: under torchrun all processes need the same run folder: give hydra.run.dir=PATH\n"
    )


SWEEP = ["+experiment=a,b", "seed=1", "trainer.max_epochs=5", "method.temperature=0.1,0.2"]


def test_a_sweep_keeps_its_folder_when_it_is_run_again_extended_or_made_longer():
    name = "experiment__method.temperature__seed-1"
    assert sweep_name(SWEEP) == name
    assert (
        sweep_name([*SWEEP[:2], "trainer.max_epochs=9", "method.temperature=0.1,0.2,0.4"]) == name
    )
    assert sweep_name([SWEEP[3], SWEEP[1], SWEEP[0]]) == name
    assert (
        sweep_name([*SWEEP, "optimizer.lr=0.1"])
        == "experiment__method.temperature__optimizer.lr-0.1__seed-1"
    )
    assert sweep_name([]) == "defaults"


def test_a_job_is_named_by_what_its_sweep_varies():
    swept = swept_keys(SWEEP)
    assert swept == ["experiment", "method.temperature"]
    assert (
        job_name(["+experiment=a", "seed=1", "method.temperature=0.1"], swept)
        == "experiment-a__method.temperature-0.1"
    )
    assert job_name(["seed=1"], swept_keys(["seed=1"])) == "job"


def test_names_that_do_not_hold_the_whole_text_differ_all_the_same():
    names = {job_name([f"data.root={root}"], ["data.root"]) for root in ("/a/b", "/a-b", "'/a b'")}
    assert len(names) == 3
    long = {job_name([f"data.root={'x' * 300}{end}"], ["data.root"]) for end in "ab"}
    assert len(long) == 2
    assert all(len(name) < 120 for name in long)
    for name in names | long:
        from hydra.core.override_parser.overrides_parser import OverridesParser

        path = f"runs/sweep/{name}/last.ckpt"
        assert OverridesParser.create().parse_override(f"checkpoint={path}").value() == path


def test_the_signal_is_the_one_that_submitit_or_sbatch_has_slurm_send(job):
    assert stop_signals("auto") == ENDING
    job(**JOB)
    assert stop_signals("auto") == (*ENDING, signal.SIGUSR1)
    assert stop_signals("USR2") == (*ENDING, signal.SIGUSR2)
    assert stop_signals(None) == ENDING
    job(**JOB, SUBMITIT_EXECUTOR="slurm")
    assert stop_signals("auto") == (*ENDING, signal.SIGUSR2)


def test_the_schedulers_signal_is_heard_once_and_no_second_one_breaks_the_save(same_signals):
    with StopRequest(stop_signals("USR1")) as stop:
        signal.raise_signal(signal.SIGUSR1)
        assert stop
        assert stop.wants_requeue
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)  # the time is up while the checkpoint is being written
        assert stop.signal_number == signal.SIGUSR1
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)


def test_the_schedulers_signal_counts_more_than_a_sigterm_before_it(same_signals):
    with StopRequest(stop_signals("USR2")) as stop:
        signal.raise_signal(signal.SIGTERM)
        assert not stop.wants_requeue
        signal.raise_signal(signal.SIGUSR2)
        assert stop.signal_number == signal.SIGUSR2


def test_a_stop_says_how_long_a_step_takes(same_signals, caplog):
    for seconds, words in ((None, ""), (0.2, ""), (23.4, " (a step takes about 23 s)")):
        caplog.clear()
        with StopRequest() as stop:
            stop.seconds_per_step = seconds
            signal.raise_signal(signal.SIGINT)
        assert caplog.messages == [
            f"SIGINT: stopping after this step{words}; Ctrl-C again ends without a checkpoint"
        ]


def test_a_stop_while_the_run_measures_is_said_to_come_after_that(same_signals, caplog):
    class Interrupting(EpochMeasurement):
        def measure(self, trainer, pl_module, epoch):
            signal.raise_signal(signal.SIGINT)

    monitor = Interrupting({"epoch": 3})
    trainer = SimpleNamespace(current_epoch=0, max_epochs=5, max_steps=-1, global_step=1)
    for at_start in (False, True):
        caplog.clear()
        monitor.owed = at_start
        with StopRequest() as stop:
            stop.seconds_per_step = 23.4
            hook = monitor.on_fit_start if at_start else monitor.on_train_epoch_end
            hook(trainer, None)
        assert caplog.messages == [
            "SIGINT: stopping after this measurement; Ctrl-C again ends without a checkpoint"
        ]
    with StopRequest():
        signal.raise_signal(signal.SIGINT)
    assert caplog.messages[-1].startswith("SIGINT: stopping after this step;")


def test_a_stop_can_be_asked_for_by_another_process(same_signals):
    stop = StopRequest()
    stop.request(signal.SIGTERM)
    assert stop.signal_number == signal.SIGTERM
    assert not stop.wants_requeue


def test_after_the_end_the_schedulers_signal_does_nothing(same_signals):
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    with StopRequest(stop_signals("USR1")):
        pass
    signal.raise_signal(signal.SIGUSR1)


def failing_save(number):
    with StopRequest(stop_signals("USR1")):
        signal.raise_signal(number)
        raise RunError("the disk is full")


def test_a_save_that_fails_does_not_stop_the_requeue(same_signals):
    with pytest.raises(
        Interrupted, match="failed while it was stopping: the disk is full"
    ) as raised:
        failing_save(signal.SIGUSR1)
    assert raised.value.signal_number == signal.SIGUSR1
    with pytest.raises(RunError):
        failing_save(signal.SIGTERM)


def test_an_early_signal_of_the_scheduler_ends_the_program_at_once(same_signals, monkeypatch):
    monkeypatch.setattr("moco.runs.interrupts.came_early", [])
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # as scripts/slurm/train.sbatch does
    signal.raise_signal(signal.SIGUSR1)
    with pytest.raises(Interrupted, match="before training began"):
        listen_early(stop_signals("USR1"))
    with pytest.raises(Interrupted):  # again, should an import have caught it
        listen_early(stop_signals("USR1"))
    with StopRequest(stop_signals("USR1")) as stop:
        assert stop.wants_requeue
    monkeypatch.setattr("moco.runs.interrupts.came_early", [])
    listen_early(stop_signals("USR2"))  # the config says so
    assert signal.getsignal(signal.SIGUSR1) in (signal.SIG_DFL, signal.SIG_IGN)
    with pytest.raises(Interrupted):
        signal.raise_signal(signal.SIGUSR2)


@pytest.mark.parametrize(("variables", "name"), [(JOB, "7"), (JOB | ARRAY, "5_2")])
def test_the_first_task_has_the_job_queued_again(
    variables, name, job, monkeypatch, tmp_path, same_signals
):
    monkeypatch.setenv("PATH", scontrol(tmp_path))
    job(**variables)
    ended = Interrupted(signal.SIGUSR1, "in epoch 3, step 7")
    assert (
        str(queued_again(ended, tmp_path / "run")) == "in epoch 3, step 7; the job is queued again"
    )
    assert calls(tmp_path) == [f"requeue {name}"]
    status = read_status(tmp_path / "run")
    assert (status["state"], status["exit_code"], status["slurm_job_id"]) == ("requeued", 138, name)


def test_other_tasks_and_other_signals_requeue_nothing(job, monkeypatch, tmp_path, same_signals):
    monkeypatch.setenv("PATH", scontrol(tmp_path))
    job(**JOB | {"SLURM_PROCID": "1"})
    queued_again(Interrupted(signal.SIGUSR1, "in epoch 3"), tmp_path / "run")
    job(**JOB)
    ended = Interrupted(
        signal.SIGTERM, "in epoch 3"
    )  # preempted, cancelled or requeued by somebody who decides himself
    assert queued_again(ended, tmp_path / "run") is ended
    assert calls(tmp_path) == []
    assert not (tmp_path / "run").exists()


def test_a_requeue_that_slurm_refuses_is_told(job, monkeypatch, tmp_path, same_signals):
    monkeypatch.setenv(
        "PATH",
        scontrol(tmp_path, code=1, says="Requested operation is presently disabled for job 7"),
    )
    job(**JOB)
    write_status(tmp_path, "interrupted")
    said = queued_again(Interrupted(signal.SIGUSR1, "in epoch 3"), tmp_path)
    assert (
        str(said)
        == "in epoch 3; not queued again: Requested operation is presently disabled for job 7"
    )
    assert read_status(tmp_path)["state"] == "interrupted"
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))  # in a container without SLURM's commands
    assert "not queued again: [Errno 2] No such file" in str(
        queued_again(Interrupted(signal.SIGUSR1, ""), tmp_path)
    )


def test_under_submitit_its_own_handler_does_it(job, monkeypatch, tmp_path, same_signals):
    received = []

    def handler(number, frame):
        received.append(number)
        sys.exit(-1)

    monkeypatch.setenv("PATH", scontrol(tmp_path))
    job(**JOB, SUBMITIT_EXECUTOR="slurm")
    signal.signal(signal.SIGUSR2, handler)
    assert str(queued_again(Interrupted(signal.SIGUSR2, "in epoch 3"))).endswith(
        "the job is queued again"
    )
    assert received == [signal.SIGUSR2]
    assert calls(tmp_path) == []


def test_submitits_refusal_is_told_too(job, tmp_path, same_signals):
    refusal = pytest.importorskip("submitit.core.utils").UncompletedJobError

    def handler(number, frame):
        raise refusal("Job not requeued because: timed-out too many times.")

    job(**JOB, SUBMITIT_EXECUTOR="slurm")
    signal.signal(signal.SIGUSR2, handler)
    assert "not queued again: Job not requeued because: timed-out" in str(
        queued_again(Interrupted(signal.SIGUSR2, ""))
    )


@pytest.fixture
def start_job(start_program, tmp_path):
    """Start a training in the environment of a job."""

    def start(*arguments):
        command = [sys.executable, "-m", "moco.train", "+experiment=quickstart", *arguments]
        return start_program(*command, cwd=tmp_path, PATH=scontrol(tmp_path), **JOB)

    return start


@pytest.mark.slow
def test_a_job_saves_on_its_signal_and_is_queued_again_once(start_job, tmp_path):
    run = start_job("method.queue_size=200", "evaluation.baselines=false")
    run.wait_for_output("epoch    1/")
    for _ in range(3):
        run.signal_group(signal.SIGUSR1)
        time.sleep(0.05)
    folder = tmp_path / "runs" / "quickstart" / "slurm-7"
    assert run.wait() == 128 + signal.SIGUSR1, run.errors()
    error = run.errors()
    assert error.startswith("interrupted: in epoch ")
    assert error.endswith("; the job is queued again\n")
    assert error.count("\n") == 1
    assert calls(tmp_path) == ["requeue 7"]
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    assert read_status(folder)["state"] == "requeued"


def test_loader_workers_leave_the_schedulers_signals_to_the_training_process():
    from moco.data.loading.workers import CPU, loader_options

    loader_options(1, CPU)
    (server,) = children_of(os.getpid(), "forkserver")
    status = Path(f"/proc/{server}/status").read_text()
    (blocked,) = re.findall(r"^SigBlk:\s*(\w+)", status, flags=re.MULTILINE)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        assert int(blocked, 16) >> (number - 1) & 1, signal.Signals(number).name


@pytest.mark.slow
def test_a_signal_in_the_first_moment_is_not_lost(start_job, tmp_path):
    with held_back([signal.SIGUSR1]):  # as scripts/slurm/train.sbatch does
        run = start_job()
    run.send_signal(signal.SIGUSR1)
    assert run.wait() == 128 + signal.SIGUSR1, run.errors()
    error = run.errors()
    assert error == "interrupted: before training began; nothing to save; the job is queued again\n"
    assert calls(tmp_path) == ["requeue 7"]


def test_without_the_extra_the_launcher_says_what_to_install(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "sys.modules['hydra_plugins.hydra_submitit_launcher'] = None\n"
        "sys.modules['submitit'] = None\n"
    )
    command = ["-m", "hydra/launcher=slurm", "+experiment=quickstart", "seed=0,1"]
    done = run_program("moco.train", *command, cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{REPOSITORY}")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: hydra/launcher=slurm needs another package: pip install -e '{REPOSITORY}[slurm]'\n"
    )


@pytest.mark.slow
def test_without_slurm_the_launcher_says_so(tmp_path):
    pytest.importorskip("submitit")
    command = [
        "-m",
        "hydra/launcher=slurm",
        "+experiment=quickstart",
        "seed=0,1",
        "hydra.launcher.partition=gpu",
    ]
    done = run_program("moco.train", *command, cwd=tmp_path, PATH=str(tmp_path))
    assert done.returncode == 2
    assert "srun" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_launcher_is_found_beside_a_users_own_configs(tmp_path):
    pytest.importorskip("submitit")
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 3\n")
    command = ["--config-dir", "own", "hydra/launcher=slurm", "+experiment=mine", "--cfg", "hydra"]
    done = run_program("moco.train", *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "_target_: hydra_plugins.moco_slurm.SlurmLauncher" in done.stdout


def test_the_sbatch_script_passes_everything_on():
    script = (Path(REPOSITORY) / "scripts" / "slurm" / "train.sbatch").read_text()
    assert '"$@"' in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
