"""What is told of runs from outside: their state, and the table of a sweep, whatever became of its jobs."""

import csv
import os
import shutil
import signal
import sys

import pytest

from moco.cli import sweep_table
from moco.cli.launch import launch
from moco.cli.sweep_table import Job, as_csv, as_text, find_jobs
from moco.errors import InputError, Interrupted, RunError
from moco.runs.atomic_files import write_json
from moco.runs.folder_lock import is_locked
from moco.runs.run_folder import claimed, is_finished
from moco.runs.run_status import LOCK, read_status, state_now
from tests.conftest import run_program

CONFIG = {"resume": "auto", "seed": 0, "trainer": {"max_epochs": 2, "max_steps": -1}}


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch):
    """No queue to ask, and no job that this process is."""
    monkeypatch.setattr(sweep_table, "slurm_queue", lambda: None)
    for name in list(os.environ):
        if name.startswith("SLURM_"):
            monkeypatch.delenv(name)


def test_seeds_of_the_same_settings_have_their_mean_and_spread(tmp_path):
    def job(lr, seed, state, **figures):
        overrides = {"optimizer.lr": lr, "seed": seed}
        return Job(tmp_path / f"{lr}-{seed}", overrides, state, {}, {"epoch": 3, **figures})

    jobs = [
        job("0.1", "0", "finished", **{"knn/top1": 0.90, "train/seconds": 1230.4}),
        job("0.1", "1", "finished", **{"knn/top1": 0.92, "train/seconds": 1234.4}),
        job("0.1", "2", "running", **{"knn/top1": 0.10, "train/seconds": 3.0}),
        job("0.3", "0", "finished", **{"knn/top1": 0.50, "train/seconds": 1000.0}),
    ]
    *table, differing, order = as_text(jobs).splitlines()
    lines = [line.split("  ") for line in table]
    # The best finished job is first, and a job that still runs comes after all finished ones.
    assert [[cell.strip() for cell in line if cell.strip()] for line in lines[1:]] == [
        ["0.1", "1", "finished", "3", "0.9200", "1,234 s"],
        ["0.1", "0", "finished", "3", "0.9000", "1,230 s"],
        ["0.3", "0", "finished", "3", "0.5000", "1,000 s"],
        ["0.1", "2", "running", "3", "0.1000", "3 s"],
        ["0.1", "mean of 2", "0.9100 ± 0.0141", "1,232 s ± 3 s"],
    ]
    assert differing == "the jobs differ in optimizer.lr (0.1, 0.3); seed (0, 1, 2)"
    assert order == "sorted by kNN, the best first"


def test_jobs_without_labels_are_sorted_by_their_rank_and_without_that_by_their_loss(tmp_path):
    def job(name, **figures):
        return Job(tmp_path / name, {"method.temperature": name}, "finished", {}, figures)

    def shown(*jobs):
        *table, _, order = as_text(jobs).splitlines()
        return [line.split()[0] for line in table[1:]], table[0].split("  "), order

    ranks = [job("0.1", **{"train/loss": 1.0, "label_free/rank_me": 20.0})]
    ranks.append(job("0.2", **{"train/loss": 2.0, "label_free/rank_me": 30.0}))
    names, header, order = shown(*ranks)
    assert names == ["0.2", "0.1"]
    assert [title.strip() for title in header if title] == [
        "method.temperature", "state", "loss", "embedding rank",
    ]  # fmt: skip
    assert order.startswith("sorted by embedding rank, the best first (no labels:")
    losses = [job("0.1", **{"train/loss": 2.0}), job("0.2", **{"train/loss": 1.0})]
    names, _, order = shown(*losses)
    assert names == ["0.2", "0.1"]
    assert "losses compare only where temperature and queue size are the same" in order
    failed = Job(tmp_path, {"method.temperature": "0.3"}, "failed", {"message": "no"}, {})
    assert shown(failed, *losses)[0] == ["0.2", "0.1", "0.3"]


def test_jobs_of_which_only_the_folder_is_known_show_the_settings_that_differ(tmp_path):
    write_json(tmp_path / "x.json", {})
    for name, temperature in (("a", 0.1), ("b", 0.2)):
        config = {**CONFIG, "method": {"temperature": temperature, "name": "v2"}}
        with claimed(tmp_path / name, config):
            pass
    (tmp_path / "multirun.yaml").write_text("{}")
    jobs = find_jobs(tmp_path)
    assert [job.overrides for job in jobs] == [
        {"method.temperature": "0.1"},
        {"method.temperature": "0.2"},
    ]


