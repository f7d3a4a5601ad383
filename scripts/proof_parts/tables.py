"""The page of the proof, and its figure, from the lines of the results."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from proof_parts.comparisons import Comparison, compare, mean_and_deviation, rank_correlation
from proof_parts.grid import COMPARISONS, DATA_SETS, ROWS, TUNINGS, DataSet, Row

Line = Mapping[str, Any]
"""A line of the results: what one cell of the grid came to."""

MONITORS = {"final_dense": "`monitor.dense`", "final_knn": "image-level kNN"}
MARKERS = {"fine-tuned": "^", "frozen": "o"}
NOT_RUN = "not yet run"
INTRODUCTION = """\
# Does pretraining help segmentation?

<!-- Written by scripts/segmentation_proof.py --tables: change the script, not this page -->

The figures are mIoU in % on the held-out images: the mean and the standard deviation over seeds. A
seed decides about the initial weights, the order of the images, and which images are labelled. All
rows of a table have the same number of steps, in pretraining and in fine-tuning, and the same
images. Rows that are "not yet run" have no figure yet.

- **Pretraining** is MoCo v2+ on unlabelled tiles of the training images.
- **fine-tuned** trains all weights, with an FPN of 128 channels, for few steps.
- **frozen** trains a linear decoder alone. A frozen network "from scratch" has random weights.
- The crops and the attention windows of the fine-tuning are about twice those of the pretraining.

A comparison is the difference of two rows in points of mIoU, with the 95 % interval of the paired t
distribution over seeds. The first p is that of the paired t test over seeds. The second is that of
Wilcoxon's signed-rank test over images, each with its mean over seeds. No p is corrected for the
number of comparisons.
"""


class Group(NamedTuple):
    """The cells of a table's column: all of them have the same data and way of fine-tuning."""

    data_set: str
    tuning: str
    label_fraction: float


def group_of(line: Line) -> Group:
    """Return the column of a line."""
    return Group(line["data_set"], line["tuning"], line["label_fraction"])


def by_group(lines: Iterable[Line]) -> dict[Group, dict[str, dict[int, Line]]]:
    """Return the lines by group, row and seed."""
    found: dict[Group, dict[str, dict[int, Line]]] = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        found[group_of(line)][line["row"]][line["seed"]] = line
    return found


def page(lines: Sequence[Line], figure_name: str | None) -> str:
    """Return the page in Markdown.

    Args:
        lines: of one scale.
        figure_name: the file of the figure beside the page; None: there is none.
    """
    groups = by_group(lines)
    parts = [INTRODUCTION]
    for data_set in DATA_SETS:
        if not any(group.data_set == data_set.name for group in groups):
            parts.append(f"## {data_set.title}\n\n{NOT_RUN.capitalize()}.\n")
            continue
        parts.append(f"## {data_set.title}\n\n{protocol(data_set, lines)}\n")
        for tuning in TUNINGS:
            parts.append(f"### {data_set.title}, {tuning}\n")
            parts.append(scores_table(data_set, tuning, groups))
            parts.append(comparisons_table(data_set, tuning, groups))
    parts.append(monitors_section(groups, figure_name))
    parts.append(machines_section(lines))
    return "\n".join(parts)


def protocol(data_set: DataSet, lines: Sequence[Line]) -> str:
    """Return a sentence about the sizes and steps of a dataset's cells."""
    pretrained_steps = set()
    tuning_steps = set()
    num_images = set()
    for line in lines:
        if line["data_set"] == data_set.name:
            tuning_steps.add(line["steps"])
            num_images.add(len(line["images"]["miou"]))
            if line["pretraining"] is not None:
                pretrained_steps.add(line["pretraining"]["steps"])
    budget = data_set.budgets[lines[0]["scale"]]
    return "\n".join(
        [
            f"Pretraining: {budget.image_size} px, windows of {budget.window}, "
            f"{listed(pretrained_steps)} steps of {budget.pretraining_batch} images.",
            f"Fine-tuning: {budget.new_image_size} px, windows of {budget.new_window}, "
            f"{listed(tuning_steps)} steps of {budget.tuning_batch}.",
            f"Measured on {listed(num_images)} images (`{data_set.held_out}`).",
        ]
    )


def listed(numbers: Iterable[int]) -> str:
    """Return different numbers in one text."""
    return ", ".join(f"{number:,}" for number in sorted(numbers)) or "no"


