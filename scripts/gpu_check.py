"""Check and measure everything that needs a GPU, in one command of minutes.

    python -m scripts.gpu_check [PART ...] [--output runs/gpu_check] [--minutes 9]
        [--npz cifar10.npz] [--against official=PATH] [--again PART ['PART: CASE*' ...]]
    python -m scripts.gpu_check --rehearse
    python -m scripts.gpu_check --write-docs runs/gpu_check

Parts: tests, waits, resume, step, loss, knn, data, end_to_end, speed_run. By default all of them
run, the most important first. Each has a process of its own and a share of the time. The same
command continues with the cases that did not fit into the time.

The folder gets a JSON file and a log for each part, gpu_check.json with all results, and
gpu_check.md with the tables. To continue on another machine, gpu_check.json is enough.

Nothing is downloaded. If a peer is not installed, its row says so. Without --npz, the speed run
trains on images that the script makes. --rehearse runs everything at tiny sizes on the CPU.
--write-docs adds the tables to docs/gpu.md.

Exit codes: 0 done, or out of time; 1 something failed, and its row has the error; 2 bad input, or
no GPU.
"""

import argparse
import fnmatch
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# The parent must not use the GPU, because its forked processes could then not use it. With this
# setting, PyTorch asks the management library of the driver whether there is a GPU.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
# The benchmarks import each other from this folder, as in `python scripts/benchmark.py`.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from benchmarks.machine import describe
from benchmarks.peers import peers_of
from gpu_parts import measuring, tables
from gpu_parts.results import FAILED, MEASURED, Folder, PartFile
from gpu_parts.rows import FULL, PARTS, TINY_SIZES, Sizes, rows, rows_of

from moco.errors import InputError, unknown_name

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE, KEPT = REPOSITORY / "docs" / "gpu.md", REPOSITORY / "docs" / "gpu.json"
REPORT = "gpu_check.md"

SHARES = {
    "tests": 0.12,
    "waits": 0.12,
    "resume": 0.12,
    "step": 0.40,
    "loss": 0.08,
    "knn": 0.10,
    "data": 0.06,
    "end_to_end": 0.20,
    "speed_run": 0.25,
}
"""The share of the whole time that a part may take in the first round. Most need much less."""
LEAST_SECONDS = dict.fromkeys(PARTS, 15.0) | {"step": 30.0, "end_to_end": 40.0, "speed_run": 100.0}
"""A part does not start with less time."""
LOOK_SECONDS = 120.0
FORKED_TOO_LATE = 76
"""Exit code of a part whose process cannot use the GPU because its parent has used it."""


def main(arguments: list[str] | None = None) -> None:
    """Run the check; exit with one of the codes in the module's docstring."""
    given = parsed(arguments)
    try:
        if given.write_docs:
            count = tables.write_docs(given.write_docs, PAGE, KEPT, rows(FULL))
            page = PAGE.relative_to(REPOSITORY)
            print(f"{count} of {len(rows(FULL))} rows of {page} have a figure")
            return
        with ended_by_signals():
            has_failed = check(given)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if has_failed:
        sys.exit(1)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="only these parts")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="folder of the results")
    parser.add_argument("--minutes", type=minutes, default=9.0, help="time limit")
    parser.add_argument("--again", nargs="+", default=[], metavar="PATTERN", help="measure again")
    parser.add_argument("--npz", metavar="FILE", help="images of the speed run")
    parser.add_argument(
        "--against", action="append", default=[], metavar="official=PATH", help="a checkout"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="everything at tiny sizes, on the CPU"
    )
    parser.add_argument("--write-docs", type=Path, metavar="FOLDER", help="fill docs/gpu.md")
    return parser.parse_args(arguments)


