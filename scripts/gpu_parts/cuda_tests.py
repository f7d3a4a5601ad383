"""Run the tests of tests/ that are marked gpu."""

import os
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gpu_parts.measuring import Context, Unmet, measured
from gpu_parts.results import FAILED as STATE_FAILED
from gpu_parts.results import Result
from gpu_parts.rows import FAILED, PASSED, SKIPPED

REPOSITORY = Path(__file__).resolve().parents[2]
MARK = re.compile(r"\bmark\.gpu\b")


def measure(case: str, context: Context) -> list[Result]:
    """Run the tests in this process, which has imported most of what they need.

    Without a GPU they are all skipped.

    Raises:
        Unmet: none could be run.
    """
    report = context.scratch / "report.xml"
    os.chdir(REPOSITORY)
    options = ["-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
    options += ["--continue-on-collection-errors"]
    # pytest rewrites the assertions of its plugins. One of them, hydra, is imported already.
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    code = pytest.main([*options, *map(str, files())])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise Unmet(f"pytest ended with {pytest.ExitCode(code).name}, see the log")
    counts, names = read_report(report)
    results = [measured(case, name, "tests", count) for name, count in counts.items()]
    if names:
        error = f"{len(names)}: {', '.join(names)}"
        results[list(counts).index(FAILED)] |= {"state": STATE_FAILED, "error": error}
    return results


def files() -> list[Path]:
    """Return the files with such tests: importing the others would take longer than the tests."""
    paths = sorted((REPOSITORY / "tests").rglob("test_*.py"))
    return [path for path in paths if MARK.search(path.read_text())]


def read_report(report: Path) -> tuple[dict[str, int], list[str]]:
    """Return how many tests passed, failed and were skipped, and the names of the failed ones."""
    counts, names = {PASSED: 0, FAILED: 0, SKIPPED: 0}, []
    for test in ElementTree.parse(report).iter("testcase"):
        outcomes = {child.tag for child in test}
        if outcomes & {"failure", "error"}:
            counts[FAILED] += 1
            names.append(test.get("name", ""))
        elif "skipped" in outcomes:
            counts[SKIPPED] += 1
        else:
            counts[PASSED] += 1
    return counts, names