def scores_table(
    data_set: DataSet, tuning: str, groups: Mapping[Group, Mapping[str, Mapping[int, Line]]]
) -> str:
    """Return a Markdown table: a row for each network, a column for each share of labels."""
    header = ["row"]
    for fraction in data_set.label_fractions:
        header.append(f"{fraction:.0%} of the labels")
    rows = []
    for row in ROWS:
        cells = [row.title]
        for fraction in data_set.label_fractions:
            of_seeds = groups.get(Group(data_set.name, tuning, fraction), {}).get(row.name, {})
            cells.append(score([line["miou"] for line in of_seeds.values()]))
        rows.append(cells)
    return markdown_table(header, rows)


def score(values: Sequence[float]) -> str:
    """Return mean, standard deviation and number of seeds of mIoUs from 0 to 1, in %."""
    if not values:
        return NOT_RUN
    mean, deviation = mean_and_deviation(values)
    if deviation is None:
        return f"{100 * mean:.1f} (1 seed)"
    return f"{100 * mean:.1f} ± {100 * deviation:.1f} ({len(values)})"


def comparisons_table(
    data_set: DataSet, tuning: str, groups: Mapping[Group, Mapping[str, Mapping[int, Line]]]
) -> str:
    """Return a Markdown table of the comparisons that have been run; "" without any."""
    titles = {row.name: row.title for row in ROWS}
    header = ["comparison"]
    for fraction in data_set.label_fractions:
        header.append(f"{fraction:.0%} of the labels")
    rows = []
    for ours, theirs in COMPARISONS:
        cells = [f"{titles[ours]} **against** {titles[theirs]}"]
        for fraction in data_set.label_fractions:
            group = groups.get(Group(data_set.name, tuning, fraction), {})
            found = compare(group.get(ours, {}), group.get(theirs, {}))
            cells.append(shown_comparison(found))
        if any(cell != NOT_RUN for cell in cells[1:]):
            rows.append(cells)
    if not rows:
        return ""
    return markdown_table(header, rows)


def shown_comparison(found: Comparison | None) -> str:
    """Return a comparison in one cell of a table, in points of mIoU."""
    if found is None:
        return NOT_RUN
    text = f"{100 * found.difference:+.1f}"
    if found.interval is not None:
        low, high = found.interval
        text += f" [{100 * low:+.1f}, {100 * high:+.1f}]"
    p_of_seeds = "-" if found.p_of_seeds is None else shown_p(found.p_of_seeds)
    return f"{text}, p {p_of_seeds} and {shown_p(found.p_of_images)}"


def shown_p(p: float) -> str:
    """Return a p value with two digits, and "<0.001" below that."""
    return "<0.001" if p < 0.001 else f"{p:.2g}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table that ends with an empty line."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


class Choice(NamedTuple):
    """What the monitors of a group's pretrainings say about the mIoU after fine-tuning."""

    group: Group
    runs: int
    correlations: dict[str, float | None]
    """Spearman's rank correlation of each monitor with the final mIoU."""
    lost: dict[str, float]
    """The mIoU of the best run, minus that of the run with the highest monitor."""


def monitored(rows: Mapping[str, Mapping[int, Line]]) -> list[Line]:
    """Return the lines of a group whose pretraining was monitored, one for each pretraining."""
    own: list[Row] = []
    for row in ROWS:
        # Other windows on the same weights have the same monitors.
        if row.pretraining is not None and row.windows == "exact":
            own.append(row)
    found = []
    for row in own:
        for line in rows.get(row.name, {}).values():
            values = [line["pretraining"][monitor] for monitor in MONITORS]
            if None not in values:
                found.append(line)
    return found


def choices(groups: Mapping[Group, Mapping[str, Mapping[int, Line]]]) -> list[Choice]:
    """Return how well each monitor ranks the runs, group by group."""
    found = []
    for group in sorted(groups):
        lines = monitored(groups[group])
        scores = [line["miou"] for line in lines]
        correlations = {}
        lost = {}
        for monitor in MONITORS:
            values = [line["pretraining"][monitor] for line in lines]
            correlations[monitor] = rank_correlation(values, scores)
            if lines:
                lost[monitor] = max(scores) - scores[int(np.argmax(values))]
        if None not in correlations.values():
            found.append(Choice(group, len(lines), correlations, lost))
    return found