def minutes(text: str) -> float:
    """Return a number of minutes from the command line, above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above 0")
    return value


@contextmanager
def ended_by_signals() -> Any:
    """Let SIGTERM end this process as an exception does, so that it ends its children first."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check(given: argparse.Namespace) -> bool:
    """Measure what is missing and write the tables; return whether anything failed.

    Raises:
        InputError: the command line names something that does not exist.
    """
    started = time.monotonic()
    for part in given.parts:
        if part not in PARTS:
            raise InputError(unknown_name("part", part, PARTS))
    if given.npz and not Path(given.npz).is_file():
        raise InputError(f"--npz {given.npz}: no such file")
    peers = peers_of([]) | (peers_of(given.against) if given.against else {})
    sizes = TINY_SIZES if given.rehearse else FULL
    machine = look("cpu" if given.rehearse else "cuda")
    output = given.output or Path("runs", "gpu_check_rehearsal" if given.rehearse else "gpu_check")
    folder = Folder(output, list(PARTS), given.rehearse)
    folder.of_machine(machine)
    forget(given.again, folder, sizes)
    device = torch.device("cpu" if given.rehearse else "cuda")
    context = measuring.Context(device, sizes, peers, scratch=Path(), npz=given.npz)
    run = Run(folder, context, started + 60 * given.minutes, 60 * given.minutes)
    run.all_parts(given.parts or list(PARTS))
    has_failed = any(result["state"] == FAILED for result in folder.results())
    print(f"written: {folder.path / REPORT}")
    return has_failed


def look(device_type: str) -> dict[str, Any]:
    """Return the description of this machine; a process of its own finds it out.

    Raises:
        InputError: no GPU can be used.
    """
    here, there = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = started_process("fork", look_in_child, (there, device_type))
    there.close()
    found: dict[str, Any] | str = "it does not answer"
    with suppress(EOFError):
        if here.poll(LOOK_SECONDS):
            found = here.recv()
    end_group(process)
    if isinstance(found, str):
        raise InputError(
            "no CUDA device can be used here; --rehearse tries everything on the CPU, at tiny "
            f"sizes ({found})"
        )
    return found


