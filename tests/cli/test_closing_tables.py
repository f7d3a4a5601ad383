"""What a program prints last: a command that works for the run's own images."""

import io
import re
import shlex

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console

from moco.cli import closing_tables
from moco.cli.closing_tables import (
    condition_in_words,
    next_steps,
    print_next,
    print_segmentation,
    two_columns,
)
from moco.cli.run_names import checkpoint_name, register_resolvers
from moco.cli.training_run import Run
from moco.config.parsing import CONFIG_DIR, SCHEMAS, parse, register_schemas
from moco.config.segment import SegmentConfig
from moco.config.train import TrainConfig
from moco.data.sources.shards import ShardedImages
from moco.data.sources.source import ArrayImages, DataSource, Labelled
from moco.evaluation.knn_measurement import class_tables
from moco.evaluation.label_free_measurement import figures_table
from moco.evaluation.linear_measurement import Head, grid_table
from moco.evaluation.reports.page import report_page
from moco.evaluation.segmenter_measurement import table_of_classes
from moco.targets import GIVEN


def source_of(labels):
    """A source of four images; labels None: it has none."""
    images = ArrayImages(np.zeros((4, 8, 8), np.uint8), "mine")
    bank = None if labels is None else Labelled(images, np.array(labels))
    return DataSource(images, bank, None, 8)


def config_of(**data):
    config = TrainConfig()
    config.backbone.name = "resnet_tiny"
    config.data.name = "images"
    for key, value in data.items():
        setattr(config.data, key, value)
    return config


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 0, 1, 1], ["python -m moco.evaluate checkpoint=a.ckpt"]),
        (
            None,
            [
                "python -m moco.evaluate checkpoint=a.ckpt",
                "python -m moco.embed checkpoint=a.ckpt output=features.npz",
            ],
        ),
        (
            [3, 3, 3, -1],
            [
                "python -m moco.evaluate checkpoint=a.ckpt evaluation=label_free",
                "python -m moco.embed checkpoint=a.ckpt output=features.npz",
            ],
        ),
    ],
)
def test_the_commands_fit_the_labels(labels, expected):
    assert next_steps(config_of(), "a.ckpt", source_of(labels)) == expected


def test_a_stream_without_labels_is_embedded():
    images = ShardedImages(["0.tar"], 4, 1, 1, 10)
    steps = next_steps(config_of(), "a.ckpt", DataSource(images, None, None, 8))
    assert steps == ["python -m moco.embed checkpoint=a.ckpt output=features.npz"]


def test_settings_that_the_checkpoint_does_not_hand_on_are_in_the_command():
    config = config_of(max_bad_fraction=0.5, max_image_pixels=1_000, target="my data:make")
    config.data.name = "custom"
    (step,) = next_steps(config, "a.ckpt", source_of([0, 1, 0, 1]))
    assert shlex.split(step)[4:] == [
        'data.target="my data:make"',
        "data.max_bad_fraction=0.5",
        "data.max_image_pixels=1000",
    ]


@pytest.mark.parametrize(
    "path",
    ["my run [1]/last.ckpt", "it's (2)/$HOME=1,2.ckpt", 'a"b\\c', "b\\", "2024", "null"],
)
def test_the_command_can_be_copied_into_a_shell_whatever_the_path(path):
    (step,) = next_steps(config_of(), path, source_of([0, 1, 0, 1]))
    stream = io.StringIO()
    print_next(Console(file=stream, width=20), [step])
    name, _, line = stream.getvalue().rstrip("\n").partition(": ")
    assert name == "next"
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "moco.evaluate"]
    register_schemas()
    register_resolvers()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        composed = compose("evaluate", words[3:])
    assert parse(composed, SCHEMAS["evaluate"]).checkpoint == path


def test_objects_of_python_have_no_command():
    config = config_of()
    config.data.name = GIVEN
    assert next_steps(config, "it's", source_of(None)) == ["""moco.load_encoder("it's")"""]
    config.backbone.name = GIVEN
    assert next_steps(config, "a", source_of(None)) == ["moco.load_encoder('a', backbone=module)"]


