"""The files of a prediction, read by other libraries than the one that wrote them."""

import io
import json
import re
from dataclasses import asdict, fields, replace

import cv2
import numpy as np
import pytest
from PIL import Image

from moco.config.predict import PredictConfig
from moco.data.files.images import read_mask
from moco.data.files.listing import list_images
from moco.errors import InputError
from moco.segmentation.comparison_plot import class_colours
from moco.segmentation.mask_files import TYPED_NAMES, Arrays, MaskFolder, overlay_of, write_mask
from moco.segmentation.pixel_classifier import Inference


def written(tmp_path, classes, num_classes):
    colours = class_colours(num_classes).numpy()
    stream = io.BytesIO()
    write_mask(stream, classes, colours)
    path = tmp_path / "mask.png"
    path.write_bytes(stream.getvalue())
    return path, colours


@pytest.mark.parametrize("num_classes", [2, 21, 256])
def test_a_mask_holds_numbers_and_shows_colours(tmp_path, num_classes, generator):
    classes = generator.integers(0, num_classes, (13, 7)).astype(np.uint8)
    path, colours = written(tmp_path, classes, num_classes)
    np.testing.assert_array_equal(read_mask(str(path)), classes)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), classes)
    shown = cv2.imread(str(path), cv2.IMREAD_COLOR)[..., ::-1]
    np.testing.assert_array_equal(shown, colours[classes])


def test_more_than_256_classes_have_16_bits(tmp_path, generator):
    classes = generator.integers(0, 400, (13, 7)).astype(np.uint16)
    path, _ = written(tmp_path, classes, 400)
    np.testing.assert_array_equal(read_mask(str(path)), classes)
    np.testing.assert_array_equal(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), classes)


def folder_of(tmp_path, kind="none", overlays=False):
    return MaskFolder(tmp_path / "out", ["sky", "été"], kind, overlays=overlays)


@pytest.mark.parametrize("kind", ["npz", "tiff"])
def test_probabilities_come_back(tmp_path, kind, generator):
    folder = folder_of(tmp_path, kind)
    truth = generator.random((2, 5, 8)).astype(np.float32)
    with folder.taken({}):
        arrays = folder.empty_arrays((5, 8))
        arrays.classes[:] = truth.argmax(axis=0)
        arrays.probabilities[:] = folder.stored(truth)
        folder.write("a/b", arrays, None)
    assert folder.is_done("a/b")
    if kind == "npz":
        file = np.load(folder.folder / "probabilities/a/b.npz")
        assert file["class_names"].tolist() == ["sky", "été"]
        found = file["probabilities"].astype(np.float32)
    else:
        _, pages = cv2.imreadmulti(
            str(folder.folder / "probabilities/a/b.tif"), flags=cv2.IMREAD_UNCHANGED
        )
        found = np.stack(pages) / 65535
    np.testing.assert_allclose(found, truth, atol=5e-4)


def test_large_arrays_are_files_without_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr("moco.segmentation.mask_files.LARGEST_IN_MEMORY", 10)
    folder = folder_of(tmp_path, "npz")
    with folder.taken({}):
        arrays = folder.empty_arrays((5, 8))
        assert isinstance(arrays.classes, np.memmap)
        assert isinstance(arrays.probabilities, np.memmap)
        assert sorted(path.name for path in folder.folder.iterdir()) == [
            ".lock", "classes.json", "predict.json",
        ]  # fmt: skip
        arrays.classes[:] = 1
        arrays.probabilities[:] = 0.5
        folder.write("x", arrays, None)
    assert (read_mask(str(folder.mask("x"))) == 1).all()
    assert (np.load(folder.folder / "probabilities/x.npz")["probabilities"] == 0.5).all()


