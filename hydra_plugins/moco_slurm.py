"""``hydra/launcher=slurm``: the submitit launcher, with a wait that notices every end of a job.

Hydra finds plugins in this namespace only. What the submitit launcher (1.2) lacks, and
tests/slurm/test_on_slurm.py holds: one line for each job that ends, the exit code of the first that
failed, and the end of a job that was killed. On a cluster without accounting (``sacct``) submitit
waits for a killed job for ever.
"""

import dataclasses
import logging
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher

from moco.cli.launch import Failure, codes
from moco.cli.log_setup import set_up_logging
from moco.cli.run_names import job_name, swept_keys
from moco.errors import Interrupted, printable
from moco.runs.run_status import read_status, slurm_queue

try:
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import (
        SlurmLauncher as SubmititLauncher,
    )
except ImportError:  # without the extra "slurm"
    SubmititLauncher = Launcher

log = logging.getLogger("moco.slurm")

QUEUE_SECONDS = 10.0
"""Between two questions to SLURM. A job's result is noticed within a second."""
QUESTIONS = 4
"""SLURM must not know a job in this many questions in a row before its result counts as missing.

A network file system may show the result late.
"""


class SlurmLauncher(SubmititLauncher):
    """Submits a sweep's jobs as one array, and waits until all of them have ended."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        set_up_logging()
        jobs = self.submit(job_overrides, initial_job_idx)
        sweep = self.config.hydra.sweep.dir
        log.info("submitted %d jobs; a table of them: python -m moco.sweep %s", len(jobs), sweep)
        swept = swept_keys(self.config.hydra.overrides.task)
        results: dict[int, JobReturn | Failure] = {}
        try:
            for number in ended(jobs):
                overrides = list(job_overrides[number])
                result = outcome(jobs[number], self.run_folder(overrides))
                report(f"job {jobs[number].job_id}, {job_name(overrides, swept)}", result)
                results[number] = result
        except KeyboardInterrupt as interrupt:
            array = jobs[0].job_id.split("_")[0]
            message = f"the jobs go on without this command; scancel {array} ends them"
            raise Interrupted(signal.SIGINT, message) from interrupt
        returned = []
        for number in range(len(jobs)):
            result = results[number]
            if isinstance(result, Failure):
                codes.append(result.code)
            else:
                returned.append(result)
        return returned

    def submit(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
        """Submit the jobs as the submitit launcher does; return submitit's handles of them."""
        from submitit import AutoExecutor

        settings = dict(self.params)
        executor = AutoExecutor(
            settings.pop("submitit_folder"),
            cluster="slurm",
            slurm_max_num_timeout=settings.pop("max_num_timeout"),
        )
        # Submitit's names for what only SLURM has begin with "slurm_".
        shared = {field.name for field in dataclasses.fields(BaseQueueConf)}
        parameters = {}
        for name, value in settings.items():
            parameters[name if name in shared else f"slurm_{name}"] = value
        executor.update_parameters(**parameters)
        jobs = []
        state = Singleton.get_state()
        with executor.batch():
            for number, overrides in enumerate(job_overrides, start=initial_job_idx):
                arguments = (list(overrides), "hydra.sweep.dir", number, f"job_id_for_{number}")
                jobs.append(executor.submit(self, *arguments, state))
        return jobs

    def run_folder(self, overrides: Sequence[str]) -> Path:
        """Return the run folder of the job with these overrides."""
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        return Path(config.hydra.sweep.dir, config.hydra.sweep.subdir)


def ended(jobs: Sequence[Any]) -> Iterator[int]:
    """Yield the number of each job when it has ended: with a result, or gone without one."""
    times_missing = dict.fromkeys(range(len(jobs)), 0)
    asked_at = time.monotonic()
    while times_missing:
        for number in list(times_missing):
            if has_result(jobs[number]) or times_missing[number] >= QUESTIONS:
                del times_missing[number]
                yield number
        time.sleep(1)
        if time.monotonic() - asked_at < QUEUE_SECONDS:
            continue
        asked_at = time.monotonic()
        queue = slurm_queue()
        if queue is None:
            continue
        for number in times_missing:
            if jobs[number].job_id in queue:
                times_missing[number] = 0
            else:
                times_missing[number] += 1


def has_result(job: Any) -> bool:
    """Return whether every task of the job has left its result."""
    # The folder is listed because a network file system remembers for a while that a file that was
    # asked for by name did not exist.
    names = {path.name for path in job.task(0).paths.folder.glob("*.pkl")}
    expected = {job.task(number).paths.result_pickle.name for number in range(job.num_tasks)}
    return expected <= names


def outcome(job: Any, folder: Path) -> JobReturn | Failure:
    """Return what a job that has ended returned, or how it failed.

    Args:
        job: submitit's handle.
        folder: the job's run folder.
    """
    if has_result(job):
        error = job.exception()
        if error is not None:
            return Failure(1, str(error).splitlines()[-1])
        result = job.results()[0]
        # The program returns a Failure for a mistake that it has reported itself.
        return result.return_value if isinstance(result.return_value, Failure) else result
    status = read_status(folder)
    if status and status["slurm_job_id"] == job.job_id and status["exit_code"]:
        return Failure(status["exit_code"], f"{status['state']}: {status['message']}")
    path = job.task(0).paths.stdout
    return Failure(1, f"ended without a result: killed, or its node failed; its log is {path}")


def report(name: str, result: JobReturn | Failure) -> None:
    """Print how a job has ended, in one line."""
    if isinstance(result, Failure):
        print(printable(f"{name}: {result.line}"), file=sys.stderr)
    else:
        log.info("%s: finished", name)
