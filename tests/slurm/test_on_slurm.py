"""Jobs of a real SLURM: a sweep with its table, and preempted jobs that end in the same bits."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moco.runs.run_status import read_status
from moco.training.board_layout import tag_of
from tests.conftest import REPOSITORY, run_program
from tests.processes import started, wait_until

pytestmark = pytest.mark.slurm

ENVIRONMENT = {
    "PYTHONPATH": str(REPOSITORY),
    "OMP_NUM_THREADS": "1",
    "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
}
EPOCH = 22  # steps of 64 of the 1,437 digits
EPOCHS = 8
LONG = [
    "+experiment=quickstart",
    "method.queue_size=200",
    "data.engine=worker",
    f"trainer.max_epochs={EPOCHS}",
    "trainer.log_every_n_steps=1",
    "evaluation.every_n_epochs=4",
    "evaluation.baselines=false",
    "checkpoint.every_n_epochs=100",
]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Use the SLURM of `local_slurm.sh`, or any one if MOCO_TEST_SLURM=required."""
    required = os.environ.get("MOCO_TEST_SLURM") == "required"
    is_there = (
        shutil.which("scontrol")
        and b"ClusterName" in slurm("scontrol", "show", "config", check=False).encode()
    )
    if not is_there and required:
        pytest.fail("MOCO_TEST_SLURM=required, and there is no SLURM")
    if not is_there:
        pytest.skip("there is no SLURM here; tests/slurm/local_slurm.sh starts one")
    is_own = "moco-test" in slurm("scontrol", "show", "config")
    if not required and not is_own:
        pytest.skip(
            "this SLURM is not the tests' own; MOCO_TEST_SLURM=required uses it all the same"
        )
    yield
    for name in ("moco", "train") if is_own else ():  # elsewhere a user may have jobs of such names
        slurm("scancel", "--quiet", "--me", f"--name={name}", check=False)


def slurm(*command, check=True, cwd=None):
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
    return done.stdout


def state_of(job):
    return slurm(
        "squeue", "--noheader", "--array", f"--jobs={job}", "--format=%T", check=False
    ).strip()


def epochs_in(log):
    return (
        len(re.findall(r"^epoch +\d+/", log.read_text(), flags=re.MULTILINE)) if log.exists() else 0
    )


