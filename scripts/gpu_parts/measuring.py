"""Measure one part of the check, case by case; each case is written as soon as it is done."""

import dataclasses
import gc
import importlib
import logging
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from benchmarks import turns
from benchmarks.memory import peak_mib
from benchmarks.nets import Net, Setting
from benchmarks.peers import Peers
from benchmarks.turns import Case, LeftOut, Turn, wait_for

from gpu_parts.results import ABSENT, FAILED, MEASURED, PartFile, Result
from gpu_parts.rows import LIGHTLY, OFFICIAL, Row, Sizes, rows_of
from moco.training.hardware import choose_precision

MODULES = {
    "tests": "cuda_tests",
    "waits": "waits",
    "resume": "resume",
    "step": "steps",
    "loss": "losses",
    "knn": "neighbors",
    "data": "augmentation",
    "end_to_end": "trainings",
    "speed_run": "speed_run",
}
"""By part, the module with its ``measure(case, context)``, which returns a list of results."""

MEASURES_MEMORY = Path("/proc/self/clear_refs").exists()
"""Whether the peak memory of a CPU can be measured, see `benchmarks.memory`."""
LONGEST_LINE = 200
ABSENT_PEERS = {LIGHTLY: "not installed", OFFICIAL: "no checkout given"}


@dataclasses.dataclass(frozen=True)
class Context:
    """What a part measures with."""

    device: torch.device
    sizes: Sizes
    peers: Peers
    scratch: Path
    """An empty folder, removed after the part."""
    npz: str | None = None
    """An archive with the images of the speed run."""

    @property
    def is_rehearsal(self) -> bool:
        return self.device.type == "cpu"

    def setting(self, net: Net) -> Setting:
        """Return precision and memory format that a training of the net has by default."""
        precision = "fp32"
        if not self.is_rehearsal and choose_precision("auto", self.device) == "bf16-mixed":
            precision = "bf16"
        memory_format = "channels_last" if net.has_batch_norm else "contiguous"
        return Setting(self.device, precision, memory_format)


class Unmet(Exception):
    """A measurement shows that something is wrong."""


def load(part: str) -> Any:
    """Return the module of a part."""
    return importlib.import_module(f"gpu_parts.{MODULES[part]}")


def run_part(part: str, file: PartFile, context: Context) -> None:
    """Measure the cases of a part that are not done; runs in the part's own process."""
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    if context.is_rehearsal:
        torch.set_num_threads(1)
    module = load(part)
    rows = rows_of(part, context.sizes)
    for case in cases_left(rows, file):
        file.begin(case)
        print(f"=== {case}", flush=True)
        try:
            found = module.measure(case, context)
        except Exception as error:
            traceback.print_exc(file=sys.stdout)
            found = [failed(row, error) for row in rows if row.case == case]
        file.finish(with_absent(rows, case, found))
        free_memory()
    file.content["complete"] = True
    file.write()


def cases_left(rows: list[Row], file: PartFile) -> list[str]:
    """Return the cases without results; those that an earlier start did not finish go last."""
    cases = list(dict.fromkeys(row.case for row in rows))
    left = [case for case in cases if case not in file.cases]
    return sorted(left, key=file.attempts)


