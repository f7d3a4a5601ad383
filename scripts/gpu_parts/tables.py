"""Write the rows as Markdown, for the folder of results and for docs/gpu.md."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_parts.results import ABSENT, FAILED, MEASURED, MERGED, Result, read_json, write_json
from gpu_parts.rows import PARTS, Row
from moco.errors import InputError

REHEARSAL = "rehearsal on a CPU, tiny sizes: the figures mean nothing"
NOT_YET_RUN, NO_TIME_LEFT = "not yet run", "no time left"
BEGIN, END = "<!-- gpu_check: begin -->", "<!-- gpu_check: end -->"
MACHINE = ("device", "cpu", "cores", "torch", "cuda", "date")
"""The properties of the machine that a table names."""

COLUMNS = (
    "case",
    "contender",
    "unit",
    "result",
    "lowest to highest",
    "time over",
    "peak MiB",
    "start, s",
    "note",
)

Key = tuple[str, str, str]
"""Part, case and contender."""


def key_of(result: Mapping[str, Any]) -> Key:
    return result["part"], result["case"], result["contender"]


def tables(rows: Sequence[Row], results: Iterable[Result], unfinished: Iterable[str] = ()) -> str:
    """Return a heading and a table for each part.

    Args:
        rows: all rows, measured or not.
        results: the results so far, each with its part.
        unfinished: parts that ran out of time.
    """
    found = {key_of(result): result for result in results}
    missing = dict.fromkeys(unfinished, NO_TIME_LEFT)
    sections = []
    for part, heading in PARTS.items():
        of_part = [row for row in rows if row.part == part]
        if of_part:
            table = table_of(of_part, found, missing.get(part, NOT_YET_RUN))
            where = machines(found[key] for key in map(key_of_row, of_part) if key in found)
            sections.append("\n\n".join([f"## {heading} (`{part}`)", *where, table]))
    return "\n\n".join(sections)


def key_of_row(row: Row) -> Key:
    return row.part, row.case, row.contender


def table_of(rows: Sequence[Row], found: Mapping[Key, Result], missing: str) -> str:
    """Return the table of one part, without columns that no row fills.

    Args:
        missing: the state of a row without a result.
    """
    lines = []
    for row in rows:
        result = found.get(key_of_row(row))
        state = missing if result is None else value_of(result)
        line = {"case": row.case, "contender": row.contender, "unit": row.unit, "result": state}
        if result is not None:
            line |= details_of(result)
        lines.append(line)
    columns = [column for column in COLUMNS if any(line.get(column) for line in lines)]
    written = [markdown_row(columns), "|" + "---|" * len(columns)]
    written += [markdown_row([line.get(column, "") for column in columns]) for line in lines]
    return "\n".join(written)


def markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def value_of(result: Result) -> str:
    """Return the figure, or why there is none."""
    if result["state"] == MEASURED:
        return figure(result["value"])
    if result["state"] == FAILED:
        return f"failed: {result['error']}"
    return result["note"]


def details_of(result: Result) -> dict[str, str]:
    """Return the other cells of a row that are known."""
    cells = {}
    if "lowest" in result:
        cells["lowest to highest"] = f"{figure(result['lowest'])} to {figure(result['highest'])}"
    others = []
    for name, ratio in result.get("ratios", {}).items():
        if name != result["contender"]:
            others.append(f"{name} {ratio:.2f}")
    if others:
        cells["time over"] = ", ".join(others)
    if "peak_mib" in result:
        cells["peak MiB"] = figure(result["peak_mib"])
    if "start_seconds" in result:
        cells["start, s"] = figure(result["start_seconds"])
    if result["state"] != ABSENT:
        cells["note"] = result.get("note", "")
    return cells


def figure(value: float) -> str:
    """Return a value with three digits, or as a whole number from 100 on."""
    if float(value).is_integer() or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def machines(results: Iterable[Result]) -> list[str]:
    """Return a line for each machine that the results come from."""
    named = [result["measured_on"] for result in results if "measured_on" in result]
    return list(dict.fromkeys(named))


def described(machine: Mapping[str, Any]) -> str:
    """Return the description of a machine in one line."""
    named = ", ".join(f"{name} {machine[name]}" for name in MACHINE if name in machine)
    return f"Measured on: {named}."


def report(rows: Sequence[Row], content: Mapping[str, Any]) -> str:
    """Return the whole Markdown file of a folder of results."""
    heading = f"GPU check: {REHEARSAL}" if content["rehearsal"] else "GPU check"
    unfinished = [part for part, of_part in content["parts"].items() if of_part["out_of_time"]]
    parts = tables(rows, results_of(content), unfinished)
    sections = [f"# {heading}", described(content["machine"]), parts, *curves(content)]
    return "\n\n".join(sections) + "\n"


def results_of(content: Mapping[str, Any]) -> list[Result]:
    """Return all rows of a merged file, each with its part."""
    found = []
    for part, of_part in content["parts"].items():
        found += [{"part": part, **row} for row in of_part["rows"]]
    return found


def curves(content: Mapping[str, Any]) -> list[str]:
    """Return the curve of the speed run, if there is one."""
    written = []
    for row in results_of(content):
        if "curve" not in row:
            continue
        names = list(row["curve"][0])
        lines = [markdown_row(names), "|" + "---|" * len(names)]
        lines += [markdown_row([figure(point[name]) for name in names]) for point in row["curve"]]
        written += [f"## Curve of {row['case']}", "\n".join(lines)]
    return written


def write_docs(folder: Path, page: Path, kept: Path, rows: Sequence[Row]) -> int:
    """Add the results of a folder to the documentation, row by row.

    Args:
        folder: has the merged file of a check on a GPU.
        page: the Markdown file; the text between its two marker comments is replaced.
        kept: the JSON file beside it. Its rows stay if the folder has no figure for them.

    Returns:
        The number of rows for which the documentation has a figure.

    Raises:
        InputError: there are no results, or they come from a rehearsal.
    """
    content = read_json(folder / MERGED)
    if content["rehearsal"]:
        raise InputError(f"--write-docs {folder}: it holds a rehearsal, whose figures mean nothing")
    found = {key_of(result): result for result in kept_results(kept)}
    known = {key_of_row(row) for row in rows}
    where = described(content["machine"])
    for result in results_of(content):
        before = found.get(key_of(result), {})
        is_loss = before.get("state") == MEASURED and result["state"] != MEASURED
        if key_of(result) in known and not is_loss:
            found[key_of(result)] = without_turns(result) | {"measured_on": where}
    found = {key: result for key, result in found.items() if key in known}
    write_json(kept, {"rows": list(found.values())})
    before, after = around_markers(page)
    page.write_text(f"{before}{BEGIN}\n\n{tables(rows, found.values())}\n\n{END}{after}")
    return sum(result["state"] == MEASURED for result in found.values())


def kept_results(kept: Path) -> list[Result]:
    """Return the rows that the documentation has so far."""
    return read_json(kept)["rows"] if kept.exists() else []


def without_turns(result: Result) -> Result:
    """Return a row as the documentation keeps it, without every turn."""
    return {name: value for name, value in result.items() if name not in ("turns", "curve")}


def around_markers(page: Path) -> tuple[str, str]:
    """Return the text before and after the tables.

    Raises:
        InputError: the page lacks its two marker comments.
    """
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise InputError(f"{page}: expected the lines {BEGIN} and {END}, once each")
    before, rest = text.split(BEGIN)
    return before, rest.split(END)[1]
