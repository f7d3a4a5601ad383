"""Rehearse scripts/gpu_check.py on a CPU.

The tests check that every row is filled, that a second start continues, and how failures are
reported.
"""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.processes import run_to_end, wait_until
from tests.scripts.test_benchmark import STAND_IN

REHEARSAL = "rehearsal on a CPU, tiny sizes: the figures mean nothing"


@pytest.fixture(scope="module")
def check():
    """Return the module of the program; the folder of the scripts is on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "scripts")
        yield importlib.import_module("gpu_check")


@pytest.fixture
def rehearse(check, tmp_path):
    """Run some parts in child processes; return the exit code and the merged file."""

    def run(*arguments):
        output = tmp_path / "results"
        code = 0
        try:
            check.main(["--rehearse", "--output", str(output), *arguments])
        except SystemExit as ended:
            code = ended.code
        return code, json.loads((output / "gpu_check.json").read_text())

    return run


@pytest.fixture
def official(tmp_path):
    """Make a checkout of the official code with a text as the file of its class."""

    def checkout(text):
        folder = tmp_path / "official" / "moco"
        folder.mkdir(parents=True)
        (folder / "builder.py").write_text(text)
        return f"official={folder.parent}"

    return checkout


def states(content, part):
    return {(row["case"], row["contender"]): row["state"] for row in content["parts"][part]["rows"]}


@pytest.mark.slow
def test_parts_are_measured_and_a_second_start_goes_on_with_what_is_missing(
    check, rehearse, capsys
):
    code, content = rehearse("loss")
    assert code == 0
    assert content["rehearsal"]
    loss = content["parts"]["loss"]
    assert loss["complete"]
    rows = check.rows_of("loss", check.TINY_SIZES)
    assert [(row["case"], row["contender"]) for row in loss["rows"]] == [
        (row.case, row.contender) for row in rows
    ]
    for row in loss["rows"]:
        if row["contender"] != "lightly":
            assert row["state"] == "measured"
            assert 0 < row["lowest"] <= row["value"] <= row["highest"]
    assert not content["parts"]["knn"]["rows"]
    code, again = rehearse("loss", "knn")
    assert code == 0
    assert again["parts"]["loss"] == loss
    assert again["parts"]["knn"]["complete"]
    assert "loss: done before" in capsys.readouterr().out


@pytest.mark.slow
def test_one_case_is_measured_again_and_the_others_are_kept(rehearse):
    _, before = rehearse("loss")
    _, after = rehearse("loss", "--again", "loss: N 8, K 64")
    old, new = (content["parts"]["loss"]["rows"] for content in (before, after))
    assert [row for row in old if row["case"] != "N 8, K 64"] == [
        row for row in new if row["case"] != "N 8, K 64"
    ]
    assert [row for row in old if row["case"] == "N 8, K 64"] != [
        row for row in new if row["case"] == "N 8, K 64"
    ]
    assert len(old) == len(new)


@pytest.mark.slow
def test_the_merged_file_alone_is_enough_to_go_on(rehearse, tmp_path):
    _, before = rehearse("loss")
    for path in (tmp_path / "results").iterdir():
        if path.name != "gpu_check.json":
            path.unlink()
    _, after = rehearse("loss")
    assert after["parts"] == before["parts"]


@pytest.mark.slow
def test_a_part_that_fails_is_a_row_and_the_others_go_on(rehearse, monkeypatch, tmp_path):
    def failing(case, context):
        raise ValueError("broken\nsecond line")

    monkeypatch.setattr("gpu_parts.losses.measure", failing)
    code, content = rehearse("loss", "knn")
    assert code == 1
    assert set(states(content, "knn").values()) <= {"measured", "absent"}
    assert set(states(content, "loss").values()) == {"failed"}
    (error,) = {row["error"] for row in content["parts"]["loss"]["rows"]}
    assert error == "ValueError: broken"
    results = tmp_path / "results"
    assert "Traceback" in (results / "loss.log").read_text()
    assert f"| failed: {error}" in (results / "gpu_check.md").read_text()


@pytest.mark.slow
def test_a_process_that_dies_costs_its_case_alone(check, rehearse, monkeypatch):
    losses = importlib.import_module("gpu_parts.losses")
    measure = losses.measure

    def dying(case, context):
        if case == "N 8, K 128":
            check.os._exit(7)
        return measure(case, context)

    monkeypatch.setattr(losses, "measure", dying)
    code, content = rehearse("loss")
    assert code == 1
    found = states(content, "loss")
    assert len(found) == len(check.rows_of("loss", check.TINY_SIZES))
    failed = [row for row in content["parts"]["loss"]["rows"] if row["state"] == "failed"]
    assert {row["case"] for row in failed} == {"N 8, K 128"}
    assert {row["error"] for row in failed} == {
        "RuntimeError: its process ended with status 7, see loss.log"
    }


@pytest.mark.slow
def test_a_part_that_takes_too_long_is_ended_and_keeps_what_it_has(
    check, rehearse, monkeypatch, tmp_path
):
    losses = importlib.import_module("gpu_parts.losses")
    measure = losses.measure
    sleeper_file = tmp_path / "sleeper"

    def slow(case, context):
        if case == "N 16, K 64":
            # It belongs to the group of processes that the check kills. If the tests are killed
            # before, it ends by itself.
            sleeper = subprocess.Popen(["sleep", "60"])
            sleeper_file.write_text(str(sleeper.pid))
            sleeper.wait()
        return measure(case, context)

    def sleeper_started():
        return sleeper_file.exists() and sleeper_file.read_text()

    start = check.started_process

    def started_process(*arguments):
        """The time of the part is over when the sleeper has started."""
        process = start(*arguments)
        join = process.join

        def join_with_limit(limit=None):
            if limit is None:
                return join()
            return wait_until(sleeper_started, "the sleeper")

        process.join = join_with_limit
        return process

    monkeypatch.setattr(losses, "measure", slow)
    monkeypatch.setattr(check, "started_process", started_process)
    code, content = rehearse("loss")
    assert code == 0
    assert content["parts"]["loss"]["out_of_time"]
    done = {case for case, _ in states(content, "loss")}
    assert {"N 8, K 64", "N 8, K 128"} <= done
    assert "N 16, K 64" not in done
    report = (tmp_path / "results" / "gpu_check.md").read_text()
    assert "| N 16, K 64 | ours | ms | no time left |" in report
    state = run_to_end("ps", "-o", "stat=", "-p", sleeper_file.read_text()).stdout.strip()
    assert not state or state.startswith("Z")  # it was ended with its part
    monkeypatch.undo()
    code, content = rehearse("loss")
    assert code == 0
    assert content["parts"]["loss"]["complete"]
    assert not content["parts"]["loss"]["out_of_time"]


def test_without_a_gpu_one_line_says_so(check, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit) as ended:
        check.main(["--output", str(tmp_path / "results")])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "error: no CUDA device can be used here; --rehearse tries everything on the CPU"
    )
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["setp"], "error: unknown part 'setp'; did you mean 'step'?"),
        (["--npz", "/nowhere.npz"], "error: --npz /nowhere.npz: no such file"),
        (
            ["--against", "official=/nowhere"],
            "error: --against official=/nowhere: no moco/builder.py there",
        ),
        (["--again", "nothing"], "error: --again nothing: it matches no part"),
        (
            ["--write-docs", "/nowhere"],
            "error: /nowhere/gpu_check.json: not a readable file of results",
        ),
    ],
)
def test_a_mistake_in_the_command_is_one_line(check, capsys, tmp_path, arguments, line):
    with pytest.raises(SystemExit) as ended:
        check.main(["--rehearse", "--output", str(tmp_path), *arguments])
    assert ended.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(line)


@pytest.mark.slow
def test_a_rehearsal_never_comes_into_the_documentation(check, rehearse, capsys, tmp_path):
    rehearse("loss")
    page = check.PAGE.read_text()
    with pytest.raises(SystemExit) as ended:
        check.main(["--write-docs", str(tmp_path / "results")])
    assert ended.value.code == 2
    assert "it holds a rehearsal" in capsys.readouterr().err
    assert check.PAGE.read_text() == page
    assert not check.KEPT.exists() or "rehearsal" not in check.KEPT.read_text()


def test_the_page_has_the_table_that_the_rows_make(check):
    tables = importlib.import_module("gpu_parts.tables")
    before, after = tables.around_markers(check.PAGE)
    made = tables.tables(check.rows(check.FULL), tables.kept_results(check.KEPT))
    assert check.PAGE.read_text() == f"{before}{tables.BEGIN}\n\n{made}\n\n{tables.END}{after}"


def test_figures_come_into_the_page_row_by_row(check, tmp_path):
    tables = importlib.import_module("gpu_parts.tables")
    page, kept = tmp_path / "gpu.md", tmp_path / "gpu.json"
    page.write_text(f"# Title\n\n{tables.BEGIN}\nold\n{tables.END}\n\nThe end.\n")
    rows = check.rows(check.FULL)

    def take(device, *results):
        parts = {"loss": {"rows": list(results)}}
        content = {"rehearsal": False, "machine": {"device": device, "torch": "2"}, "parts": parts}
        (tmp_path / "gpu_check.json").write_text(json.dumps(content))
        return tables.write_docs(tmp_path, page, kept, rows)

    case = {"case": "N 256, K 4,096", "unit": "ms"}
    ours = {
        **case,
        "contender": "ours",
        "state": "measured",
        "value": 0.123,
        "turns": [1],
        "ratios": {"plain form": 2},
    }
    assert (
        take(
            "one GPU",
            ours,
            {**case, "contender": "lightly", "state": "absent", "note": "not installed"},
        )
        == 1
    )
    plain = {**case, "contender": "plain form", "state": "failed", "error": "out | of memory"}
    assert take("another GPU", plain) == 1
    # A measured row stays where a later check has no figure for it.
    assert take("another GPU", {**ours, "state": "failed", "error": "out of memory"}) == 1
    text = page.read_text()
    assert text.startswith("# Title\n\n")
    assert text.endswith("\n\nThe end.\n")
    lines = text.splitlines()
    assert "| N 256, K 4,096 | two matrix products | ms | not yet run |  |" in lines
    assert "| N 256, K 4,096 | ours | ms | 0.123 | plain form 2.00 |" in lines
    assert "| N 256, K 4,096 | plain form | ms | failed: out \\| of memory |  |" in lines
    assert "| N 256, K 4,096 | lightly | ms | not installed |  |" in lines
    assert {
        "Measured on: device one GPU, torch 2.",
        "Measured on: device another GPU, torch 2.",
    } <= set(lines)


def test_every_part_has_rows_a_share_and_a_module(check):
    parts = list(dict.fromkeys(row.part for row in check.rows(check.FULL)))
    assert parts == list(check.PARTS) == list(check.SHARES) == list(check.measuring.MODULES)
    for sizes in (check.FULL, check.TINY_SIZES):
        keys = [check.tables.key_of_row(row) for row in check.rows(sizes)]
        assert len(set(keys)) == len(keys)


def test_drawn_shapes_are_ten_classes_that_can_be_told_apart():
    shapes = importlib.import_module("gpu_parts.shapes")
    images, labels = shapes.draw(400, 16, seed=0)
    assert images.shape == (400, 16, 16, 3)
    assert set(labels) == set(range(shapes.NUM_CLASSES))
    assert (shapes.draw(400, 16, seed=0)[0] == images).all()
    axis = np.linspace(-1, 1, 65)
    masks = shapes.masks(*np.meshgrid(axis, axis))
    assert len({mask.tobytes() for mask in masks}) == shapes.NUM_CLASSES


@pytest.mark.slow
def test_a_rehearsal_fills_every_row(tmp_path, official):
    command = [sys.executable, "-m", "scripts.gpu_check", "--rehearse"]
    options = ["--output", tmp_path / "results", "--against", official(STAND_IN)]
    done = run_to_end(*command, *options, cwd=REPOSITORY, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "results" / "gpu_check.json").read_text())
    for part in content["parts"].values():
        assert part["complete"]
        for row in part["rows"]:
            expected = {"measured", "absent"} if row["contender"] == "lightly" else {"measured"}
            assert row["state"] in expected, row
    text = (tmp_path / "results" / "gpu_check.md").read_text()
    assert REHEARSAL in text.splitlines()[0]
    assert "not yet run" not in text
    assert "no time left" not in text
