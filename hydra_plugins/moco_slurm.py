"""``hydra/launcher=slurm``: a sweep's jobs as one array, each job's end told in one line, and the first failure's code kept.

Hydra finds plugins in this namespace only. Without the extra ``slurm`` there is none here.
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
except ImportError:
    SubmititLauncher = Launcher

log = logging.getLogger("moco.slurm")

# A signal that comes before Python can take it would kill the process; blocked, it waits until moco.cli.launch lets it in.
# The env of older systems cannot do that.
START = 'env --block-signal=USR2 true 2>/dev/null && exec env --block-signal=USR2 "$0" "$@"; exec "$0" "$@"'
QUEUE_SECONDS = 10.0
"""Between two questions to SLURM; a job that ended as planned leaves a result, which is noticed within a second."""
QUESTIONS = 4
"""So often in a row SLURM must not know a job that has left no result: a network file system may show it late."""


class SlurmLauncher(SubmititLauncher):
    """Submits through submitit and waits for all jobs, whatever becomes of the others."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        set_up_logging()
        jobs = self.submit(job_overrides, initial_job_idx)
        sweep = self.config.hydra.sweep.dir
        log.info("submitted %d jobs; a table of them: python -m moco.sweep %s", len(jobs), sweep)
        swept = swept_keys(self.config.hydra.overrides.task)
        names = [
            f"job {job.job_id}, {job_name(overrides, swept)}"
            for job, overrides in zip(jobs, job_overrides, strict=True)
        ]
        results: dict[int, JobReturn | Failure] = {}
        try:
            for number in ended(jobs):
                result = outcome(jobs[number], self.folder(job_overrides[number]))
                tell(names[number], result)
                results[number] = result
        except KeyboardInterrupt as interrupt:
            array = jobs[0].job_id.split("_")[0]
            said = f"the jobs go on without this command; scancel {array} ends them"
            raise Interrupted(signal.SIGINT, said) from interrupt
        in_order = [results[number] for number in range(len(jobs))]
        codes.extend(result.code for result in in_order if isinstance(result, Failure))
        return [result for result in in_order if isinstance(result, JobReturn)]

    def submit(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
        """Submitit's jobs, one for each combination."""
        from submitit import AutoExecutor

        settings = dict(self.params)
        executor = AutoExecutor(
            settings.pop("submitit_folder"),
            cluster="slurm",
            slurm_max_num_timeout=settings.pop("max_num_timeout"),
        )
        shared = {item.name for item in dataclasses.fields(BaseQueueConf)}
        executor.update_parameters(
            slurm_srun_args=["sh", "-c", START],
            **{key if key in shared else f"slurm_{key}": value for key, value in settings.items()},
        )
        numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
        calls = [
            (
                list(overrides),
                "hydra.sweep.dir",
                number,
                f"job_id_for_{number}",
                Singleton.get_state(),
            )
            for overrides, number in zip(job_overrides, numbers, strict=True)
        ]
        return executor.map_array(self, *zip(*calls, strict=True))

    def folder(self, overrides: Sequence[str]) -> Path:
        """The run folder of a job."""
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        return Path(config.hydra.sweep.dir, config.hydra.sweep.subdir)


def ended(jobs: Sequence[Any]) -> Iterator[int]:
    """The numbers of the jobs, each as it ends: it has left its results, or is gone without, see `QUESTIONS`."""
    missing = dict.fromkeys(range(len(jobs)), 0)
    asked = time.monotonic()
    while missing:
        for number in [
            number
            for number in missing
            if has_results(jobs[number]) or missing[number] >= QUESTIONS
        ]:
            del missing[number]
            yield number
        time.sleep(1)
        if time.monotonic() - asked < QUEUE_SECONDS:
            continue
        queue = slurm_queue()
        asked = time.monotonic()
        if queue is not None:
            missing = {
                number: 0 if jobs[number].job_id in queue else missing[number] + 1
                for number in missing
            }


def has_results(job: Any) -> bool:
    tasks = [job.task(number) for number in range(job.num_tasks)]
    # Listed, not asked for by name: a network file system remembers for a while that a name was not there.
    there = {path.name for path in tasks[0].paths.folder.glob("*.pkl")}
    return all(task.paths.result_pickle.name in there for task in tasks)


def outcome(job: Any, folder: Path) -> JobReturn | Failure:
    """What a job that has ended returned, or with what it failed; `folder` is its run's."""
    if has_results(job):
        if error := job.exception():
            return Failure(1, str(error).splitlines()[-1])
        result = job.results()[0]
        return result.return_value if isinstance(result.return_value, Failure) else result
    status = read_status(folder)
    if status and status["slurm_job_id"] == job.job_id and status["exit_code"]:
        return Failure(status["exit_code"], f"{status['state']}: {status['message']}")
    return Failure(
        1,
        f"ended without a word: killed, or its node failed; its log is {job.task(0).paths.stdout}",
    )


def tell(name: str, result: JobReturn | Failure) -> None:
    if isinstance(result, Failure):
        print(printable(f"{name}: {result.line}"), file=sys.stderr)
    else:
        log.info("%s: finished", name)
