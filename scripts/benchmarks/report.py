"""Rows as a table to read and as JSON to keep."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.turns import Row

WIDTH = 200  # of a table that goes to a file: no terminal would say


def table(rows: Sequence[Row]) -> Table:
    """Medians, the lowest and highest turn, and the time over each reference's: below 1 is faster than it."""
    references = list(dict.fromkeys(reference for row in rows for reference in row.ratios))
    has_images = any(row.images_per_second for row in rows)
    has_memory = any("peak_mib" in row.turns[0] for row in rows)
    built = Table("case", "contender", box=box.MARKDOWN)
    for name in ("ms", "lowest to highest", *["images/s"] * has_images, *["peak MiB"] * has_memory):
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
    """Three digits, or all those before the point."""
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def show(console: Console, rows: Sequence[Row], machine: dict[str, Any]) -> None:
    """Print the machine and the table."""
    for name, value in machine.items():
        console.print(
            f"{name}: {', '.join(value) if isinstance(value, list) else value}", highlight=False
        )
    if rows:
        console.print(table(rows))


def write(
    path: Path,
    benchmark: str,
    settings: dict[str, Any],
    machine: dict[str, Any],
    rows: Sequence[Row],
) -> None:
    """Everything that was measured, turn by turn."""
    content = {
        "benchmark": benchmark,
        "settings": settings,
        "machine": machine,
        "rows": [row.as_dict() for row in rows],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
