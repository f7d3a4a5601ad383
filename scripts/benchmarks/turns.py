"""Measure contenders that do the same work in turns.

Whatever else the machine does then disturbs all of them in the same way.
"""

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
"""Takes one measurement. It returns the ``seconds`` of the work, and may return its number of
``images`` and its ``peak_mib``."""


class LeftOut(Exception):
    """A contender cannot do this case here; the message has the reason."""


@dataclass(frozen=True)
class Case:
    """Some work and the contenders that do it."""

    name: str
    contenders: Mapping[str, Callable[[], Turn]]
    """Each builds its model and data and returns its turn. Both may raise `LeftOut`."""
    references: Sequence[str] = ()
    """Contenders that all others are compared with. The first one is the lower bound or the plain
    way, and always takes part."""
    repeats: int | None = None
    """Counted rounds, if not the number of the command line."""
    warm_ups: int = 1
    """Rounds before the counted ones."""
    num_threads: int | None = None
    """Threads of each contender, each in its own process. None: all share this process."""


@dataclass(frozen=True)
class Row:
    """The measurements of one contender."""

    case: str
    contender: str
    turns: list[Mapping[str, float]] = field(repr=False)
    ratios: dict[str, float]
    """By reference, the contender's time over the time of the reference: the median of the ratios
    within each round."""

    def median(self, name: str) -> float:
        return statistics.median(turn[name] for turn in self.turns)

    @property
    def images_per_second(self) -> float | None:
        """Return the median over the rounds, or None if the work has no number of images."""
        if "images" not in self.turns[0]:
            return None
        return statistics.median(turn["images"] / turn["seconds"] for turn in self.turns)

    def as_dict(self) -> dict[str, Any]:
        """Return every turn and the figures of the table, for JSON."""
        seconds = [turn["seconds"] for turn in self.turns]
        return {
            "case": self.case,
            "contender": self.contender,
            "median": self.median("seconds"),
            "lowest": min(seconds),
            "highest": max(seconds),
            "ratios": self.ratios,
            "turns": self.turns,
        }


def measure(
    case: Case, repeats: int, only: Sequence[str], say: Callable[[str], None], sittings: int = 1
) -> list[Row]:
    """Return a row for each contender that `only` chooses.

    Args:
        repeats: counted rounds of a sitting, unless the case has its own number.
        only: patterns of ``case: contender``, with the wildcards of file names; empty for all.
        say: called with a line for each contender that is left out.
        sittings: how often all contenders are built anew, in new processes if the case has them. A
            process keeps some properties for its whole life, for example the place of its memory.
            With several sittings, they do not influence all rounds.
    """
    found = one_sitting(case, chosen(case, only), repeats, say)
    for _ in range(1, sittings):
        more = one_sitting(case, list(found), repeats, say)
        # A contender that gives up in a later sitting has no row.
        found = {name: found[name] + turns for name, turns in more.items()}
    rows = []
    for name, turns in found.items():
        ratios = {}
        for reference in case.references:
            if reference in found:
                ratios[reference] = ratio(turns, found[reference])
        rows.append(Row(case.name, name, turns, ratios))
    return rows


def one_sitting(
    case: Case, names: Sequence[str], repeats: int, say: Callable[[str], None]
) -> dict[str, list[Mapping[str, float]]]:
    """Build the contenders; return the measurements of each."""
    ready: dict[str, Turn] = {}

    def leave_out(name: str, reason: LeftOut) -> None:
        say(f"left out: {case.name}: {name}: {reason}")

    with ExitStack() as processes:
        for name in names:
            build = case.contenders[name]
            try:
                if case.num_threads:
                    ready[name] = processes.enter_context(apart(build, case.num_threads))
                else:
                    ready[name] = build()
            except LeftOut as reason:
                leave_out(name, reason)
        return in_turns(ready, case.repeats or repeats, case.warm_ups, leave_out)


@contextmanager
def apart(build: Callable[[], Turn], num_threads: int) -> Iterator[Turn]:
    """Yield the turn of a contender in a process of its own, with its own allocator and threads.

    Args:
        build: as in `Case`; it must be picklable.

    Raises:
        LeftOut: `build` or a turn raised it.
        RuntimeError: `build` or a turn raised another exception; the message has the traceback.
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
    """Build a contender, then take a turn for each message; runs in the contender's process.

    Each answer is a pair (error, result), of which one is None.
    """
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
    """Return the contenders that match a pattern of `only`, and the first reference."""
    if not only:
        return list(case.contenders)
    kept = set()
    for name in case.contenders:
        for pattern in only:
            if fnmatch.fnmatchcase(f"{case.name}: {name}", pattern):
                kept |= {name, *case.references[:1]}
    return [name for name in case.contenders if name in kept]


def in_turns(
    contenders: Mapping[str, Turn],
    repeats: int,
    warm_ups: int = 1,
    leave_out: Callable[[str, LeftOut], None] | None = None,
) -> dict[str, list[Mapping[str, float]]]:
    """Measure each contender once in every round; every other round has the reverse order.

    Args:
        repeats: counted rounds.
        warm_ups: rounds before them that are not counted.
        leave_out: called for a contender that gives up; None lets its exception pass.

    Returns:
        The measurements of each contender.
    """
    found: dict[str, list[Mapping[str, float]]] = {name: [] for name in contenders}
    for number in range(warm_ups + repeats):
        order = list(found)
        if number % 2 == 0:
            order.reverse()
        for name in order:
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
    """Return the time over the time of the reference: the median of the ratios within a round."""
    ratios = []
    for turn, reference in zip(turns, references, strict=True):
        ratios.append(turn["seconds"] / reference["seconds"])
    return statistics.median(ratios)


def timed(
    work: Callable[[], Any],
    device: torch.device | None = None,
    *,
    images: int | None = None,
    calls: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Turn:
    """Return a turn that calls `work`; its seconds are those of one call.

    Args:
        device: the clock is read when a GPU has finished.
        images: the number of images in one call; None: what `work` returns, if that is a number.
        calls: the number of calls in a turn; use several for work of milliseconds.
    """

    def turn() -> dict[str, float]:
        wait_for(device)
        started = clock()
        for _ in range(calls):
            returned = work()
        wait_for(device)
        measured = {"seconds": (clock() - started) / calls}
        num_images = images or returned
        if isinstance(num_images, int):
            measured["images"] = num_images
        return measured

    return turn


def return_it(turn: Turn) -> Turn:
    """Return the turn; for contenders that need no preparation in this process."""
    return turn


def wait_for(device: torch.device | None) -> None:
    """Wait until a GPU has finished its work."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