def look_in_child(connection: Connection, device_type: str) -> None:
    """Send the description of the machine, or why there is no GPU in one line."""
    device = torch.device(device_type)
    try:
        if device_type == "cuda":
            torch.cuda.init()
            torch.zeros(1, device=device)
        found: dict[str, Any] | str = describe(device, torch.get_num_threads())
    except Exception as error:
        found = measuring.one_line(error)
    else:
        if device_type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            found |= {
                "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version(),
                "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            }
    connection.send(found)


def forget(patterns: Sequence[str], folder: Folder, sizes: Sizes) -> None:
    """Drop the results that will be measured again.

    Args:
        patterns: patterns of ``part`` or ``part: case``, with the wildcards of file names.

    Raises:
        InputError: a pattern matches nothing.
    """
    for pattern in patterns:
        fits_any = False
        for part, file in folder.parts.items():
            cases = {row.case for row in rows_of(part, sizes)}
            if not fnmatch.fnmatchcase(part, pattern):
                cases = {case for case in cases if fnmatch.fnmatchcase(f"{part}: {case}", pattern)}
            if cases:
                fits_any = True
                file.forget(cases)
        if not fits_any:
            choices = ", ".join(PARTS)
            raise InputError(
                f"--again {pattern}: it matches no part and no 'part: case' ({choices})"
            )


class Run:
    """Runs the parts, each in a process of its own, until the time is over.

    Args:
        folder: the folder of the results.
        context: given to the parts; each also gets a scratch folder.
        deadline: the end, as a value of `time.monotonic`.
        seconds: the time from the start to the deadline.
    """

    def __init__(
        self,
        folder: Folder,
        context: measuring.Context,
        deadline: float,
        seconds: float,
    ) -> None:
        self.folder = folder
        self.context = context
        self.deadline = deadline
        self.seconds = seconds
        self.method = "fork"  # a forked process needs no imports, which take seconds

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def all_parts(self, parts: Sequence[str]) -> None:
        """Give each part its share, then the rest of the time to those that need more."""
        missing = []
        for part in PARTS:
            if part not in parts:
                continue
            file = self.folder.parts[part]
            if file.is_complete:
                print(f"{part}: done before, {counts(file)}", flush=True)
            else:
                missing.append(part)
        for part in missing:
            measuring.load(part)
        if len(missing) > 1:
            for part in missing:
                self.one_part(part, max(SHARES[part] * self.seconds, LEAST_SECONDS[part]))
        for part in missing:
            if not self.folder.parts[part].is_complete:
                self.one_part(part, self.seconds_left)
        self.write()

    def one_part(self, part: str, share: float) -> None:
        """Run a part until it is done or its time is over."""
        file = self.folder.parts[part]
        limit = min(share, self.seconds_left)
        if limit < LEAST_SECONDS[part] and not self.context.is_rehearsal:
            file.content["out_of_time"] = True
            file.write()
            print(f"{part}: no time left, the same command continues with it", flush=True)
            return
        begun = time.monotonic()
        while not file.is_complete and time.monotonic() < begun + limit:
            status = self.one_process(part, begun + limit - time.monotonic())
            file.read()
            if status is None:
                break
            if status == FORKED_TOO_LATE and self.method == "fork":
                self.method = "spawn"
            elif status != 0:
                note_crash(file, rows_of(part, self.context.sizes), status)
        file.content["seconds"] += time.monotonic() - begun
        file.content["out_of_time"] = not file.is_complete
        file.write()
        self.write()
        print(f"{part}: {counts(file)}, {time.monotonic() - begun:.0f} s", flush=True)

    def one_process(self, part: str, limit: float) -> int | None:
        """Measure the missing cases of a part in a new process.

        Returns:
            The exit status, or None if the process was killed after `limit` seconds.
        """
        file = self.folder.parts[part]
        file.content["running"] = None  # a new process starts without a case
        file.write()
        with tempfile.TemporaryDirectory(prefix=f"gpu_check_{part}_") as scratch:
            context = replace(self.context, scratch=Path(scratch))
            process = started_process(self.method, part_in_child, (part, file, context))
            try:
                process.join(limit)
                return process.exitcode
            finally:
                end_group(process)

    def write(self) -> None:
        """Write the merged file, and the tables as Markdown."""
        content = self.folder.merge()
        (self.folder.path / REPORT).write_text(tables.report(rows(self.context.sizes), content))


def started_process(method: str, work: Any, arguments: tuple[Any, ...]) -> BaseProcess:
    """Start a process as the first of a new process group."""
    context = multiprocessing.get_context(method)
    process = context.Process(target=in_own_group, args=(work, arguments))
    with warnings.catch_warnings():
        # Python 3.12 warns of threads, which libraries start at import. They do nothing yet, and
        # hold no locks.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    return process


def in_own_group(work: Any, arguments: tuple[Any, ...]) -> None:
    """Start a process group, so that this process can be killed with all its children."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    work(*arguments)


def end_group(process: BaseProcess) -> None:
    """Kill a process with all its children, such as loader processes or compilers."""
    assert process.pid is not None
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.is_alive():  # it had no group of its own yet
        process.kill()
    process.join()


def part_in_child(part: str, file: PartFile, context: measuring.Context) -> None:
    """Run a part in its own process; its output goes to its log."""
    with file.log.open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 (as long as the process)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    # Child processes of the part find the same packages.
    paths = [str(REPOSITORY), str(REPOSITORY / "scripts"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if context.device.type == "cuda":
        try:
            torch.cuda.init()
        except RuntimeError as error:
            if "forked" in str(error):
                os._exit(FORKED_TOO_LATE)
            raise
    measuring.run_part(part, file, context)


def note_crash(file: PartFile, of_part: list[Any], status: int) -> None:
    """Add failed rows for the case that a process measured when it ended by itself.

    If it measured none, all cases that are missing have failed.
    """
    running = file.content["running"]
    error = RuntimeError(f"its process ended with status {status}, see {file.log.name}")
    if running is None:
        lost = [row for row in of_part if row.case not in file.cases]
    else:
        lost = [row for row in of_part if row.case == running]
    file.finish([measuring.failed(row, error) for row in lost])
    if running is None:
        file.content["complete"] = True


def counts(file: PartFile) -> str:
    """Return how many rows are in which state, in words."""
    states = [row["state"] for row in file.rows]
    words = [f"{states.count(MEASURED)} rows measured"]
    if FAILED in states:
        words.append(f"{states.count(FAILED)} failed")
    if not file.is_complete:
        words.append("the others have no time left")
    return ", ".join(words)


if __name__ == "__main__":
    main()