def free_memory() -> None:
    """Free the memory of the last case, with its compiled code."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def with_absent(rows: list[Row], case: str, found: list[Result]) -> list[Result]:
    """Return a result for each row of a case, also for peers that did not take part."""
    by_contender = {result["contender"]: result for result in found}
    results = []
    for row in rows:
        if row.case == case:
            absent = result_of(row, ABSENT, note=ABSENT_PEERS.get(row.contender, "left out"))
            results.append(by_contender.get(row.contender, absent))
    return results


def result_of(row: Row, state: str, **more: Any) -> Result:
    return {"case": row.case, "contender": row.contender, "unit": row.unit, "state": state, **more}


def measured(case: str, contender: str, unit: str, value: float, **more: Any) -> Result:
    names = {"case": case, "contender": contender, "unit": unit}
    return {**names, "state": MEASURED, "value": value, **more}


def failed(row: Row, error: BaseException) -> Result:
    return result_of(row, FAILED, error=one_line(error))


def one_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    said = str(error).strip().splitlines() or [""]
    name = "" if isinstance(error, Unmet) else f"{type(error).__name__}: "
    line = f"{name}{said[0]}".removesuffix(": ")
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 4]} ..."


class Watched:
    """Notes the failures, the memory and the start of contenders. A failure stops no other one.

    Args:
        device: that computes.
        is_prepared: a turn brings its own warm-up. Otherwise each contender has turns that do not
            count when it is built. In the first, libraries choose their kernels and code is
            compiled: the ``start_seconds``. In the others the peak memory is looked at.
    """

    def __init__(self, device: torch.device, is_prepared: bool) -> None:
        self.device = device
        self.is_prepared = is_prepared
        self.errors: dict[str, BaseException] = {}
        self.details: dict[str, dict[str, float]] = {}

    def watch(self, name: str, build: Callable[[], Turn]) -> Callable[[], Turn]:
        """Return the contender in a form that raises `LeftOut` for every error."""

        def guarded(work: Callable[[], Any]) -> Any:
            try:
                return work()
            except Exception as error:
                traceback.print_exc(file=sys.stdout)
                self.errors[name] = without_frames(error)
            # Outside of the handler, because the frames of the error held the contender's memory.
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            raise LeftOut("failed, see the log")

        def watched() -> Turn:
            print(f"--- {name}", flush=True)
            turn = guarded(lambda: self._prepared(name, build))
            return lambda: guarded(turn)

        return watched

    def _prepared(self, name: str, build: Callable[[], Turn]) -> Turn:
        if self.is_prepared:
            return build()
        before = held() if self.device.type == "cuda" else None
        started = time.perf_counter()
        turn = build()
        turn()
        wait_for(self.device)
        self.details[name] = {"start_seconds": time.perf_counter() - started}
        if before is not None:
            self.details[name]["peak_mib"] = peak_on_gpu(turn, before)
        elif MEASURES_MEMORY:
            self.details[name]["peak_mib"] = peak_mib(turn)
        return turn


def held() -> tuple[int, int]:
    """Return the bytes of all tensors, and those that PyTorch holds for them, caches emptied."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def peak_on_gpu(turn: Turn, before: tuple[int, int]) -> float:
    """Return the peak GPU memory of a contender with its model and data, MiB.

    The first turn, in which cuDNN's trials take room of their own, is over. The memory that CUDA
    graphs work in was taken when they were recorded: no tensor has it now, but PyTorch holds it.

    Args:
        before: of `held`, before the contender was built.
    """
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        turn()
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated() - before[0]
    kept = held()[1] - before[1]
    return max(most, kept) / 2**20


def without_frames(error: BaseException) -> BaseException:
    """Return the error without frames, which would keep the contender's memory."""
    bare: BaseException | None = error
    while bare is not None:
        bare.__traceback__ = None
        bare = bare.__cause__ or bare.__context__
    return error


def in_turns(
    context: Context,
    rows: list[Row],
    contenders: Mapping[str, Callable[[], Turn]],
    references: tuple[str, ...],
    *,
    is_prepared: bool = False,
    repeats: int | None = None,
) -> list[Result]:
    """Measure contenders in interleaved rounds, see `benchmarks.turns`.

    Args:
        rows: of one case.
        contenders: as in `benchmarks.turns.Case`.
        references: contenders that all are compared with.
        is_prepared: see `Watched`.
        repeats: rounds, if they are not those of the sizes.

    Returns:
        A result for each of the rows that took part.
    """
    torch.backends.cudnn.benchmark = True  # as trainer.benchmark has it by default
    watched = Watched(context.device, is_prepared)
    guarded = {name: watched.watch(name, build) for name, build in contenders.items()}
    warm_ups = 0 if is_prepared or context.is_rehearsal else 1
    case = Case(rows[0].case, guarded, references, warm_ups=warm_ups)
    repeats = repeats or context.sizes.repeats
    found = {row.contender: row for row in turns.measure(case, repeats, [], print)}
    results = []
    for row in rows:
        if row.contender in watched.errors:
            results.append(failed(row, watched.errors[row.contender]))
        elif row.contender in found:
            details = watched.details.get(row.contender, {})
            results.append(from_turns(row, found[row.contender]) | details)
    return results


def from_turns(row: Row, found: turns.Row) -> Result:
    """Return a result in the row's unit, ``images/s`` or ``ms``, with every turn."""
    if row.unit == "images/s":
        values = [turn["images"] / turn["seconds"] for turn in found.turns]
        value = found.images_per_second
    else:
        values = [1e3 * turn["seconds"] for turn in found.turns]
        value = 1e3 * found.median("seconds")
    assert value is not None
    spread = {"lowest": min(values), "highest": max(values), "turns": values}
    return measured(row.case, row.contender, row.unit, value, ratios=found.ratios, **spread)


def rows_of_case(part: str, case: str, context: Context) -> list[Row]:
    return [row for row in rows_of(part, context.sizes) if row.case == case]