def segment_run(tmp_path, console, logger):
    config = SegmentConfig(checkpoint=None, logger=logger)
    figures = {"epoch": 1, "step": 2, "segment/miou": 0.5, "segment/pixel_accuracy": 0.6}
    figures |= {"segment/num_images": 3, "segment/inference": "whole"}
    return Run(config, tmp_path / "a run [1]", None, console=console, figures=figures)


def test_a_segmentation_names_a_folder_that_can_be_copied(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for logger, expected in ((["tensorboard"], True), (["csv"], False)):
        stream = io.StringIO()
        run = segment_run(tmp_path, Console(file=stream, width=200), logger)
        print_segmentation(run, ["a"] * 100)
        lines = stream.getvalue().splitlines()
        assert ("or: tensorboard --logdir 'a run [1]'" in lines) == expected
        path = "'checkpoint=\"a run [1]/checkpoints/last.ckpt\"'"
        assert f"next: python -m moco.predict {path} data=images data.root=PATH" in lines


def test_a_job_of_a_sweep_ends_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(closing_tables, "is_sweep_job", lambda: True)
    stream = io.StringIO()
    run = segment_run(tmp_path, Console(file=stream, width=20), ["csv"])
    run.figures |= {"train/loss": 1.5, "verdict": "yes: loss 1.5"}
    print_segmentation(run, ["a"])
    assert stream.getvalue() == ("job a run [1] is done: loss 1.5000, mIoU 0.5000, learning: yes\n")


def test_evaluations_of_a_checkpoint_share_a_folder():
    name = checkpoint_name("runs/flowers/2026-11-30_10-00-00/checkpoints/last.ckpt", None)
    assert name == "flowers_2026-11-30_10-00-00_last"
    assert checkpoint_name("/data/moco_v2_800ep_pretrain.pth.tar", None) == (
        "moco_v2_800ep_pretrain.pth"
    )
    assert checkpoint_name(None, "resnet50") == "untrained_resnet50"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("knn/bank_size", 1437, "1,437"),
        ("image_size", 224, "224 px"),
        ("dense/image_size", 32, "32 px"),
        ("image_size", None, "none"),
        ("linear/lr", 30.0, "30"),
        ("linear/weight_decay", 0.0001, "0.0001"),
        ("linear_official/best_top1", 0.086111, "0.0861"),
        ("knn/recall_backbone", 1.0, "1.0000"),
        ("dense/seed", 12345, "12345"),
        ("dense/maps", [4], "[4]"),
        ("segment/tta", True, "True"),
        ("knn/index", "flat", "flat"),
    ],
)
def test_conditions_have_units_and_as_many_digits_as_they_need(key, value, expected):
    assert condition_in_words(key, value) == expected


def tables_of_evaluations():
    """The tables that moco.evaluate prints below the first one."""
    yield from class_tables(["cat", "class 1"], np.array([[3, 1], [0, 4]]))
    yield grid_table([Head(0.1, 0.01, 0.5), Head(0.3, 0.01, 0.75)], num_epochs=30)
    figures = {"label_free/rank_me": 3.5, "label_free/alignment": 0.25}
    yield figures_table(figures, (40, 8), (40, 4))
    ious = {"segment/iou/cat": 0.5, "segment/dice/cat": None}
    yield table_of_classes(["cat"], ious)


def test_all_tables_of_an_evaluation_have_one_style():
    first = two_columns("kNN classification", [("knn/top1", "0.9639")])
    assert "┌──────────┬────────┐" in shown_lines(first)
    for table in tables_of_evaluations():
        title, table.title = str(table.title), None  # as `print_titled` does
        assert title[0].isupper(), title
        lines = shown_lines(table)
        assert (lines[0][0], lines[0][-1]) == ("┌", "┐")
        assert table.show_header
        for column in table.columns:
            cells = [str(cell) for cell in column.cells]
            is_number = all(re.fullmatch(r"-?[\d.,]+( of \d+)?|not there", cell) for cell in cells)
            assert column.justify == ("right" if is_number else "left"), (title, cells)
        # The page has the same alignment.
        num_texts = sum(column.justify == "left" for column in table.columns)
        page = report_page("title", "headline", [table], [])
        assert page.count('<td class="text">') == num_texts * table.row_count


def shown_lines(table):
    text = io.StringIO()
    Console(file=text, width=80, color_system=None).print(table)
    return text.getvalue().splitlines()
