from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from moco.cli.build_pretraining import build_data
from moco.data.files.written_files import is_written_file
from moco.errors import InputError
from moco.preview import MARGIN, SMALLEST_VIEW, draw_pairs, run
from tests.conftest import run_program


@pytest.mark.parametrize("engine", ["worker", "batch"])
def test_the_pairs_are_those_that_training_sees(runner, engine):
    data = build_data(runner.config(f"data.engine={engine}"))
    sheet = np.asarray(draw_pairs(data, data.first_images(3)))
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    mean, std = data.augment.mean[0], data.augment.std[0]
    column_width = sheet.shape[1] // 2
    row_height = (sheet.shape[0] - MARGIN) // 3
    enlarged = SMALLEST_VIEW // batch.views[0].shape[3]
    for pair in range(3):
        for view in (0, 1):
            top = MARGIN + pair * row_height
            left = MARGIN + view * column_width
            drawn = sheet[top : top + SMALLEST_VIEW, left : left + SMALLEST_VIEW, 0]
            pixels = (batch.views[view][pair, 0] * std + mean).clamp(0, 1) * 255
            assert np.abs(drawn[::enlarged, ::enlarged] - pixels.numpy()).max() <= 1
            text = sheet[top : (pair + 1) * row_height, left + 122 : (view + 1) * column_width]
            assert (text < 128).any()


def test_local_crops_stand_below_their_pair(runner):
    data = build_data(runner.config("method.local_crops=3", "data.image_size=32"))
    images = data.first_images(2)
    sheet = np.asarray(draw_pairs(data, images))
    plain = np.asarray(draw_pairs(build_data(runner.config("data.image_size=32")), images))
    factor = SMALLEST_VIEW // 32  # enlarged as the views are
    side = factor * data.augment.local.side(32)
    assert sheet.shape[0] - plain.shape[0] == 2 * (side + MARGIN)
    row_height = (sheet.shape[0] - MARGIN) // 2
    top = row_height + MARGIN - (side + MARGIN)
    mean, std = data.augment.mean[0], data.augment.std[0]
    for number, crops in enumerate(data.local_crops(images)):
        left = MARGIN + number * (side + MARGIN)
        drawn = sheet[top : top + side : factor, left : left + side : factor, 0]
        pixels = (crops[0, 0] * std + mean).clamp(0, 1) * 255
        assert np.abs(drawn - pixels.numpy()).max() <= 1


def test_a_run_of_files_is_drawn(runner, tmp_path, image_tree, capsys):
    config = runner.config("data=images", f"data.root={image_tree}", "data.batch_size=8")
    output = tmp_path / "deep" / "pairs.png"
    folder = tmp_path / "runs"
    folder.mkdir()
    run(SimpleNamespace(**vars(config), output=str(output), num_pairs=2), folder)
    assert f"2 pairs in {output}" in capsys.readouterr().out
    with Image.open(output) as sheet:
        assert sheet.width > 1000
    assert is_written_file(str(output))
    assert not folder.exists()


def test_only_a_png_is_drawn(tmp_path):
    with pytest.raises(InputError, match=r"^output=a.gif: expected a name that ends in .png$"):
        run(SimpleNamespace(output="a.gif"), tmp_path)


@pytest.mark.slow
def test_the_program_draws_from_the_command_line(tmp_path, image_tree):
    arguments = ["data=images", f"data.root={image_tree}", "data.batch_size=8", "num_pairs=2"]
    done = run_program("moco.preview", *arguments, "output=pairs.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 pairs in pairs.png" in done.stdout
    assert list((tmp_path / "runs" / "preview").iterdir()) == []
