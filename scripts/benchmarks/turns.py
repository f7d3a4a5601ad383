"""Contenders that do the same work take turns, so that whatever else the machine does disturbs all alike."""

import fnmatch
import logging
import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

Turn = Callable[[], Mapping[str, float]]
"""One measurement: ``seconds`` of one piece of work, and what else is known of it (``images`` in it, ``peak_mib``)."""


class LeftOut(Exception):
    """A contender cannot do this case here, for the reason given."""


@dataclass(frozen=True)
class Case:
    """Contenders at one piece of work."""

    name: str
    contenders: Mapping[str, Callable[[], Turn]]
    """Each builds its model and data, and returns what is measured. It may raise `LeftOut`, as may a turn."""
    references: Sequence[str] = ()
    """Contenders that all are compared with; the first is the lower bound or the plain way, and always takes part."""
    repeats: int | None = None
    """Instead of those of the command line."""
    warm_ups: int = 1
    """Rounds before those that count."""
    num_threads: int | None = None
    """Each contender has a process of its own, with so many; None: all share this one."""


@dataclass(frozen=True)
class Row:
    """What one contender did."""

    case: str
    contender: str
    turns: list[Mapping[str, float]] = field(repr=False)
    ratios: dict[str, float]
    """By reference: its seconds over the reference's, the median of the ratios within each round."""

    def median(self, name: str) -> float:
        return statistics.median(turn[name] for turn in self.turns)

    @property
    def images_per_second(self) -> float | None:
        """The median over the rounds, where the work is a number of images."""
        if "images" not in self.turns[0]:
            return None
        return statistics.median(turn["images"] / turn["seconds"] for turn in self.turns)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: every turn as it was measured, and the medians of the table."""
        seconds = [turn["seconds"] for turn in self.turns]
        summary = {
            "median": self.median("seconds"),
            "lowest": min(seconds),
            "highest": max(seconds),
        }
        return {
            "case": self.case,
            "contender": self.contender,
            **summary,
            "ratios": self.ratios,
            "turns": self.turns,
        }


def measure(
    case: Case, repeats: int, only: Sequence[str], say: Callable[[str], None], sittings: int = 1
) -> list[Row]:
    """A row for each contender that `only` chooses.

    Args:
        repeats: rounds of a sitting, for a case that does not have its own.
        only: patterns of ``case: contender``, with the wildcards of file names; none chooses all.
        say: told of contenders that are left out.
        sittings: so often all are built anew, in new processes where the case has them. What a process keeps
            for its life, as where its memory lies, is then not in all rounds.
    """
    found = one_sitting(case, chosen(case, only), repeats, say)
    for _ in range(1, sittings):
        more = one_sitting(case, list(found), repeats, say)
        found = {
            name: found[name] + turns for name, turns in more.items()
        }  # who gives up now has no row
    compared = [name for name in case.references if name in found]
    return [
        Row(
            case.name,
            name,
            turns,
            {reference: ratio(turns, found[reference]) for reference in compared},
        )
        for name, turns in found.items()
    ]


def one_sitting(
    case: Case, names: Sequence[str], repeats: int, say: Callable[[str], None]
) -> dict[str, list[Mapping[str, float]]]:
    """Builds the contenders, and what each measured in its rounds."""
    ready: dict[str, Turn] = {}

    def leave_out(name: str, reason: LeftOut) -> None:
        say(f"left out: {case.name}: {name}: {reason}")

    with ExitStack() as processes:
        for name in names:
            build = case.contenders[name]
            try:
                ready[name] = (
                    processes.enter_context(apart(build, case.num_threads))
                    if case.num_threads
                    else build()
                )
            except LeftOut as reason:
                leave_out(name, reason)
        return in_turns(ready, case.repeats or repeats, case.warm_ups, leave_out)


@contextmanager
def apart(build: Callable[[], Turn], num_threads: int) -> Iterator[Turn]:
    """The turns of a contender that lives in a process of its own: its allocator and threads are as it leaves them.

    Args:
        build: as in `Case`, and picklable.

    Raises:
        LeftOut: as `build` does. Whatever else it or a turn raises comes here as a RuntimeError with the traceback.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=take_turns, args=(there, build, num_threads))
    process.start()
    there.close()

    def answer() -> Any:
        try:
            error, value = here.recv()
        except EOFError:
            process.join()
            raise RuntimeError(
                f"a contender's process ended with status {process.exitcode}"
            ) from None
        if error is not None:
            raise error
        return value

    def turn() -> Mapping[str, float]:
        here.send(None)
        return answer()

    try:
        answer()
        yield turn
    finally:
        here.close()
        process.terminate()
        process.join()


def take_turns(connection: Connection, build: Callable[[], Turn], num_threads: int) -> None:
    """In the process of a contender: build it, then a turn for each message, and for each of them (error, result)."""
    torch.set_num_threads(num_threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    try:
        turn = build()
        connection.send((None, None))
        while True:
            connection.recv()
            connection.send((None, turn()))
    except EOFError:
        return
    except LeftOut as reason:
        connection.send((reason, None))
    except Exception:
        connection.send((RuntimeError(traceback.format_exc()), None))


def chosen(case: Case, only: Sequence[str]) -> list[str]:
    """The contenders whose ``case: contender`` one of the patterns fits, and beside them the first reference."""
    names = [
        name
        for name in case.contenders
        if not only or any(fnmatch.fnmatchcase(f"{case.name}: {name}", pattern) for pattern in only)
    ]
    kept = {*names, *case.references[:1]} if names else set()
    return [name for name in case.contenders if name in kept]


def in_turns(
    contenders: Mapping[str, Turn],
    repeats: int,
    warm_ups: int = 1,
    leave_out: Callable[[str, LeftOut], None] | None = None,
) -> dict[str, list[Mapping[str, float]]]:
    """What each contender measured in `repeats` rounds, in which all have one turn, every other round in reverse order.

    Args:
        warm_ups: rounds before them that do not count.
        leave_out: told of a contender that gives up; None: that is an error.
    """
    found: dict[str, list[Mapping[str, float]]] = {name: [] for name in contenders}
    for number in range(warm_ups + repeats):
        for name in list(found) if number % 2 else list(reversed(found)):
            try:
                measured = contenders[name]()
            except LeftOut as reason:
                if leave_out is None:
                    raise
                leave_out(name, reason)
                del found[name]
                continue
            if number >= warm_ups:
                found[name].append(measured)
    return found


def ratio(turns: Sequence[Mapping[str, float]], references: Sequence[Mapping[str, float]]) -> float:
    """Median over the rounds of the seconds of one over those of the other."""
    return statistics.median(
        turn["seconds"] / reference["seconds"]
        for turn, reference in zip(turns, references, strict=True)
    )


def timed(
    work: Callable[[], Any],
    device: torch.device | None = None,
    *,
    images: int | None = None,
    calls: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Turn:
    """A turn of so many calls of `work`; its seconds are those of one call.

    Args:
        device: a GPU is waited for before the clock is read.
        images: in one call; None: what `work` returns, if it returns a number.
        calls: several of what takes milliseconds.
    """

    def turn() -> dict[str, float]:
        wait_for(device)
        started = clock()
        for _ in range(calls):
            returned = work()
        wait_for(device)
        done = images or returned
        return {"seconds": (clock() - started) / calls} | (
            {"images": done} if isinstance(done, int) else {}
        )

    return turn


def wait_for(device: torch.device | None) -> None:
    """Until a GPU has done what it was given."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
