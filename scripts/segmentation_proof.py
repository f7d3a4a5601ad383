"""Does pretraining help segmentation, and which of its parts does?

    python scripts/segmentation_proof.py --data DATA --folder RUNS [--only 'dsb2018/v2*' ...]
        [--seeds 3] [--hours 2] [--full] [--pretraining-factor 1] [--tuning-factor 1]
        [--results FILE] [--search] [--dry-run]
    python scripts/segmentation_proof.py --tables [--results docs/segmentation_results.jsonl]

DATA holds the segmentation folders camvid, dsb2018 and drive, and the image folder tiny_imagenet. A
cell of the grid is a dataset, a row (a network with its pretraining), a way of fine-tuning, a share
of the labels and a seed, such as ``dsb2018/v2_dense/frozen/0.05/0``. --only takes patterns of these
names. --dry-run lists the cells with their budgets, and checks their settings.

A finished cell is a line of the results file, and is not repeated. An interrupted one goes on: the
same command continues. A cell that fails is named, and the others go on. After --hours, no further
cell is begun.

The default size is for two CPU cores. --full is for one GPU. The factors multiply the numbers of
steps; other numbers need another folder. --search tries learning rates for the fine-tuning, on the
validation part and with a seed of its own. It keeps the best ones in RUNS, where the grid finds
them. --tables writes docs/segmentation_results.md and its figure.

Exit codes: 0 done, or out of time; 1 a cell failed; 2 bad input; 130 interrupted.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# As in `python scripts/segmentation_proof.py`, for tests and `python -m`.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from benchmarks.machine import describe
from hydra.errors import HydraException
from proof_parts import runs, tables
from proof_parts.grid import LEARNING_RATES, SEARCHED, Cell, cells_of
from proof_parts.images import IMAGE_FOLDER
from proof_parts.runs import Workplace

from moco.errors import InputError, Interrupted, RunError
from moco.runs.atomic_files import write_atomically, write_json
from moco.training.hardware import choose_device

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "segmentation_results.md"
PUBLISHED = DOCS / "segmentation_results.jsonl"
FIGURE = DOCS / "segmentation_monitors.png"
RATES = "learning_rates.json"
RESULTS = "results.jsonl"
SEARCH_SEED = 1000
"""Of the search for learning rates. The grid has other seeds."""
IDENTITY = ("data_set", "row", "tuning", "label_fraction", "seed", "scale")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a results file; none if there is no such file."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        lines.append(json.loads(text))
    return lines


def identity(line: dict[str, Any]) -> tuple[Any, ...]:
    """Return what tells a line of the results from the others."""
    return tuple(line[key] for key in IDENTITY)


def identity_of(cell: Cell, scale: str) -> tuple[Any, ...]:
    """Return the identity that the line of a cell has."""
    return (
        cell.data_set.name,
        cell.row.name,
        cell.tuning,
        cell.label_fraction,
        cell.seed,
        scale,
    )


def add_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line to the results, in sorted order, and replace the file at once."""
    lines = sorted([*read_lines(path), line], key=identity)
    text = "".join(json.dumps(each, sort_keys=True) + "\n" for each in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(text.encode()))


def check_data(work: Workplace, cells: Sequence[Cell]) -> None:
    """Check that the datasets of all cells are there.

    Raises:
        InputError: a folder is missing.
    """
    needed = set()
    for cell in cells:
        needed |= {cell.data_set.root, *cell.data_set.sources}
    for name in sorted(needed):
        folder = "train" if name == IMAGE_FOLDER else "images"
        if not (work.data / name / folder).is_dir():
            raise InputError(f"--data {work.data}: there is no folder {name}/{folder} in it")


def check_unchanged(work: Workplace, cell: Cell, line: dict[str, Any]) -> None:
    """Check that a finished cell has the settings that it would get now.

    Raises:
        InputError: it has others.
    """
    now = runs.tuning_settings(work, cell, runs.learning_rate(work, cell)).told
    if line["settings"] != now:
        changed = sorted(set(line["settings"]) ^ set(now))
        raise InputError(
            f"{cell}: the results file has it with other settings ({', '.join(changed)}); "
            "give another --results and another --folder"
        )


