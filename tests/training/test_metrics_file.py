"""``metrics.csv``: one row per step, also after a resume and a crash."""

import copy
import csv
import math

import numpy as np
import pytest

from moco.training.metrics_file import MetricsFile


def table(folder):
    """The file as a dict of dicts, without empty cells."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row.pop("step")) for row in rows]
    assert steps == sorted(set(steps))
    return {
        step: {name: float(figure) for name, figure in row.items() if figure}
        for step, row in zip(steps, rows, strict=True)
    }


def test_the_file_is_what_a_dict_of_all_steps_holds(tmp_path, generator):
    expected, saved, step, last_step = {}, {}, 0, None
    for _ in range(8):  # processes, all but the first of which resume
        logger = MetricsFile(tmp_path, last_step)
        last_step = last_step or 0
        for _ in range(30):
            step += int(generator.integers(0, 2))
            name = f"figure {generator.integers(0, 12)},"  # a comma, which CSV has to quote
            value = float(generator.normal())
            # Lightning's own figures are for the step before.
            row = max(0, step - int(generator.integers(0, 2)))
            logger.log_metrics({name: value}, row)
            expected.setdefault(row, {})[name] = value
            if generator.random() < 0.3:
                logger.save()
                assert table(tmp_path) == expected
                saved = copy.deepcopy(expected)
                if generator.random() < 0.3:
                    last_step = step  # a checkpoint
        # The process is killed. The next one goes on from the checkpoint.
        expected = {row: figures for row, figures in saved.items() if row <= last_step}
        step = last_step
    assert last_step > 20


def test_a_new_run_begins_anew_and_an_empty_one_has_a_header(tmp_path):
    logger = MetricsFile(tmp_path)
    logger.log_metrics({"a": 1.0}, 3)
    logger.finalize("success")
    assert table(tmp_path) == {3: {"a": 1.0}}
    logger = MetricsFile(tmp_path)
    logger.save()
    assert (tmp_path / "metrics.csv").read_text() == "step\n"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize("tail", ["5,0.", "5,0.5,", "\0\0\0", "5"])
def test_a_half_written_row_is_dropped(tmp_path, tail):
    (tmp_path / "metrics.csv").write_text(f"step,a,b\n3,1.5,\n{tail}")
    logger = MetricsFile(tmp_path, last_step=4)
    logger.log_metrics({"b": math.nan, "c": np.float32(2)}, 4)
    logger.save()
    assert (tmp_path / "metrics.csv").read_text() == "step,a,b,c\n3,1.5,,\n4,,nan,2.0\n"


def test_a_name_that_is_not_utf8_is_written_with_escapes(tmp_path):
    logger = MetricsFile(tmp_path)
    logger.log_metrics({"segment/iou/caf\udce9": 0.5}, 1)
    logger.save()
    assert table(tmp_path) == {1: {"segment/iou/caf\\udce9": 0.5}}