def test_a_run_says_that_it_runs_and_how_it_ended(tmp_path):
    assert state_now(tmp_path) == "not started"
    with claimed(tmp_path, CONFIG):
        assert state_now(tmp_path) == "running"
        assert read_status(tmp_path)["pid"] == os.getpid()
    assert read_status(tmp_path)["state"] == "finished"
    for error, state, code in (
        (RunError("the disk is full"), "failed", 1),
        (InputError("no\nsuch image"), "failed", 2),
        (Interrupted(signal.SIGTERM, "in epoch 3"), "interrupted", 143),
        (KeyboardInterrupt(), "interrupted", 130),
        (ZeroDivisionError("division by zero"), "failed", 1),
    ):
        with pytest.raises(type(error)), claimed(tmp_path, CONFIG):
            raise error
        status = read_status(tmp_path)
        assert (status["state"], status["exit_code"]) == (state, code)
        assert status["message"] == (" ".join(str(error).split()) or "KeyboardInterrupt")


def test_a_killed_run_has_crashed(start_program, tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from moco.runs.run_folder import claimed\n"
        f"with claimed(Path({str(tmp_path)!r}), {{}}): print('there', flush=True); time.sleep(60)"
    )
    run = start_program(sys.executable, "-c", program)
    run.wait_for_output("there")
    assert is_locked(tmp_path / LOCK)
    assert state_now(tmp_path) == "running"
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert state_now(tmp_path) == "crashed"
    with claimed(tmp_path, CONFIG):  # and may begin again
        pass


def test_a_look_at_the_lock_does_not_keep_a_run_from_starting(tmp_path, monkeypatch):
    import fcntl
    import time

    with claimed(tmp_path, CONFIG):
        pass
    looking = (tmp_path / ".hydra" / "lock").open()
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr(time, "sleep", lambda seconds: looking.close())
    with claimed(tmp_path, CONFIG):
        assert state_now(tmp_path) == "running"


def elsewhere(folder, **changes):
    """As if the run's last word had come from another host, whose locks do not reach here."""
    with claimed(folder, CONFIG):
        pass
    status = (
        read_status(folder)
        | {"state": "running", "host": "elsewhere", "slurm_job_id": "5_2"}
        | changes
    )
    write_json(folder / "status.json", status)


def test_on_another_host_slurm_knows_whether_a_run_is_there(tmp_path):
    elsewhere(tmp_path)
    assert state_now(tmp_path, {"5_2": "RUNNING"}) == "running"
    assert state_now(tmp_path, {"5_3": "RUNNING"}) == "crashed"
    elsewhere(tmp_path, state="requeued")
    assert state_now(tmp_path, {"5_2": "PENDING"}) == "queued"
    assert state_now(tmp_path, {}) == "requeued"


def test_on_another_host_without_slurm_the_newest_file_tells(tmp_path):
    elsewhere(tmp_path)
    assert state_now(tmp_path) == "running"
    for path in (*tmp_path.iterdir(), tmp_path):
        os.utime(path, (0, 0))
    assert state_now(tmp_path) == "crashed"