def run_grid(
    work: Workplace,
    cells: Sequence[Cell],
    results: Path,
    hours: float,
    result_of: Callable[[Workplace, Cell], dict[str, Any]] = runs.result_of,
) -> list[str]:
    """Run the cells that the results lack. Return the names of those that failed.

    Args:
        hours: no cell is begun after this time.
        result_of: runs one cell.
    """
    finished = {}
    for line in read_lines(results):
        finished[identity(line)] = line
    for cell in cells:
        line = finished.get(identity_of(cell, work.scale_name))
        if line is not None:
            check_unchanged(work, cell, line)
    machine = describe(choose_device(work.scale.accelerator), torch.get_num_threads())
    failed = []
    started = time.monotonic()
    for number, cell in enumerate(cells, start=1):
        if identity_of(cell, work.scale_name) in finished:
            continue
        if time.monotonic() - started > 3600 * hours:
            print(f"out of time after {hours:g} hours; the same command goes on", flush=True)
            break
        try:
            line = result_of(work, cell)
        except (InputError, RunError, HydraException) as error:
            print(f"{cell}: failed: {first_line(error)}", file=sys.stderr, flush=True)
            failed.append(str(cell))
            continue
        add_line(results, line | {"machine": machine})
        runs.remove_checkpoints(work, cell)
        print(f"{number}/{len(cells)} {cell}: mIoU {line['miou']:.4f}", flush=True)
    return failed


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def search(work: Workplace, cells: Sequence[Cell]) -> None:
    """Find the learning rate of each kind of cell on the validation part, and keep them.

    Of the cells that share a learning rate, a row of `SEARCHED` with the fewest labels is tried.
    """
    path = work.folder / RATES
    found = dict(work.learning_rates)
    for cell in cells:
        key = runs.rate_key(cell)
        if key in found or cell.row.name not in SEARCHED:
            continue
        smallest = min(cell.data_set.label_fractions)
        tried = Cell(cell.data_set, cell.row, cell.tuning, smallest, SEARCH_SEED)
        runs.prepare(work, tried)
        runs.pretrain(work, tried)
        scores = {}
        for lr in LEARNING_RATES[cell.tuning]:
            folder = work.folder / "search" / f"{key.replace('/', '_')}_{lr:g}"
            scores[lr] = runs.tune(work, tried, lr, folder)["segment/miou"]
            runs.remove_weights(folder)
        found[key] = max(scores, key=lambda lr: scores[lr])
        shown = ", ".join(f"{lr:g}: {score:.4f}" for lr, score in scores.items())
        print(f"{key}: lr {found[key]:g} ({shown})", flush=True)
        write_json(path, found)


def list_cells(work: Workplace, cells: Sequence[Cell], results: Path) -> int:
    """Print the cells with their budgets, and return how many have wrong settings."""
    finished = {identity(line) for line in read_lines(results)}
    num_wrong = 0
    num_finished = 0
    pretrainings = set()
    problems: dict[tuple[str, ...], str] = {}
    for cell in cells:
        steps = f"{work.tuning_steps(cell)} steps"
        if cell.row.pretraining is not None:
            pretrainings.add(work.pretraining_folder(cell))
            steps = f"{work.pretraining_steps(cell):,} + {steps}"
        state = "to run"
        if identity_of(cell, work.scale_name) in finished:
            state = "finished"
            num_finished += 1
        # Seeds and shares of labels are numbers, and all right if one is.
        kind = cell.data_set.name, cell.row.name, cell.tuning
        if kind not in problems:
            problems[kind] = problem_of(work, cell)
        if problems[kind]:
            state = f"WRONG: {problems[kind]}"
            num_wrong += 1
        print(f"{cell}: {steps}, at most {work.budget(cell).minutes:g} min, {state}")
    print(
        f"{len(cells)} cells, of which {num_finished} are finished; {len(pretrainings)} "
        f"pretrainings, which cells share; {num_wrong} cells with wrong settings"
    )
    return num_wrong


def problem_of(work: Workplace, cell: Cell) -> str:
    """Return what is wrong with the settings of a cell; "" if nothing is."""
    try:
        runs.check(work, cell)
    except (InputError, HydraException) as error:
        return first_line(error)
    return ""


def write_tables(results: Path, page: Path, figure: Path) -> None:
    """Write the page and its figure from a results file.

    Raises:
        InputError: the file has no results, or those of two scales.
    """
    lines = read_lines(results)
    scales = {line["scale"] for line in lines}
    if len(scales) != 1:
        raise InputError(f"--results {results}: expected results of one scale, found {scales}")
    has_figure = tables.write_figure(lines, figure)
    page.write_text(tables.page(lines, figure.name if has_figure else None))


def arguments_of(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--hours", type=float, default=float("inf"))
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--pretraining-factor", type=float, default=1.0)
    parser.add_argument("--tuning-factor", type=float, default=1.0)
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--tables", action="store_true")
    arguments = parser.parse_args(given)
    if not arguments.tables and (arguments.data is None or arguments.folder is None):
        parser.error("--data and --folder are needed, except with --tables")
    return arguments


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit code."""
    arguments = arguments_of(given)
    try:
        if arguments.tables:
            write_tables(arguments.results or PUBLISHED, PAGE, FIGURE)
            return 0
        folder = arguments.folder.resolve()
        rates = folder / RATES
        work = Workplace(
            data=arguments.data.resolve(),
            folder=folder,
            scale_name="full" if arguments.full else "cpu",
            learning_rates=json.loads(rates.read_text()) if rates.exists() else {},
            pretraining_factor=arguments.pretraining_factor,
            tuning_factor=arguments.tuning_factor,
        )
        cells = list(cells_of(range(arguments.seeds), arguments.only))
        if not cells:
            raise InputError(f"--only {' '.join(arguments.only)}: no cell has such a name")
        results = arguments.results or folder / RESULTS
        check_data(work, cells)
        if arguments.dry_run:
            return 2 if list_cells(work, cells, results) else 0
        if arguments.search:
            search(work, cells)
            return 0
        failed = run_grid(work, cells, results, arguments.hours)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except Interrupted as error:
        print(f"{error}\nthe same command goes on", file=sys.stderr)
        return 128 + error.signal_number
    if failed:
        print(f"{len(failed)} cells failed: {', '.join(failed)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
