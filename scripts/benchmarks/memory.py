"""Measure the peak memory of some work, in a process of its own."""

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.turns import LeftOut

STATUS = Path("/proc/self/status")
SCRIPTS = Path(__file__).resolve().parent.parent


def peak_mib(work: Callable[[], Any]) -> float:
    """Return the most memory that `work` adds to this process, MiB.

    The allocator returns nothing to the system that it took before. getrusage does not serve here:
    its peak includes the parent's peak and cannot be reset.
    """
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present value
    before = resident_mib("VmRSS")
    work()
    return resident_mib("VmHWM") - before


def resident_mib(field: str) -> float:
    """Return this process's memory in MiB: ``VmRSS`` is the present value, ``VmHWM`` the peak."""
    return int(re.findall(rf"{field}:\s+(\d+) kB", STATUS.read_text())[0]) / 1024


def limit_memory(share: float = 0.7) -> None:
    """Let this process allocate at most this share of the free memory.

    An allocation then fails before the machine runs out of memory.
    """
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    resource.setrlimit(resource.RLIMIT_DATA, (int(share * free), resource.RLIM_INFINITY))


def in_child(arguments: Sequence[str], num_threads: int) -> Mapping[str, float]:
    """Run ``benchmark.py ARGUMENTS`` in a process; return its last line, which is JSON.

    Raises:
        LeftOut: there was not enough memory.
    """
    command = [sys.executable, str(SCRIPTS / "benchmark.py"), *arguments]
    command += ["--threads", str(num_threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode and "allocate memory" in done.stderr:
        raise LeftOut("not enough memory")
    done.check_returncode()
    return json.loads(done.stdout.splitlines()[-1])
