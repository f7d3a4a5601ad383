"""How much memory a piece of code takes at its highest point (Linux).

getrusage's ru_maxrss can't say it: it covers the life of the process, and a child starts with the
peak of the process that started it. The kernel's VmHWM belongs to the program alone and can be
set back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# The first lines of a child's program: it prints its own peak in kB when it ends.
PRINT_PEAK = """
import atexit, sys
def print_peak():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    print("peak", status["VmHWM"].split()[0], file=sys.stderr)
atexit.register(print_peak)
"""


def status(field: str) -> int:
    """Return a field of this process's memory, such as VmRSS or VmHWM, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields[field].split()[0])


@contextmanager
def memory_within(kilobytes: int) -> Iterator[None]:
    """Check that the code inside never holds more than this on top of what is held now."""
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is held now
    before = status("VmRSS")
    yield
    peak = status("VmHWM") - before
    assert peak < kilobytes, f"{peak} kB on top of {before} kB; the bound is {kilobytes} kB"
