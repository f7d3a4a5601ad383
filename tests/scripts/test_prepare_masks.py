"""scripts/prepare_masks.py: from the archives of two datasets to segmentation folders."""

import sys

import numpy as np
import pytest
from PIL import Image

from moco.segmentation.mask_sources import build_segmentation_source
from scripts import prepare_masks


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def prepare(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["prepare_masks.py", *map(str, arguments)])
    prepare_masks.main()


def read(path):
    return np.asarray(Image.open(path))


def test_nuclei_of_one_image_share_a_mask_and_every_image_has_one_part(
    tmp_path, monkeypatch, generator, capsys
):
    expected = {}
    for number in range(40):
        name = f"image{number}"
        image = generator.integers(0, 256, (9, 7, 4), dtype=np.uint8)
        nuclei = generator.random((3, 9, 7)) < 0.2
        save(tmp_path / "given" / name / "images" / f"{name}.png", image)
        for place, nucleus in enumerate(nuclei):
            mask = np.uint8(255) * nucleus
            save(tmp_path / "given" / name / "masks" / f"{place}.png", mask.astype(np.uint8))
        expected[name] = (image[..., :3], nuclei.any(axis=0))
    prepare(monkeypatch, "dsb2018", tmp_path / "given", tmp_path / "out")
    masks = sorted((tmp_path / "out" / "masks").rglob("*.png"))
    assert sorted(path.stem for path in masks) == sorted(expected)
    parts = [path.parent.name for path in masks]
    assert {part: parts.count(part) > 0 for part in ("train", "val", "test")} == {
        "train": True, "val": True, "test": True,
    }  # fmt: skip
    for path in masks:
        image, mask = expected[path.stem]
        assert np.array_equal(read(path), mask)
        image_path = tmp_path / "out" / "images" / path.parent.name / path.name
        assert np.array_equal(read(image_path), image)
    counts = ", ".join(f"{parts.count(part)} {part}" for part in ("train", "val", "test"))
    assert capsys.readouterr().out == f"{counts} in {tmp_path / 'out'}\n"


@pytest.mark.parametrize("test_part", ["test", "testing"])
def test_vessels_have_no_class_outside_the_field_of_view(
    tmp_path, monkeypatch, generator, test_part
):
    expected = {}
    for part, number in (("training", "21"), (test_part, "01")):
        image = generator.integers(0, 256, (8, 6, 3), dtype=np.uint8)
        vessels, field_of_view = generator.random((2, 8, 6)) < 0.5
        root = tmp_path / "given" / part
        save(root / "images" / f"{number}_{part}.tif", image)
        save(root / "1st_manual" / f"{number}_manual1.gif", (vessels * 255).astype(np.uint8))
        save(root / "mask" / f"{number}_{part}_mask.gif", (field_of_view * 255).astype(np.uint8))
        expected[number] = (image, np.where(field_of_view, vessels, 255))
    prepare(monkeypatch, "drive", tmp_path / "given", tmp_path / "out")
    for part, number in (("train", "21"), ("val", "01")):
        image, mask = expected[number]
        assert np.array_equal(read(tmp_path / f"out/images/{part}/{number}.png"), image)
        assert np.array_equal(read(tmp_path / f"out/masks/{part}/{number}.png"), mask)
    source = build_segmentation_source("segmentation_folder", root=str(tmp_path / "out"))
    assert source.class_names == ("background", "vessel")


def test_a_folder_without_its_files_is_one_line(tmp_path, monkeypatch):
    for source, said in (
        (tmp_path / "none", "no such folder"),
        (tmp_path, "there is no image of drive in it"),
    ):
        with pytest.raises(SystemExit, match=said):
            prepare(monkeypatch, "drive", source, tmp_path / "out")
    save(tmp_path / "training" / "images" / "21_training.tif", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(SystemExit, match=r"1st_manual: expected one file 21\*, found 0"):
        prepare(monkeypatch, "drive", tmp_path, tmp_path / "out")
