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
from moco.runs.run_folder import METRICS
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
    planned: dict[str, dict[str, str] | None] = {**planned_jobs(sweep)}
    for path in sorted(sweep.glob("*/status.json")):
        planned.setdefault(path.parent.name, None)
    queue = slurm_queue()
    return [read_job(sweep / name, overrides, queue) for name, overrides in planned.items()]


def check_folder(folder: Path) -> None:
    """Raise InputError if `folder` is not that of a sweep; say which sweeps are near."""
    if (folder / MULTIRUN).is_file():
        return
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    message = f"{folder}: not the folder of a sweep (-m), it has no {MULTIRUN}"
    found = [*folder.rglob(MULTIRUN), *folder.parent.glob(MULTIRUN)]
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    if found:
        newest = ", ".join(str(path.parent) for path in found[:5])
        message += f"; sweeps near it, newest first: {newest}"
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
        running = yaml.safe_load((sweep / MULTIRUN).read_text(encoding="utf-8"))["hydra"]
        params = running["sweeper"].get("params") or {}
        typed = [f"{key}={value}" for key, value in params.items()]
        typed += running["overrides"]["task"]
        # The parser needs the config folder for choices such as backbone=glob(*).
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            parser = OverridesParser.create(GlobalHydra.instance().config_loader())
            values = [values_of(override) for override in parser.parse_overrides(typed)]
    except (HydraException, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return {}
    swept = swept_keys(typed)
    planned = {}
    # In the order of Hydra's basic sweeper.
    for combination in itertools.product(*values):
        name = job_name([f"{key}={value}" for key, value in combination], swept)
        planned[name] = {key: value for key, value in combination if key in swept}
    return planned


def values_of(override: Any) -> list[tuple[str, str]]:
    """Return the key of one of Hydra's overrides with each of its values.

    Raises:
        HydraException: it has a range of values, from which an optimizing sweeper chooses.
    """
    from hydra.errors import HydraException

    from moco.cli.run_names import key_of

    key = key_of(override)
    if override.is_discrete_sweep():
        return [(key, value) for value in override.sweep_string_iterator()]
    if override.is_sweep_override():
        raise HydraException(f"{key}: only its sweeper knows the values")
    return [(key, override.get_value_element_as_str())]


def read_job(
    folder: Path, overrides: dict[str, str] | None, queue: Mapping[str, str] | None
) -> Job:
    """Return the job with this run folder, which need not exist yet.

    Args:
        folder: the run folder.
        overrides: the varied values; None if they are not known.
        queue: the states of SLURM's jobs, from `slurm_queue`.
    """
    metrics = folder / METRICS
    figures = json.loads(metrics.read_text()) if metrics.is_file() else {}
    state = state_now(folder, queue)
    return Job(folder, overrides or {"job": folder.name}, state, read_status(folder) or {}, figures)


def as_text(jobs: Sequence[Job]) -> str:
    """Return the table for people, with a line of means over seeds."""
    keys = list(dict.fromkeys(key for job in jobs for key in job.overrides))
    columns = {}
    for title, figure in COLUMNS.items():
        if any(figure in job.figures for job in jobs):
            columns[title] = figure
    rows = [[*keys, "state", *columns, "message"]]
    for job in jobs:
        values = [job.overrides.get(key, "") for key in keys]
        figures = [format_figure(job.figures.get(figure), figure) for figure in columns.values()]
        rows.append([*values, job.state, *figures, job.status.get("message", "")])
    for group in groups_of_seeds(jobs):
        shared = group[0].overrides | {SEED: f"mean of {len(group)}"}
        values = [shared.get(key, "") for key in keys]
        figures = [mean_and_spread(group, figure) for figure in columns.values()]
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


def groups_of_seeds(jobs: Sequence[Job]) -> list[list[Job]]:
    """Return groups of finished jobs that differ by their seed alone."""
    groups: dict[Any, list[Job]] = {}
    for job in jobs:
        if SEED in job.overrides and job.state == "finished":
            shared = job.overrides | {SEED: ""}
            groups.setdefault(tuple(shared.items()), []).append(job)
    return [group for group in groups.values() if len(group) > 1]


def mean_and_spread(jobs: Sequence[Job], name: str) -> str:
    """Return mean and sample standard deviation; nothing for counts and missing figures."""
    figures: list[Any] = [job.figures.get(name) for job in jobs]
    if not all(isinstance(figure, float) for figure in figures):
        return ""
    mean = format_figure(statistics.mean(figures), name)
    return f"{mean} ± {format_figure(statistics.stdev(figures), name)}"


def format_figure(figure: Any, name: str) -> str:
    """Return a figure of ``metrics.json`` as text."""
    if figure is None:
        return "-"
    if name == "train/seconds":
        return f"{figure:,.0f} s"
    if isinstance(figure, float):
        return f"{figure:.4f}"
    return str(figure)


def as_csv(jobs: Sequence[Job]) -> str:
    """Return the table with every figure as CSV."""
    rows = []
    for job in jobs:
        row = {"folder": job.folder, **job.overrides, **job.status, **job.figures}
        rows.append(row | {"state": job.state})
    columns = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
