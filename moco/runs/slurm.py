"""A run as a job of SLURM: what the job is called, which signal ends it, and how it is queued again."""

import os
import signal
import subprocess

from moco.errors import Interrupted
from moco.runs.interrupts import ENDING


def job_id() -> str | None:
    """The name that `scontrol` and `squeue` know this job by, ``<array job>_<task>`` in an array; None outside SLURM."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def run_name() -> str | None:
    """A name for the run that a requeued job, and all tasks of an ``srun``, find again.

    None outside SLURM and in an interactive shell of an allocation, where one job holds many runs that nobody requeues.
    """
    name = job_id()
    if name is None or os.environ.get("ENVIRONMENT") == "BATCH":
        return name and f"slurm-{name}"
    if "SLURM_STEP_ID" in os.environ and "SLURM_PTY_PORT" not in os.environ:
        return f"slurm-{name}.{os.environ['SLURM_STEP_ID']}"
    return None


def under_submitit() -> bool:
    """Whether submitit has started this process, on a node of the cluster."""
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm"


def submitits_signal() -> str:
    """Name of the signal that submitit has SLURM send."""
    return os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")


def is_first_task() -> bool:
    """Whether this is the task that speaks for the job; true outside SLURM."""
    return int(os.environ.get("SLURM_PROCID", "0")) == 0


def tasks_per_node(num_nodes: int, devices: int) -> int:
    """Tasks of a job of `hydra/launcher=slurm`: on one node the training starts its own processes, on several it cannot."""
    return 1 if num_nodes == 1 else devices


def stop_signals(setting: str | None) -> tuple[int, ...]:
    """The signals that end a run in an orderly way.

    Args:
        setting: ``slurm.signal``. auto: the one that submitit or ``scripts/slurm/train.sbatch`` has SLURM send.
    """
    if setting == "auto":
        in_job = "USR1" if job_id() else None
        setting = submitits_signal() if under_submitit() else in_job
    return ENDING if setting is None else (*ENDING, signal.Signals[f"SIG{setting}"])


def requeue(interrupted: Interrupted) -> None:
    """Have SLURM queue this job again, after its scheduler's signal; the job's other tasks do nothing.

    Under submitit its own handler does it: it writes the job's pickle again and counts time-outs. SLURM sends SIGTERM as
    soon as it has agreed, to us and to the scontrol that we wait for. From here on both ignore it: this process has nothing
    left to do but to say how it ended.

    Raises:
        Interrupted: SLURM or submitit refuses; it says why.
    """
    if not is_first_task():
        return
    number_there = (
        signal.Signals[f"SIG{submitits_signal()}"]
        if under_submitit()
        else interrupted.signal_number
    )
    handler = signal.getsignal(number_there)
    for number in (
        *ENDING,
        interrupted.signal_number,
    ):  # blocking them would be for this thread alone
        signal.signal(number, signal.SIG_IGN)
    try:
        if under_submitit() and callable(handler):
            handler(number_there, None)
        else:
            subprocess.run(
                ["scontrol", "requeue", str(job_id())],
                check=True,
                capture_output=True,
                text=True,
                timeout=60,
            )
    except SystemExit:
        pass  # how submitit's handler ends when all went well
    except Exception as error:
        said = (
            error.stderr.strip()
            if isinstance(error, subprocess.CalledProcessError) and error.stderr
            else str(error)
        )
        raise Interrupted(
            interrupted.signal_number, f"{interrupted}; not queued again: {said}"
        ) from error
