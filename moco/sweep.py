"""A table of a sweep's jobs: ``python -m moco.sweep runs/sweep/NAME [--csv FILE]``."""

import argparse
import csv
import io
import itertools
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from moco.errors import InputError, printable
from moco.runs.atomic_files import write_atomically
from moco.runs.run_folder import CONFIG
from moco.runs.run_status import read_status, slurm_queue, state_now

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

MULTIRUN = "multirun.yaml"
SEED = "seed"
FIGURES = {
    "epoch": "epoch",
    "step": "step",
    "kNN": "knn/top1",
    "best kNN": "knn/best_top1",
    "in epoch": "knn/best_epoch",
    "mIoU": "segment/miou",
    "training": "train/seconds",
}
"""The table's columns for figures of ``metrics.json``; those that no job has are left out."""


@dataclass
class Job:
    """One combination of a sweep."""

    folder: Path
    overrides: dict[str, str]
    """Of the keys that the sweep varies."""
    state: str
    status: dict[str, Any]
    """What ``status.json`` holds."""
    figures: dict[str, Any]
    """What ``metrics.json`` holds."""


def jobs_of(sweep: Path) -> list[Job]:
    """The jobs that the sweep's last command asked for, in its order, then others that have a folder there.

    Raises:
        InputError: the folder is no sweep's.
    """
    check_folder(sweep)
    planned = planned_jobs(sweep)
    others = {path.parent.name: None for path in sorted(sweep.glob("*/status.json"))}
    queue = slurm_queue()
    return [job_in(sweep / name, planned.get(name), queue) for name in {**planned, **others}]


def check_folder(folder: Path) -> None:
    """Raises InputError if `folder` is no sweep's; it says what it is, and where sweeps are."""
    if (folder / MULTIRUN).is_file():
        return
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if (folder / CONFIG).is_file():
        of = f" of the sweep {folder.parent}" if (folder.parent / MULTIRUN).is_file() else ""
        raise InputError(f"{folder}: a single run{of}; expected the folder of a sweep (-m)")
    sweeps = sorted(folder.rglob(MULTIRUN), key=lambda path: path.stat().st_mtime, reverse=True)
    inside = (
        f"; sweeps in it, newest first: {', '.join(str(path.parent) for path in sweeps[:5])}"
        if sweeps
        else ""
    )
    raise InputError(f"{folder}: not the folder of a sweep (-m), it has no {MULTIRUN}{inside}")


