"""A run as a job of SLURM: the job's name, the signal that ends it, and how it is queued again."""

import os
import signal
import subprocess

from moco.errors import Interrupted
from moco.runs.interrupts import ENDING


def job_id() -> str | None:
    """Return the id that `scontrol` and `squeue` use for this job; None outside SLURM.

    In a job array it is ``<id of the array>_<task>``.
    """
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def run_name() -> str | None:
    """Return a name for the run that a requeued job and all tasks of an ``srun`` find again.

    None outside SLURM, and in an interactive shell of an allocation: there one job holds many runs,
    and nobody requeues it.
    """
    name = job_id()
    if name is None:
        return None
    if os.environ.get("ENVIRONMENT") == "BATCH":
        return f"slurm-{name}"
    is_step = "SLURM_STEP_ID" in os.environ
    is_shell = "SLURM_PTY_PORT" in os.environ
    if is_step and not is_shell:
        return f"slurm-{name}.{os.environ['SLURM_STEP_ID']}"
    return None


def under_submitit() -> bool:
    """Return whether submitit has started this process on a node of the cluster."""
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm"


def submitits_signal() -> str:
    """Return the name of the signal that SLURM sends for submitit, such as ``USR2``."""
    return os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")


def is_first_task() -> bool:
    """Return whether this task speaks for the whole job; true outside SLURM."""
    return int(os.environ.get("SLURM_PROCID", "0")) == 0


def tasks_per_node(num_nodes: int, devices: int) -> int:
    """Return how many tasks `hydra/launcher=slurm` asks for on each node.

    On one node, one task starts a process per device. On several nodes SLURM has to start them.
    """
    return 1 if num_nodes == 1 else devices


def stop_signals(setting: str | None) -> tuple[int, ...]:
    """Return the signals that end a run after its step.

    Args:
        setting: ``slurm.signal``. With ``auto`` it is the signal that submitit or
            ``scripts/slurm/train.sbatch`` tells SLURM to send.
    """
    if setting == "auto":
        if under_submitit():
            setting = submitits_signal()
        elif job_id():
            setting = "USR1"
        else:
            setting = None
    if setting is None:
        return ENDING
    return (*ENDING, signal.Signals[f"SIG{setting}"])


def requeue(interrupted: Interrupted) -> None:
    """Queue this job again after its scheduler's signal. The job's other tasks do nothing.

    Raises:
        Interrupted: SLURM or submitit refuses; the message says why.
    """
    if not is_first_task():
        return
    submitits_number = signal.Signals[f"SIG{submitits_signal()}"]
    submitits_handler = signal.getsignal(submitits_number)
    # SLURM sends SIGTERM as soon as it has agreed, to this process and to the scontrol for which
    # it waits. Both ignore it: only the run's ending is left to write. A blocked signal would not
    # do, because the mask is one thread's own.
    for ignored in (*ENDING, interrupted.signal_number):
        signal.signal(ignored, signal.SIG_IGN)
    try:
        if under_submitit() and callable(submitits_handler):
            # It writes the job's pickle again, counts time-outs, and requeues the job.
            submitits_handler(submitits_number, None)
        else:
            command = ["scontrol", "requeue", str(job_id())]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    except SystemExit:
        pass  # submitit's handler ends the process when it has requeued the job
    except Exception as error:
        reason = str(error)
        if isinstance(error, subprocess.CalledProcessError) and error.stderr:
            reason = error.stderr.strip()
        message = f"{interrupted}; not queued again: {reason}"
        raise Interrupted(interrupted.signal_number, message) from error
