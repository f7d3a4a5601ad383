import numpy as np
import pytest
from PIL import Image

from moco.cli.build_pretraining import build_data
from moco.preview import sheet
from tests.conftest import run_program


@pytest.mark.parametrize("engine", ["worker", "batch"])
def test_shows_the_pairs_that_training_sees(runner, engine):
    data = build_data(runner.config(f"data.engine={engine}"))
    image = np.asarray(sheet(data, data.first_images(3)))
    first = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    mean, std = data.augment.mean[0], data.augment.std[0]
    side = image.shape[1] // 2
    row = (image.shape[0] - 8) // 3
    for pair in range(3):
        for view in (0, 1):
            shown = image[
                8 + pair * row : 120 + pair * row : 7, side * view + 8 : side * view + 120 : 7, 0
            ]
            pixels = (first.views[view][pair, 0] * std + mean).clamp(0, 1) * 255
            assert np.abs(shown - pixels.numpy()).max() <= 1
            words = image[8 + pair * row : (pair + 1) * row, side * view + 130 : side * (view + 1)]
            assert (words < 128).any()  # what was drawn stands beside it


def test_draws_a_run_of_files_from_the_command_line(tmp_path, image_tree):
    arguments = [
        "data=images",
        f"data.root={image_tree}",
        "data.batch_size=8",
        "data.image_size=48",
        "num_pairs=2",
    ]
    done = run_program("moco.preview", *arguments, "output=deep/pairs.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 pairs in deep/pairs.png" in done.stdout
    with Image.open(tmp_path / "deep" / "pairs.png") as image:
        assert image.width > 1000
    assert [*(tmp_path / "runs" / "preview").iterdir()] == []


def test_only_a_png_is_drawn(tmp_path):
    done = run_program("moco.preview", "+experiment=quickstart", "output=pairs.gif", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: output=pairs.gif: expected a name that ends in .png\n"
