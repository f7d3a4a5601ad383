"""Show the rows of a benchmark as a table, and write them as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.turns import Row

WIDTH = 200
"""Characters in a line of a table that is not shown in a terminal."""


def table(rows: Sequence[Row]) -> Table:
    """Return the table.

    It has the median, the lowest and the highest turn, and the time over the time of each
    reference. Below 1 is faster than the reference.
    """
    references = list(dict.fromkeys(reference for row in rows for reference in row.ratios))
    has_images = any(row.images_per_second for row in rows)
    has_memory = any("peak_mib" in row.turns[0] for row in rows)
    built = Table("case", "contender", box=box.MARKDOWN)
    columns = ["ms", "lowest to highest"]
    if has_images:
        columns.append("images/s")
    if has_memory:
        columns.append("peak MiB")
    for name in columns:
        built.add_column(name, justify="right", no_wrap=True)
    for name in references:
        built.add_column(f"time / {name}", justify="right")
    for row in rows:
        cells = [row.case, row.contender, milliseconds(row.median("seconds")), spread(row)]
        if has_images:
            cells.append(f"{row.images_per_second:,.4g}" if row.images_per_second else "")
        if has_memory:
            cells.append(f"{row.median('peak_mib'):,.0f}" if "peak_mib" in row.turns[0] else "")
        cells += [f"{row.ratios[name]:.2f}" if name in row.ratios else "" for name in references]
        built.add_row(*cells)
    return built


def spread(row: Row) -> str:
    seconds = [turn["seconds"] for turn in row.turns]
    return f"{milliseconds(min(seconds))} to {milliseconds(max(seconds))}"


def milliseconds(seconds: float) -> str:
    """Return a time in ms with three digits, or as a whole number from 100 on."""
    value = 1e3 * seconds
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def show(console: Console, rows: Sequence[Row], machine: dict[str, Any]) -> None:
    """Print the machine and the table."""
    for name, value in machine.items():
        if isinstance(value, list):
            value = ", ".join(value)
        console.print(f"{name}: {value}", highlight=False)
    if rows:
        console.print(table(rows))


def write(
    path: Path,
    benchmark: str,
    settings: dict[str, Any],
    machine: dict[str, Any],
    rows: Sequence[Row],
) -> None:
    """Write everything that was measured, turn by turn."""
    content = {
        "benchmark": benchmark,
        "settings": settings,
        "machine": machine,
        "rows": [row.as_dict() for row in rows],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
