"""The panel before training: one glance says what is trained, on what and where."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console

from moco.cli import start_panel
from moco.cli.preset_choice import PRESET_FILE
from moco.cli.start_panel import (
    chosen_names,
    describe_images,
    describe_loss,
    describe_queue,
    describe_steps,
    print_start,
)
from moco.config.train import TrainConfig
from moco.data.sources.source import ArrayImages, DataSource

ROWS = [
    ("images", "24; .jpg"),
    ("run folder", "exp[v2]/a[/b]\x1b\udce9"),
    ("watch it", "word " * 30),
]


@pytest.mark.parametrize("width", [80, 100, 140])
@pytest.mark.parametrize("is_terminal", [True, False])
def test_texts_of_users_are_no_markup_and_a_pipe_gets_plain_lines(width, is_terminal, monkeypatch):
    monkeypatch.setattr(start_panel, "start_rows", lambda *_: ROWS)
    text = io.StringIO()
    console = Console(file=text, width=width, force_terminal=is_terminal, color_system=None)
    print_start(SimpleNamespace(console=console), None, None, None, None)
    lines = text.getvalue().splitlines()
    assert "exp[v2]/a[/b]\\x1b\\udce9" in text.getvalue()
    if is_terminal:
        # What a user copies is in one line, below the panel if it does not fit.
        assert max(map(len, lines[:-1])) <= width
        assert lines[-1] == "watch it: " + "word " * 30
        assert "Pretraining" in lines[0]
    else:
        assert [line.split("  ")[0] for line in lines] == ["images", "run folder", "watch it"]


def test_images_are_described_by_number_format_and_size(image_tree):
    from moco.data.sources.registry import build_source

    Image.new("RGB", (300, 200)).save(image_tree / "a" / "large.jpg")
    source = build_source("images", str(image_tree))
    assert describe_images(source) == "25; .png, .jpg; 20 x 16 to 300 x 200 px"
    pixels = np.zeros((9, 28, 28, 3), np.uint8)
    array = DataSource(ArrayImages(pixels, "digits"), None, None, 28)
    assert describe_images(array) == "9; 28 x 28 px"


def test_steps_are_those_of_the_run():
    config = TrainConfig()
    config.data.batch_size, config.trainer.max_epochs = 64, 12
    assert describe_steps(config, 6_000, None) == "93 an epoch x 12 epochs = 1,116"
    config.trainer.max_steps = 500
    expected = "93 an epoch x 12 epochs = 1,116, ended by trainer.max_steps=500; 40 are done"
    assert describe_steps(config, 6_000, 40) == expected


def test_the_queue_says_why_it_is_small_and_why_the_loss_begins_low():
    config = TrainConfig()
    config.data.batch_size, config.method.queue_size = 128, 32
    assert describe_queue(config, 512) == (
        "32 keys (16 kB), at most a tenth of the images: see K in docs/recipes.md; it may be "
        "smaller than a batch"
    )
    assert "until the first step has filled the queue" in describe_loss(config, 3.5)
    config.method.queue_size = 65_536
    assert describe_queue(config, 512) == (
        "65,536 keys (34 MB), more than a tenth of the images: see K in docs/recipes.md"
    )
    config.method.symmetric = True
    assert "3.50 is chance; it may begin near 0" in describe_loss(config, 3.5)
    assert "until the first 256 steps have filled the queue" in describe_loss(config, 3.5)


def test_the_names_of_choices_are_the_presets_where_it_chose():
    hydra = {"hydra": {"runtime": {"choices": {"method": "moco_v2", "backbone": "vit_small"}}}}
    preset = {"data": "images", "size": "small", "num_images": 9, "image_size": 224}
    preset["overrides"] = ["method=moco_v2_plus", "method.queue_size=8"]
    files = {"hydra.yaml": yaml.safe_dump(hydra), PRESET_FILE: yaml.safe_dump(preset)}
    assert chosen_names(files) == {
        "method": "moco_v2_plus",
        "backbone": "vit_small",
        "experiment": "own_images_small",
    }
    assert chosen_names({}) == {}
