"""The jobs of a sweep with their states and figures, as a table for people and as CSV."""

import csv
import io
import itertools
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moco.errors import InputError, printable
from moco.runs.run_folder import CONFIG, METRICS
from moco.runs.run_status import read_status, slurm_queue, state_now

MULTIRUN = "multirun.yaml"
SEED = "seed"
UNKNOWN = "job"
"""Stands for the varied values of a job of which only the folder is known."""
MOST_DIFFERING = 6
"""Settings that have a column each for such jobs."""
COLUMNS = {
    "epoch": "epoch",
    "step": "step",
    "loss": "train/loss",
    "kNN": "knn/top1",
    "best kNN": "knn/best_top1",
    "in epoch": "knn/best_epoch",
    "linear": "linear/top1",
    "linear (official)": "linear_official/top1",
    "dense mIoU": "dense/knn_miou",
    "mIoU": "segment/miou",
    "mean Dice": "segment/dice",
    "rank": "label_free/feature_rank_me",
    "embedding rank": "label_free/rank_me",
    "is it learning?": "verdict",
    "training": "train/seconds",
}
"""Titles of the table's columns, and the keys of ``metrics.json`` behind them. A column is shown if
a job has its figure."""
ORDER = (
    "segment/miou",
    "linear_official/top1",
    "linear/top1",
    "knn/top1",
    "dense/knn_miou",
    "label_free/feature_rank_me",
    "label_free/rank_me",
)
"""The figures by which jobs are sorted, larger is better; the first that any job has. Without them
the loss counts, smaller is better."""
LOSS = "train/loss"


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
    jobs = [read_job(sweep / name, overrides, queue) for name, overrides in planned.items()]
    return with_settings(jobs)


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
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from moco.cli.run_names import job_name, swept_keys

    try:
        running = yaml.safe_load((sweep / MULTIRUN).read_text(encoding="utf-8"))["hydra"]
        params = running["sweeper"].get("params") or {}
        typed = [f"{key}={value}" for key, value in params.items()]
        typed += running["overrides"]["task"]
        # The parser needs the config folder for choices such as backbone=glob(*).
        with hydra_initialized():
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


@contextmanager
def hydra_initialized() -> Iterator[None]:
    """Let Hydra know the config folder inside the block. At the end of a sweep it does already."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from moco.config.parsing import CONFIG_DIR

    if GlobalHydra.instance().is_initialized():
        yield
        return
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        yield


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
    return Job(
        folder, overrides or {UNKNOWN: folder.name}, state, read_status(folder) or {}, figures
    )


def with_settings(jobs: list[Job]) -> list[Job]:
    """Give the jobs of which only the folder is known the settings in which their configs differ.

    These are jobs of earlier commands, and those of an optimizing sweeper.
    """
    unknown = [job for job in jobs if UNKNOWN in job.overrides]
    configs = [flat_config(job.folder) for job in unknown]
    readable = [config for config in configs if config]
    if len(readable) < 2:
        return jobs
    differing = []
    for key in dict.fromkeys(key for config in readable for key in config):
        found = {config.get(key) for config in readable}
        if len(found) > 1:
            differing.append(key)
    if not 0 < len(differing) <= MOST_DIFFERING:
        return jobs  # the names of the folders say more than so many columns
    for job, config in zip(unknown, configs, strict=True):
        if config:
            job.overrides = {key: config.get(key, "") for key in differing}
    return jobs


def flat_config(folder: Path) -> dict[str, str]:
    """Return all settings of a run's config as text, by their keys; empty if it has none."""
    try:
        config = yaml.safe_load((folder / CONFIG).read_text())
    except (OSError, yaml.YAMLError):
        return {}
    flat: dict[str, str] = {}

    def add(prefix: str, value: Any) -> None:
        if not isinstance(value, dict):
            flat[prefix] = "null" if value is None else str(value)
            return
        for key, part in value.items():
            add(f"{prefix}.{key}" if prefix else str(key), part)

    add("", config or {})
    return flat


def as_text(jobs: Sequence[Job]) -> str:
    """Return the table for people: a line for each job, the best first, and means over seeds.

    Lines below it say which settings differ, and by which figure the jobs are sorted.
    """
    keys = list(dict.fromkeys(key for job in jobs for key in job.overrides))
    columns = {}
    for title, figure in COLUMNS.items():
        if any(figure in job.figures for job in jobs):
            columns[title] = figure
    # In most sweeps no job has anything to say.
    last = ["message"] if any(job.status.get("message") for job in jobs) else []
    rows = [[*keys, "state", *columns, *last]]
    deciding = deciding_figure(jobs)
    for job in sorted_jobs(jobs, deciding):
        values = [job.overrides.get(key, "") for key in keys]
        figures = [format_figure(job.figures.get(name), name) for name in columns.values()]
        messages = [job.status.get("message", "") for _ in last]
        rows.append([*values, job.state, *figures, *messages])
    for group in groups_of_seeds(jobs):
        shared = group[0].overrides | {SEED: f"mean of {len(group)}"}
        values = [shared.get(key, "") for key in keys]
        figures = [mean_and_spread(group, name) for name in columns.values()]
        rows.append([*values, "", *figures, *("" for _ in last)])
    return "\n".join([align(rows), *differing_settings(jobs), *order_line(deciding, columns)])


def deciding_figure(jobs: Sequence[Job]) -> str | None:
    """Return the figure by which the jobs are sorted, or None if there is none yet."""
    for name in (*ORDER, LOSS):
        if any(is_number(job.figures.get(name)) for job in jobs):
            return name
    return None


def is_number(figure: Any) -> bool:
    """Return whether this is a finite figure."""
    return isinstance(figure, (int, float)) and math.isfinite(figure)


def sorted_jobs(jobs: Sequence[Job], figure: str | None) -> list[Job]:
    """Return the finished jobs with the best first, then the others, in their order."""
    if figure is None:
        return list(jobs)
    measured, others = [], []
    for job in jobs:
        if job.state == "finished" and is_number(job.figures.get(figure)):
            measured.append(job)
        else:
            others.append(job)
    measured.sort(key=lambda job: job.figures[figure], reverse=figure != LOSS)
    return [*measured, *others]


def order_line(figure: str | None, columns: Mapping[str, str]) -> list[str]:
    """Return the line that says how the jobs are sorted."""
    if figure is None:
        return []
    (title,) = [title for title, name in columns.items() if name == figure]
    line = f"sorted by {title}, the best first"
    if figure == LOSS:
        line += " (losses compare only where temperature and queue size are the same)"
    elif figure.startswith("label_free/"):
        line += " (no labels: a higher effective rank is often, not always, the better encoder)"
    return [line]


def differing_settings(jobs: Sequence[Job]) -> list[str]:
    """Return a line that says which settings differ among the jobs, with their values.

    It is left out for a single job, and where only the names of folders are known.
    """
    values: dict[str, dict[str, None]] = {}  # of each setting, in order, each once
    for job in jobs:
        for key, value in job.overrides.items():
            values.setdefault(key, {})[value] = None
    parts = []
    for key, found in values.items():
        if key != UNKNOWN and len(found) > 1:
            parts.append(f"{key} ({', '.join(found)})")
    if not parts:
        return []
    return [printable(f"the jobs differ in {'; '.join(parts)}")]


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
    if name == "verdict":
        return str(figure).partition(":")[0]  # the reasons are too long for a table
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
