"""The processors that this process may use, and how long its threads wait for one.

Linux says both in files. Elsewhere nothing is known, and nothing is changed.
"""

import logging
import os
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)

THREADS = "OMP_NUM_THREADS"
"""The environment variable from which torch, MKL and faiss take the number of their threads."""
NANOSECONDS = 1e-9
LEAST_WAITING = 0.3
"""From this share of waiting on, a machine counts as busy. On an idle one, threads hardly wait."""
MOST_USED = 0.8
"""If a run uses more than this share of the processors, it keeps them busy itself."""
LEAST_WORK = 0.3
"""Threads with less work than this, seconds in a second, tell nothing."""


def allowed_processors() -> int:
    """Return the number of processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor_quota(root: Path = Path("/")) -> float | None:
    """Return how many processors' time this process may use, as its cgroups say; None: no limit.

    A container with ``--cpus=2``, or a pod with a CPU limit, sees all processors of the machine. If
    it starts a thread for each, the kernel stops all of them for most of the time.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if path == "":
            continue
        if controllers == "":
            quotas += quotas_of_version_2(root / "sys/fs/cgroup", path)
        elif "cpu" in controllers.split(","):
            # The folder has the names of its controllers, in the order of the mount.
            for name in (controllers, "cpu"):
                quotas += quotas_of_version_1(root / "sys/fs/cgroup" / name, path)
    return min(quotas, default=None)


def quotas_of_version_2(mount: Path, path: str) -> list[float]:
    """Return the limits of a cgroup and of those above it, processors each."""
    found = []
    for folder in folders_up(mount, path):
        quota, _, period = read_line(folder / "cpu.max").partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(period) > 0:
            found.append(int(quota) / int(period))
    return found


def quotas_of_version_1(mount: Path, path: str) -> list[float]:
    """Return the limits of a cgroup of version 1 and of those above it, processors each."""
    found = []
    for folder in folders_up(mount, path):
        quota = read_line(folder / "cpu.cfs_quota_us")
        period = read_line(folder / "cpu.cfs_period_us")
        # A quota of -1 is no limit.
        if quota.isdecimal() and period.isdecimal() and int(period) > 0:
            found.append(int(quota) / int(period))
    return found


def folders_up(mount: Path, path: str) -> Iterable[Path]:
    """Return the folder of a cgroup and those above it, up to the mount.

    A container may see its own cgroup at the mount, under a path that it does not have.
    """
    inside = Path(path.lstrip("/"))
    return [mount / inside, *(mount / parent for parent in inside.parents)]


def read_line(path: Path) -> str:
    """Return the content of a small file; nothing if it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def fit_threads(environment: MutableMapping[str, str], quota: float | None, allowed: int) -> None:
    """Set the number of threads where a quota allows fewer than there are processors.

    It has to be called before torch is imported. A number that the user has set stays.

    Args:
        environment: of this process, and of those that it starts.
        quota: from `processor_quota`.
        allowed: from `allowed_processors`.
    """
    if THREADS in environment or quota is None or quota >= allowed:
        return
    number = max(1, int(quota))
    environment[THREADS] = str(number)
    log.info(
        "%d %s: this process may use %g of the machine's %d processors (%s chooses otherwise)",
        number,
        "thread" if number == 1 else "threads",
        quota,
        allowed,
        THREADS,
    )


class ProcessorTime(NamedTuple):
    """The time of some threads until now, seconds."""

    running: float
    waiting: float
    """The threads could have run, but all processors were busy."""

    def since(self, earlier: "ProcessorTime") -> "ProcessorTime":
        """Return the time between two measurements. Threads that ended meanwhile count as none."""
        running = max(self.running - earlier.running, 0.0)
        return ProcessorTime(running, max(self.waiting - earlier.waiting, 0.0))

    @property
    def waiting_share(self) -> float:
        """The share of the time in which the threads had work and no processor."""
        return self.waiting / max(self.running + self.waiting, 1e-9)


def processor_time(processes: Iterable[int | str] = ("self",)) -> ProcessorTime | None:
    """Return the time of all threads of these processes; None if the kernel does not say it.

    Args:
        processes: their numbers. Of one that has ended, nothing counts.
    """
    running = waiting = 0
    has_any = False
    for process in processes:
        threads = Path("/proc", str(process), "task")
        try:
            names = os.listdir(threads)
        except OSError:
            continue
        for name in names:
            numbers = read_line(threads / name / "schedstat").split()
            if len(numbers) == 3:
                has_any = True
                running += int(numbers[0])
                waiting += int(numbers[1])
    if not has_any:
        return None
    return ProcessorTime(running * NANOSECONDS, waiting * NANOSECONDS)


def busy_line(
    own: ProcessorTime,
    others: ProcessorTime,
    seconds: float,
    num_threads: int,
    num_processors: float,
    environment: Mapping[str, str],
) -> str | None:
    """Return what to tell the user of a machine on which other programs take the processors.

    A run that itself keeps all processors busy is no reason for a line. Neither are threads that
    wait for data, because they have no work then.

    Args:
        own: time of the threads of the process that trains.
        others: time of its loader processes.
        seconds: in which they were measured.
        num_threads: with which torch computes.
        num_processors: that the run may use.
        environment: of this process.
    """
    used = (own.running + others.running) / seconds
    is_taken = used < MOST_USED * num_processors
    # Of little work, the share says little.
    has_work = own.running + own.waiting > LEAST_WORK * seconds
    if num_threads < 2 or not has_work or not is_taken or own.waiting_share < LEAST_WAITING:
        return None
    remedy = f"{THREADS}=1 before the command is often several times as fast then"
    if THREADS in environment:
        remedy = f"a smaller {THREADS} than {environment[THREADS]} is often much faster then"
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"other programs keep this machine busy: the {num_threads} threads of this run wait for a "
        f"processor {own.waiting_share:.0%} of the time ({num_processors:g} processors{load}), and "
        f"for one another; {remedy}"
    )