def monitors_section(
    groups: Mapping[Group, Mapping[str, Mapping[int, Line]]], figure_name: str | None
) -> str:
    """Return the section about the monitors: one sentence, a figure, and a table."""
    title = "## Which monitor picks the better pretraining?\n"
    found = choices(groups)
    if not found:
        return f"{title}\n{NOT_RUN.capitalize()}.\n"
    rows = []
    for choice in found:
        group = choice.group
        cells = [group.data_set, group.tuning, f"{group.label_fraction:.0%}", str(choice.runs)]
        for monitor in MONITORS:
            correlation = f"{choice.correlations[monitor]:+.2f}"
            cells.append(f"{correlation} ({100 * choice.lost[monitor]:.1f})")
        rows.append(cells)
    header = ["data", "fine-tuning", "labels", "runs"]
    header += [f"{name}: rank correlation (points lost)" for name in MONITORS.values()]
    parts = [title, f"{sentence(found)}\n"]
    if figure_name is not None:
        parts.append(f"![mIoU after fine-tuning against the two monitors]({figure_name})\n")
    parts.append(
        "The classes of the image-level kNN are those of tiles: the class of most pixels, or with "
        "two\nclasses the quarter into which the share of the foreground falls. Points lost: the "
        "mIoU of the best\nrun, minus that of the run that the monitor picks.\n"
    )
    parts.append(markdown_table(header, rows))
    return "\n".join(parts)


def sentence(found: Sequence[Choice]) -> str:
    """Return the finding about the monitors in one sentence."""
    means = {}
    for monitor in MONITORS:
        means[monitor] = float(np.mean([choice.correlations[monitor] for choice in found]))
    wins = 0
    for choice in found:
        dense, knn = (choice.correlations[monitor] for monitor in MONITORS)
        wins += dense > knn  # type: ignore[operator]  # `choices` leaves None out
    return (
        "The final `monitor.dense` has a mean rank correlation of "
        f"{means['final_dense']:+.2f} with the mIoU after\nfine-tuning, the image-level kNN one of "
        f"{means['final_knn']:+.2f}; the dense monitor ranks the runs better in {wins} of\n"
        f"{len(found)} columns of the tables above."
    )


def machines_section(lines: Sequence[Line]) -> str:
    """Return the section about machines, times and commands."""
    machines = defaultdict(int)
    for line in lines:
        machine = line["machine"]
        device = machine["device"]
        name = f"{machine['threads']} threads of {machine['cpu']}" if device == "cpu" else device
        machines[f"{name}, torch {machine['torch']}"] += 1
    rows = []
    for name, count in sorted(machines.items()):
        rows.append([name, str(count)])
    seconds: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        seconds["fine-tuning"].append(line["seconds"])
        if line["pretraining"] is not None:
            seconds["pretraining"].append(line["pretraining"]["seconds"])
    times = []
    for kind, values in sorted(seconds.items()):
        times.append(f"{kind} {np.median(values) / 60:.1f} minutes at the median")
    table = markdown_table(["machine", "cells"], rows)
    return (
        "## Commands and machines\n\n"
        "```sh\n"
        "python scripts/segmentation_proof.py --data DATA --folder RUNS \\\n"
        "    --results docs/segmentation_results.jsonl\n"
        "python scripts/segmentation_proof.py --tables\n"
        "```\n\n"
        f"{table}\nA run took: {', '.join(times)}.\n"
    )


def write_figure(lines: Sequence[Line], path: Path) -> bool:
    """Draw the mIoU after fine-tuning over the final value of each monitor.

    The mIoU is drawn as the distance from the mean of its column of the tables, in points, because
    columns with more labels lie higher.

    Returns:
        Whether there was anything to draw.
    """
    points: dict[tuple[str, str], list[tuple[Line, float]]] = defaultdict(list)
    groups = by_group(lines)
    for group in sorted(groups):
        runs = monitored(groups[group])
        if runs:
            mean = np.mean([line["miou"] for line in runs])
            for line in runs:
                distance = 100 * float(line["miou"] - mean)
                points[group.data_set, group.tuning].append((line, distance))
    if not points:
        return False
    colours = {data_set.name: f"C{number}" for number, data_set in enumerate(DATA_SETS)}
    titles = {data_set.name: data_set.title for data_set in DATA_SETS}
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    plots = figure.subplots(1, len(MONITORS), sharey=True)
    for plot, (monitor, title) in zip(plots, MONITORS.items(), strict=True):
        for (data_set, tuning), found in points.items():
            plot.scatter(
                [line["pretraining"][monitor] for line, _ in found],
                [distance for _, distance in found],
                s=16,
                alpha=0.7,
                color=colours[data_set],
                marker=MARKERS[tuning],
                label=f"{titles[data_set]}, {tuning}",
            )
        plot.axhline(0, color="grey", linewidth=0.5)
        plot.set_xlabel(f"{title.strip('`')} at the end of pretraining")
    plots[0].set_ylabel("mIoU after fine-tuning,\npoints above the mean of the column")
    plots[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)
    return True
