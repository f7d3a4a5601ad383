"""The jobs of a sweep with their states and figures, as a table for people and as CSV."""

import csv
import io
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moco.errors import InputError, printable
from moco.runs.run_folder import CONFIG
from moco.runs.run_status import read_status, slurm_queue, state_now

MULTIRUN = "multirun.yaml"
SEED = "seed"
COLUMNS = {
    "epoch": "epoch",
    "step": "step",
    "kNN": "knn/top1",
    "best kNN": "knn/best_top1",
    "in epoch": "knn/best_epoch",
    "mIoU": "segment/miou",
    "training": "train/seconds",
}
"""Titles of the table's columns, and the keys of ``metrics.json`` behind them."""


@dataclass
class Job:
    """One combination of a sweep's values."""

    folder: Path
    overrides: dict[str, str]
    """The values of the keys that the sweep varies."""
    state: str
    status: dict[str, Any]
    """The content of ``status.json``."""
    figures: dict[str, Any]
    """The content of ``metrics.json``."""


def find_jobs(sweep: Path) -> list[Job]:
    """Return the jobs of the sweep's last command in its order, then others with a folder there.

    Raises:
        InputError: the folder is not that of a sweep.
    """
    check_folder(sweep)
    planned = planned_jobs(sweep)
    names = list(planned)
    for path in sorted(sweep.glob("*/status.json")):
        if path.parent.name not in planned:
            names.append(path.parent.name)
    queue = slurm_queue()
    return [read_job(sweep / name, planned.get(name), queue) for name in names]


def check_folder(folder: Path) -> None:
    """Raise InputError if `folder` is not that of a sweep; say what it is and where sweeps are."""
    if (folder / MULTIRUN).is_file():
        return
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if (folder / CONFIG).is_file():
        of_sweep = ""
        if (folder.parent / MULTIRUN).is_file():
            of_sweep = f" of the sweep {folder.parent}"
        raise InputError(f"{folder}: a single run{of_sweep}; expected the folder of a sweep (-m)")
    message = f"{folder}: not the folder of a sweep (-m), it has no {MULTIRUN}"
    sweeps = sorted(folder.rglob(MULTIRUN), key=lambda path: path.stat().st_mtime, reverse=True)
    if sweeps:
        newest = ", ".join(str(path.parent) for path in sweeps[:5])
        message += f"; sweeps in it, newest first: {newest}"
    raise InputError(message)


def planned_jobs(sweep: Path) -> dict[str, dict[str, str]]:
    """Return the varied values of each job of the sweep's last command, by the job's folder.

    The dict is empty if ``multirun.yaml`` is damaged, or if only its sweeper knows the jobs.
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
        # The parser needs the config folder for choices such as backbone=glob(*).
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            parser = OverridesParser.create(GlobalHydra.instance().config_loader())
            combinations = combine(parser.parse_overrides(typed))
    except (HydraException, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return {}
    swept = swept_keys(typed)
    return {job_name(overrides, swept): varied(overrides, swept) for overrides in combinations}


def combine(overrides: Sequence[Any]) -> list[list[str]]:
    """Return the overrides of each job, in the order of Hydra's basic sweeper.

    Args:
        overrides: Hydra's override objects.

    Raises:
        HydraException: a key has a range of values, from which an optimizing sweeper chooses.
    """
    from hydra.errors import HydraException

    values_of_keys = []
    for override in overrides:
        key = override.get_key_element()
        if override.is_discrete_sweep():
            values_of_keys.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        elif override.is_sweep_override():
            raise HydraException(f"{key}: only its sweeper knows the values")
        else:
            values_of_keys.append([f"{key}={override.get_value_element_as_str()}"])
    return [list(combination) for combination in itertools.product(*values_of_keys)]


def varied(overrides: Sequence[str], swept: Sequence[str]) -> dict[str, str]:
    """Return a job's values of the keys `swept`."""
    from moco.cli.run_names import key_of, parsed

    values = {}
    for item in parsed(overrides):
        if key_of(item) in swept:
            values[key_of(item)] = item.get_value_element_as_str()
    return values


def read_job(
    folder: Path, overrides: dict[str, str] | None, queue: Mapping[str, str] | None
) -> Job:
    """Return the job with this run folder, which need not exist yet.

    Args:
        folder: the run folder.
        overrides: the varied values; None if they are not known.
        queue: the states of SLURM's jobs, from `slurm_queue`.
    """
    metrics = folder / "metrics.json"
    figures = {}
    if metrics.is_file():
        figures = json.loads(metrics.read_text())
    state = state_now(folder, queue)
    return Job(folder, overrides or {"job": folder.name}, state, read_status(folder) or {}, figures)


def as_text(jobs: Sequence[Job]) -> str:
    """Return the table for people, with a line of means over seeds."""
    keys: list[str] = []
    for job in jobs:
        keys += [key for key in job.overrides if key not in keys]
    titles = []
    for title, figure in COLUMNS.items():
        if any(figure in job.figures for job in jobs):
            titles.append(title)
    rows = [[*keys, "state", *titles, "message"]]
    for job in jobs:
        values = [job.overrides.get(key, "") for key in keys]
        figures = [format_figure(title, job.figures.get(COLUMNS[title])) for title in titles]
        rows.append([*values, job.state, *figures, job.status.get("message", "")])
    for overrides, group in groups_of_seeds(jobs).items():
        shared = {**dict(overrides), SEED: f"mean of {len(group)}"}
        values = [shared.get(key, "") for key in keys]
        figures = []
        for title in titles:
            of_group = [job.figures.get(COLUMNS[title]) for job in group]
            figures.append(mean_and_spread(title, of_group))
        rows.append([*values, "", *figures, ""])
    return align(rows)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Return the rows as lines of text with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append(printable("  ".join(cells).rstrip()))
    return "\n".join(lines)


def groups_of_seeds(jobs: Sequence[Job]) -> dict[tuple[tuple[str, str], ...], list[Job]]:
    """Return groups of finished jobs that differ by their seed alone, by their other overrides."""
    groups: dict[tuple[tuple[str, str], ...], list[Job]] = {}
    for job in jobs:
        if SEED in job.overrides and job.state == "finished":
            shared = tuple((key, value) for key, value in job.overrides.items() if key != SEED)
            groups.setdefault(shared, []).append(job)
    return {shared: group for shared, group in groups.items() if len(group) > 1}


def mean_and_spread(title: str, figures: Sequence[Any]) -> str:
    """Return mean and sample standard deviation; nothing for counts and missing figures."""
    if not all(isinstance(figure, float) for figure in figures):
        return ""
    mean = format_figure(title, statistics.mean(figures))
    return f"{mean} ± {format_figure(title, statistics.stdev(figures))}"


def format_figure(title: str, figure: Any) -> str:
    """Return a figure as text for the column `title`."""
    if figure is None:
        return "-"
    if title == "training":
        return f"{figure:,.0f} s"
    if isinstance(figure, float):
        return f"{figure:.4f}"
    return str(figure)


def as_csv(jobs: Sequence[Job]) -> str:
    """Return the table with every figure as CSV."""
    rows: list[dict[str, Any]] = []
    columns: list[str] = []
    for job in jobs:
        row = {"folder": str(job.folder), **job.overrides, **job.status, **job.figures}
        row["state"] = job.state
        rows.append(row)
        columns += [name for name in row if name not in columns]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