def test_the_legend_has_number_name_and_colour(tmp_path):
    folder = folder_of(tmp_path)
    with folder.taken({}):
        pass
    legend = json.loads((folder.folder / "classes.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in legend] == ["sky", "été"]
    assert [row["number"] for row in legend] == [0, 1]
    assert legend[1]["colour"] == class_colours(2)[1].tolist()


def test_an_image_is_done_when_all_its_files_are_there(tmp_path):
    with folder_of(tmp_path).taken({}):
        folder_of(tmp_path).write("a", Arrays(np.zeros((2, 2), np.uint8), None), None)
    assert folder_of(tmp_path).is_done("a")
    assert not folder_of(tmp_path, overlays=True).is_done("a")
    assert not folder_of(tmp_path, "npz").is_done("a")


def test_a_folder_of_something_else_stays_as_it_is(tmp_path):
    folder = folder_of(tmp_path)
    folder.folder.mkdir()
    (folder.folder / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"holds something else \(thesis.tex\)"), folder.taken({}):
        pass
    assert [path.name for path in folder.folder.iterdir()] == ["thesis.tex"]


def test_other_settings_are_refused_by_their_key(tmp_path):
    folder = folder_of(tmp_path)
    with folder.taken({"inference": {"window": 32, "scales": (1.0,)}}):
        pass
    with folder.taken({"inference": {"window": 32, "scales": (1.0,)}}):
        pass
    other = {"inference": {"window": 64, "scales": (1.0,)}}
    with (
        pytest.raises(InputError, match="image_size: 32 there, 64 here"),
        folder.taken(other),
    ):
        pass


def test_a_killed_process_leaves_a_folder_that_can_be_taken(tmp_path):
    folder = folder_of(tmp_path)
    folder.folder.mkdir()
    (folder.folder / ".lock").touch()
    (folder.folder / ".predict.json.77.tmp").write_text("{")
    half = folder.folder / "masks" / "a" / ".b.png.77.tmp"
    half.parent.mkdir(parents=True)
    half.write_text("half")
    (folder.folder / "predict.json").write_text("{}")
    with folder.taken({}):
        pass
    assert not half.exists()


def test_masks_below_a_folder_of_images_are_no_images(tmp_path, image_tree):
    folder = MaskFolder(image_tree / "out", ["a", "b"], "none", overlays=False)
    before = list_images(image_tree)
    with folder.taken({}):
        folder.write("x", Arrays(np.zeros((2, 2), np.uint8), None), None)
    assert list_images(image_tree) == before
    assert len(list_images(folder.folder / "masks")) == 1  # asked for by name, they are masks


def test_an_overlay_shows_class_0_as_it_is_and_draws_the_edges_of_others():
    colours = np.array([[0, 0, 0], [200, 0, 100], [9, 9, 9]], np.uint8)
    shown = np.full((5, 5, 3), 100, np.uint8)
    classes = np.zeros((5, 5), np.uint8)
    classes[:, 1:4] = 1
    found = overlay_of(shown, classes, colours)
    expected = [[100, 100, 100], [200, 0, 100], [150, 50, 100], [200, 0, 100], [100, 100, 100]]
    assert found.tolist() == [expected] * 5


TTA = Inference(scales=(0.75, 1.0), flip=True)


@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        (Inference(), TTA, "tta: false there, true here"),
        (replace(TTA, flip=False), TTA, "tta_flip: false there, true here"),
        (replace(TTA, scales=(0.5,)), TTA, "tta_scales: [0.5] there, [0.75, 1.0] here"),
        (Inference(), Inference(blend=False), "blend: true there, false here"),
        (Inference(), Inference(window=64), "image_size: 512 there, 64 here"),
    ],
)
def test_the_masks_of_another_prediction_are_told_by_what_was_typed(tmp_path, there, here, said):
    folder = folder_of(tmp_path)
    with folder.taken({"inference": asdict(there)}):
        pass
    with (
        pytest.raises(InputError, match=rf"another prediction \({re.escape(said)}\)"),
        folder.taken({"inference": asdict(here)}),
    ):
        pass


def test_every_part_of_an_inference_has_the_name_of_a_setting():
    settings = {field.name for field in fields(PredictConfig)}
    for field in fields(Inference):
        assert TYPED_NAMES[f"inference.{field.name}"] in settings