def planned_jobs(sweep: Path) -> dict[str, dict[str, str]]:
    """Return each combination of the sweep's last command, by the name of its folder.

    Nothing is returned if the file of the command is cut short, or if only the sweeper that it used
    knows the combinations.
    """
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from moco.cli.run_names import job_name, swept_keys
    from moco.config.parsing import CONFIG_DIR

    try:
        running = yaml.safe_load((sweep / MULTIRUN).read_text())["hydra"]
        typed = []
        for key, value in (running["sweeper"].get("params") or {}).items():
            typed.append(f"{key}={value}")
        typed += running["overrides"]["task"]
        # Hydra has to know the config's folder for the choices that glob(*) stands for.
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            parser = OverridesParser.create(GlobalHydra.instance().config_loader())
            combinations = combinations_of(parser.parse_overrides(typed))
    except (HydraException, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return {}
    swept = swept_keys(typed)
    planned = {}
    for combination in combinations:
        planned[job_name(combination, swept)] = varied(combination, swept)
    return planned


def combinations_of(overrides: Sequence["Override"]) -> list[list[str]]:
    """Return the overrides of each job, in the order in which Hydra's basic sweeper runs them.

    Raises:
        HydraException: another sweeper has to be used for these.
    """
    from hydra.errors import HydraException

    choices = []
    for override in overrides:
        key = override.get_key_element()
        if override.is_sweep_override():
            if not override.is_discrete_sweep():
                raise HydraException(f"{key}: the basic sweeper takes no intervals")
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([f"{key}={override.get_value_element_as_str()}"])
    return [list(combination) for combination in itertools.product(*choices)]


def varied(overrides: Sequence[str], swept: Sequence[str]) -> dict[str, str]:
    """A job's values of the keys `swept`."""
    from moco.cli.run_names import key_of, parsed

    return {
        key_of(item): item.get_value_element_as_str()
        for item in parsed(overrides)
        if key_of(item) in swept
    }


def job_in(folder: Path, overrides: dict[str, str] | None, queue: Mapping[str, str] | None) -> Job:
    """The job whose run folder is this, which need not exist; without its overrides its name has to do."""
    metrics = folder / "metrics.json"
    figures = json.loads(metrics.read_text()) if metrics.is_file() else {}
    return Job(
        folder,
        overrides or {"job": folder.name},
        state_now(folder, queue),
        read_status(folder) or {},
        figures,
    )


def as_text(jobs: Sequence[Job]) -> str:
    """The table, for people."""
    keys = list({key: None for job in jobs for key in job.overrides})
    columns = [title for title, key in FIGURES.items() if any(key in job.figures for job in jobs)]
    rows = [[*keys, "state", *columns, "message"]]
    for job in jobs:
        figures = [shown(title, job.figures.get(FIGURES[title])) for title in columns]
        rows.append(
            [
                *(job.overrides.get(key, "") for key in keys),
                job.state,
                *figures,
                job.status.get("message", ""),
            ]
        )
    for overrides, of_seeds in over_seeds(jobs).items():
        of_keys = dict(overrides) | {SEED: f"mean of {len(of_seeds)}"}
        figures = [
            mean_and_spread(title, [job.figures.get(FIGURES[title]) for job in of_seeds])
            for title in columns
        ]
        rows.append([*(of_keys.get(key, "") for key in keys), "", *figures, ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(printable(line.rstrip()) for line in lines)


def over_seeds(jobs: Sequence[Job]) -> dict[tuple[tuple[str, str], ...], list[Job]]:
    """Jobs that differ by their seed alone and are done, two and more, by the overrides that they share."""
    groups: dict[tuple[tuple[str, str], ...], list[Job]] = {}
    for job in jobs:
        if SEED in job.overrides and job.state == "finished":
            shared = tuple((key, value) for key, value in job.overrides.items() if key != SEED)
            groups.setdefault(shared, []).append(job)
    return {shared: group for shared, group in groups.items() if len(group) > 1}


def mean_and_spread(title: str, figures: Sequence[Any]) -> str:
    """The mean and the sample's standard deviation of a figure that all jobs have and that is no count."""
    if not all(isinstance(figure, float) for figure in figures):
        return ""
    return f"{shown(title, statistics.mean(figures))} ± {shown(title, statistics.stdev(figures))}"


def shown(title: str, figure: Any) -> str:
    """A figure of the table."""
    if figure is None:
        return "-"
    if title == "training":
        return f"{figure:,.0f} s"
    return f"{figure:.4f}" if isinstance(figure, float) else str(figure)


def as_csv(jobs: Sequence[Job]) -> str:
    """The table with every figure, for programs."""
    rows = [
        {
            "folder": str(job.folder),
            **job.overrides,
            **job.status,
            "state": job.state,
            **job.figures,
        }
        for job in jobs
    ]
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list({key: None for row in rows for key in row}), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def main() -> None:
    """Entry point of ``moco-sweep``."""
    parser = argparse.ArgumentParser(prog="moco.sweep", description="A table of a sweep's jobs.")
    parser.add_argument("folder", type=Path, help="of the sweep, for instance runs/sweep/NAME")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="write the table with every figure there too"
    )
    given = parser.parse_args()
    try:
        jobs = jobs_of(given.folder)
        print(as_text(jobs))
        if given.csv:
            write_atomically(given.csv, lambda file: file.write(as_csv(jobs).encode()))
    except (InputError, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