def test_a_run_is_finished_until_it_is_to_be_longer(tmp_path):
    assert not is_finished(tmp_path, CONFIG, {})
    with claimed(tmp_path, CONFIG):
        write_json(tmp_path / "metrics.json", {"epoch": 2, "step": 44})
        assert not is_finished(tmp_path, CONFIG, {})
    assert is_finished(tmp_path, CONFIG, {})
    assert not is_finished(tmp_path, CONFIG | {"trainer": {"max_epochs": 3, "max_steps": -1}}, {})
    assert is_finished(tmp_path, CONFIG | {"trainer": {"max_epochs": 3, "max_steps": 44}}, {})
    assert not is_finished(tmp_path, CONFIG | {"seed": 1}, {})
    assert not is_finished(tmp_path, CONFIG | {"resume": None}, {})


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What `launch` leaves of a sweep of six jobs, of which two are wrong and two fail."""

    def program(config, folder):
        with claimed(folder, {"seed": config.seed}):
            if config.seed == 1:
                raise RunError("the disk is full")
            write_json(
                folder / "metrics.json",
                {"epoch": 2, "step": 44, "knn/top1": 0.9 + config.method.temperature / 10},
            )

    folder = tmp_path_factory.mktemp("launched")
    command = [
        "moco.train",
        "-m",
        "+experiment=quickstart",
        "seed=0,1",
        "method.temperature=0.1,0.2,-1",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", command)
        patch.setattr("moco.cli.launch.codes", [])
        patch.setenv("HYDRA_FULL_ERROR", "0")
        with pytest.raises(SystemExit) as ended:
            launch(program, "train")
    assert ended.value.code == 2
    return folder


@pytest.fixture
def sweep(launched, tmp_path):
    """A copy of it."""
    shutil.copytree(launched, tmp_path, dirs_exist_ok=True)
    return tmp_path / "runs" / "sweep" / "experiment-quickstart__method.temperature__seed"


@pytest.mark.slow
def test_the_table_shows_every_job_whatever_became_of_it(sweep):
    write_json(
        sweep / "method.temperature-0.2__seed-0" / "status.json",
        {"state": "running", "host": "x", "slurm_job_id": None},
    )
    os.utime(sweep / "method.temperature-0.2__seed-0" / "status.json", (0, 0))
    for path in (sweep / "method.temperature-0.2__seed-0").iterdir():
        os.utime(path, (0, 0))
    shutil.rmtree(sweep / "method.temperature-0.2__seed-1")
    with claimed(sweep / "method.temperature-0.7__seed-0", CONFIG):  # of an earlier command
        pass
    jobs = find_jobs(sweep)
    wrong = "method.temperature=-1.0: expected a number above 0"
    expected = [
        ("seed", "method.temperature", "job", "state", "epoch", "step", "kNN", "message"),
        ("0", "0.1", "", "finished", "2", "44", "0.9100", ""),
        ("0", "0.2", "", "crashed", "2", "44", "0.9200", ""),
        ("0", "-1", "", "failed", "-", "-", "-", wrong),
        ("1", "0.1", "", "failed", "-", "-", "-", "the disk is full"),
        ("1", "0.2", "", "not started", "-", "-", "-", ""),
        ("1", "-1", "", "failed", "-", "-", "-", wrong),
        ("", "", "method.temperature-0.7__seed-0", "finished", "-", "-", "-", ""),
    ]
    widths = (4, 18, 30, 11, 5, 4, 6, 50)
    assert as_text(jobs).splitlines()[: len(expected)] == [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in expected
    ]
    rows = list(csv.DictReader(as_csv(jobs).splitlines()))
    assert [row["state"] for row in rows] == [job.state for job in jobs]
    assert (rows[0]["knn/top1"], rows[3]["message"], rows[3]["exit_code"]) == (
        "0.91",
        "the disk is full",
        "1",
    )


@pytest.mark.slow
def test_a_folder_that_is_no_sweep_is_told_in_one_line(sweep):
    root, job = sweep.parents[2], sweep / "method.temperature-0.1__seed-0"
    near = f"not the folder of a sweep (-m), it has no multirun.yaml; sweeps near it, newest first: {sweep}"
    of_job, of_runs = f"{job}: {near}", f"{root}/runs: {near}"
    for folder, said in (
        (root / "runs", of_runs),
        (job, of_job),
        (root / "none", f"{root}/none: no such folder"),
    ):
        with pytest.raises(InputError) as error:
            find_jobs(folder)
        assert str(error.value) == said
    done = run_program("moco.sweep", str(job), cwd=root)
    assert (done.returncode, done.stderr) == (2, f"error: {of_job}\n")


@pytest.mark.slow
def test_jobs_with_one_value_each_and_all_choices_of_a_group_are_found_again(sweep, tmp_path):
    import yaml

    record = sweep / "multirun.yaml"
    config = yaml.safe_load(record.read_text())
    config["hydra"]["overrides"]["task"] = ["optimizer=glob(*)", "seed=range(0,2)"]
    record.write_text(yaml.safe_dump(config))
    jobs = [job for job in find_jobs(sweep) if job.state == "not started"]
    assert [job.overrides for job in jobs] == [
        {"optimizer": name, "seed": seed}
        for name in ("adamw", "lars", "sgd")
        for seed in ("0", "1")
    ]
    config["hydra"]["overrides"]["task"] = [
        "seed=interval(0,1)"
    ]  # known to an optimizing sweeper alone
    record.write_text(yaml.safe_dump(config))
    assert {job.folder.name for job in find_jobs(sweep)} == {
        path.parent.name for path in sweep.glob("*/status.json")
    }


@pytest.mark.slow
def test_a_sweep_ends_with_its_table(sweep, capsys):
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    from moco.cli.sweep_end import PrintTable
    from moco.config.parsing import CONFIG_DIR

    # As Hydra is when the last job has ended.
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        PrintTable().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(sweep)}}}))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"the sweep is done: {sweep}"
    assert lines[1].split()[:3] == ["seed", "method.temperature", "state"]
    assert [line.split()[:3] for line in lines[2:4]] == [
        ["0", "0.2", "finished"],
        ["0", "0.1", "finished"],
    ]
    assert lines[-1].startswith("next: python -m moco.sweep ")