def started_now(job):
    """Whether the job runs; SLURM would let a requeued one wait for two minutes."""
    if state_of(job) == "PENDING":
        slurm("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
        time.sleep(0.5)
    return state_of(job) == "RUNNING"


def preempt(job, log, ways):
    """End the job in the middle of an epoch in each of the ways, and let it begin again at once."""
    for number, way in enumerate(ways):
        before = epochs_in(log)
        wait_until(lambda before=before: epochs_in(log) > before, f"an epoch of {job} in {log}")
        time.sleep(0.2 + 0.3 * number)  # some steps into the next epoch
        slurm(*way, job)
        wait_until(lambda: state_of(job) == "PENDING", f"{job} to be queued again")
        wait_until(lambda: started_now(job), f"{job} to run again")
    wait_until(lambda: state_of(job) in ("", "COMPLETED"), f"the end of {job}")


def last(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@contextmanager
def waiting_sweep(cwd, *arguments):
    """Run a sweep by the launcher into ``cwd/sweep``; yield the command that waits for it."""
    options = ["hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.sweep.dir=sweep"]
    command = [sys.executable, "-m", "moco.train", "-m", *options, *arguments]
    with started(*command, cwd=cwd, **ENVIRONMENT) as program:
        yield program


def submitted_job(cwd, program):
    """Return the id and the log of the launcher's only job."""
    folder = cwd / "sweep" / ".submitit"
    (pickle,) = program.wait_for(lambda: list(folder.glob("*/*_submitted.pkl")), "the job")
    job = pickle.parent.name
    return job, pickle.parent / f"{job}_0_log.out"


@pytest.fixture(scope="module")
def preempted(tmp_path_factory):
    """The same training by sbatch and twice by the launcher; one of the two is undisturbed."""
    cwd = tmp_path_factory.mktemp("preempted")
    with ExitStack() as stack, ThreadPoolExecutor() as threads:
        by_sbatch = threads.submit(submit_and_preempt, cwd)
        sweep = stack.enter_context(waiting_sweep(cwd, *LONG, "data.num_workers=0,1"))
        logs = cwd / "sweep" / ".submitit"
        (folder,) = sweep.wait_for(lambda: list(logs.glob("*_1")), "the array")
        ways = (("scancel", "--signal=USR2"), ("scontrol", "requeue"), ("scancel", "--signal=USR2"))
        preempt(folder.name, folder / f"{folder.name}_0_log.out", ways)
        code = sweep.wait()
        yield cwd, by_sbatch.result(), (code, sweep.output(), sweep.errors())


def submit_and_preempt(cwd):
    """The job's id, and its log."""
    job = submit(cwd, *LONG, "data.num_workers=0")
    ways = (("scancel", "--signal=USR1"), ("scontrol", "requeue"), ("scancel", "--signal=USR1"))
    preempt(job, cwd / "log", ways)
    return job, (cwd / "log").read_text()


def submit(cwd, *arguments, options=()):
    """The id of a job of the sbatch script, with its log in ``cwd/log``."""
    script = REPOSITORY / "scripts" / "slurm" / "train.sbatch"
    command = (
        "sbatch",
        "--parsable",
        "--cpus-per-task=1",
        "--output=log",
        *options,
        str(script),
        *arguments,
    )
    return slurm(*command, cwd=cwd).strip()


def test_preempted_jobs_end_in_the_same_bits(preempted):
    cwd, (job, _), _ = preempted
    undisturbed = last(cwd / "sweep" / "data.num_workers-0")
    assert undisturbed["global_step"] == EPOCHS * EPOCH
    for folder in (
        cwd / "sweep" / "data.num_workers-1",
        cwd / "runs" / "quickstart" / f"slurm-{job}",
    ):
        disturbed = last(folder)
        assert disturbed["global_step"] == EPOCHS * EPOCH
        assert "queue.keys" in disturbed["state_dict"]
        for name, value in undisturbed["state_dict"].items():
            assert torch.equal(value, disturbed["state_dict"][name]), name
        states = (end["optimizer_states"][0]["state"].values() for end in (undisturbed, disturbed))
        for one, other in zip(*states, strict=True):
            assert torch.equal(one["momentum_buffer"], other["momentum_buffer"])
        assert torch.equal(
            undisturbed["random_states"][0]["torch"], disturbed["random_states"][0]["torch"]
        )
        for key in ("knn/top1", "train/loss"):
            assert undisturbed["figures"][key] == disturbed["figures"][key]


def test_each_preemption_met_an_epoch_in_its_middle_and_was_followed_by_one_requeue(preempted):
    cwd, (job, log), _ = preempted
    assert "Restarts=3" in slurm("scontrol", "show", "job", job)
    (folder,) = (cwd / "sweep" / ".submitit").glob("*_1")
    assert "Restarts=3" in slurm("scontrol", "show", "job", folder.name)
    logs = {"sbatch": log, "launcher": (folder / f"{folder.name}_0_log.out").read_text()}
    for text in logs.values():
        steps = [
            int(step)
            for step in re.findall(
                r"^interrupted: in epoch \d+, step (\d+)", text, flags=re.MULTILINE
            )
        ]
        assert len(steps) == 3
        assert all(step % EPOCH for step in steps)
        assert (
            text.count("; the job is queued again") == 2
        )  # by us or submitit; the third time by scontrol requeue


def test_curves_go_on_in_one_line(preempted):
    cwd, (job, _), _ = preempted
    for folder in (
        cwd / "sweep" / "data.num_workers-1",
        cwd / "runs" / "quickstart" / f"slurm-{job}",
    ):
        events = EventAccumulator(str(folder))
        events.Reload()
        assert [event.step for event in events.Scalars(tag_of("train/loss"))] == list(
            range(1, EPOCHS * EPOCH + 1)
        )


def test_the_waiting_command_outlives_preemptions(preempted):
    _, _, (code, output, error) = preempted
    assert (code, error) == (0, "")
    assert re.findall(r"job \d+_(\d), data.num_workers-(\d): finished", output) == [
        ("0", "0"),
        ("1", "1"),
    ]


def test_a_sweep_tells_of_every_job_and_its_table_shows_them(tmp_path):
    command = [
        "-m",
        "hydra/launcher=slurm",
        "hydra.launcher.cpus_per_task=1",
        "+experiment=quickstart",
        "seed=0,1",
        "method.temperature=0.1,-1",
        "trainer.max_steps=2",
        "evaluation.baselines=false",
    ]
    done = run_program("moco.train", *command, cwd=tmp_path, **ENVIRONMENT)
    assert done.returncode == 2
    assert re.fullmatch(
        r"(job \d+_[13], method\.temperature--1__seed-[01]: error: method\.temperature=-1\.0: expected a number above 0\n){2}",
        done.stderr,
    )
    (sweep,) = (tmp_path / "runs" / "sweep").iterdir()
    assert (
        sweep.name == "evaluation.baselines-False__experiment-quickstart__method.temperature__seed"
    )
    table = run_program("moco.sweep", str(sweep), "--csv", "table.csv", cwd=tmp_path, **ENVIRONMENT)
    assert table.returncode == 0, table.stderr
    heading, *lines, differing, order = table.stdout.splitlines()
    assert heading.split()[:3] == ["seed", "method.temperature", "state"]
    rows = [line.split()[:3] for line in lines]
    # The better of the finished jobs comes first; the kNN of two steps decides which one that is.
    assert sorted(rows[:2]) == [["0", "0.1", "finished"], ["1", "0.1", "finished"]]
    assert rows[2:] == [["0", "-1", "failed"], ["1", "-1", "failed"], ["mean", "of", "2"]]
    assert differing == "the jobs differ in seed (0, 1); method.temperature (0.1, -1)"
    assert order == "sorted by kNN, the best first"
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [(row["state"], row["exit_code"], row["step"]) for row in rows] == [
        ("finished", "0", "2"),
        ("failed", "2", ""),
        ("finished", "0", "2"),
        ("failed", "2", ""),
    ]
    assert all(0.5 < float(row["knn/top1"]) <= 1 for row in rows if row["state"] == "finished")
    before = last(sweep / "method.temperature-0.1__seed-0")
    again = run_program("moco.train", *command, cwd=tmp_path, **ENVIRONMENT)
    assert again.returncode == 2
    logs = [path.read_text() for path in (sweep / ".submitit").glob("*/*_log.out")]
    assert sum("is finished; a larger trainer.max_epochs goes on" in log for log in logs) == 2
    assert last(sweep / "method.temperature-0.1__seed-0")["global_step"] == before["global_step"]


def test_a_job_that_is_cancelled_is_told_of_with_its_signals_code(tmp_path):
    """Without accounting, submitit's own launcher would wait for ever."""
    with waiting_sweep(tmp_path, *LONG, "trainer.max_epochs=500", "seed=0") as sweep:
        job, log = submitted_job(tmp_path, sweep)
        sweep.wait_for(lambda: epochs_in(log) > 0, "an epoch")
        slurm("scancel", job)
        assert sweep.wait() == 128 + signal.SIGTERM, sweep.errors()
        assert re.fullmatch(
            rf"job {job}, job: interrupted: in epoch \d+, step \d+; saved .*\n", sweep.errors()
        )


TOGETHER = [*LONG, "trainer.max_epochs=3", "evaluation.every_n_epochs=3"]


def check_preempted_once(job, log, folder):
    assert log.count("interrupted: ") == log.count("; the job is queued again") == 1
    assert "ExitCode=0:0" in slurm("scontrol", "show", "job", job)
    assert "Restarts=1" in slurm("scontrol", "show", "job", job)
    assert read_status(folder)["state"] == "finished"
    assert last(folder)["global_step"] == 3 * EPOCH
    assert len(last(folder)["random_states"]) == 2


def test_the_tasks_of_a_job_stop_at_one_step_and_the_first_requeues(tmp_path):
    job = submit(tmp_path, *TOGETHER, options=["--ntasks-per-node=2"])
    preempt(job, tmp_path / "log", [("scancel", "--signal=USR1")])
    check_preempted_once(
        job, (tmp_path / "log").read_text(), tmp_path / "runs" / "quickstart" / f"slurm-{job}"
    )


def test_two_nodes_train_together_by_sbatch_and_by_the_launcher_to_the_same_bits(tmp_path):
    assert len(slurm("sinfo", "--noheader", "--Node").splitlines()) > 1, (
        "this SLURM has one node only"
    )
    job = submit(tmp_path, *TOGETHER, options=["--nodes=2"])
    assert "NumNodes=2" in slurm("scontrol", "show", "job", job)
    preempt(job, tmp_path / "log", [("scancel", "--signal=USR1")])
    by_sbatch = tmp_path / "runs" / "quickstart" / f"slurm-{job}"
    check_preempted_once(job, (tmp_path / "log").read_text(), by_sbatch)

    with waiting_sweep(tmp_path, *TOGETHER, "trainer.num_nodes=2") as sweep:
        job, log = submitted_job(tmp_path, sweep)
        preempt(job, log, [("scancel", "--signal=USR2")])
        assert sweep.wait() == 0, sweep.errors()
        assert sweep.errors() == ""
    by_launcher = tmp_path / "sweep" / "job"
    check_preempted_once(job, log.read_text(), by_launcher)
    one, other = last(by_sbatch), last(by_launcher)
    assert all(
        torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items()
    )
