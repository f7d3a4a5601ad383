"""moco.load_segmenter: a function from an image to classes, from the checkpoint alone."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import moco
from moco.errors import InputError
from moco.segmentation.image_segmenter import said_in_python
from tests.conftest import REPOSITORY
from tests.segmentation.fine_tuned import NAMES, build_random_segmenter, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("model"))


def logits_of(pixels, bands=3):
    """The model's logits of an image (height, width, bands) from 0 to 1, without our code."""
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    with torch.no_grad():
        return build_random_segmenter(bands=bands)(((image - 0.5) / 0.25)[None])[0].numpy()


def test_an_image_becomes_classes_and_probabilities(folder, generator):
    pixels = generator.integers(0, 256, (37, 50, 3), dtype=np.uint8)
    segment = moco.load_segmenter(folder)
    logits = logits_of(pixels.astype(np.float32) / 255)
    classes = segment(pixels)
    assert (classes.shape, classes.dtype) == ((37, 50), np.int64)
    assert np.mean(classes != logits.argmax(axis=0)) < 0.01
    odds = np.exp(logits - logits.max(axis=0))
    np.testing.assert_allclose(segment.probabilities(pixels), odds / odds.sum(axis=0), atol=1e-3)
    assert segment.class_names == NAMES


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1"])
def test_every_8_bit_image_becomes_rgb(folder, generator, mode):
    pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    segment = moco.load_segmenter(folder)
    expected = segment(np.asarray(image.convert("RGB")))
    np.testing.assert_array_equal(segment(image), expected)
    if mode in ("L", "RGBA"):
        np.testing.assert_array_equal(segment(np.asarray(image)), expected)


def test_windows_are_blended_and_large_images_are_divided(folder, generator):
    pixels = generator.integers(0, 256, (70, 90, 3), dtype=np.uint8)
    by_windows = moco.load_segmenter(folder, inference="slide").probabilities(pixels)
    divided = moco.load_segmenter(folder, max_forward_pixels=2_000).probabilities(pixels)
    np.testing.assert_allclose(by_windows, divided, atol=1e-5)
    np.testing.assert_allclose(by_windows.sum(axis=0), 1, atol=1e-5)
    averaged = moco.load_segmenter(folder, tta=True).probabilities(pixels)
    np.testing.assert_allclose(averaged.sum(axis=0), 1, atol=1e-5)


def test_bands_and_range_are_those_of_the_run(tmp_path, generator):
    data = {"bands": [3, 1], "value_range": [0, 500]}
    segment = moco.load_segmenter(write_run(tmp_path, bands=2, data=data))
    pixels = generator.integers(0, 500, (16, 16, 4)).astype(np.uint16)
    expected = logits_of(pixels[..., [2, 0]].astype(np.float32) / 500, bands=2).argmax(axis=0)
    assert np.mean(segment(pixels) != expected) < 0.01


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((4, 4, 2), np.uint8), "the image has 2 bands; the model reads 3"),
        (np.zeros((4, 4, 1), np.uint16), "the image has 1 band; the model reads 3"),
        (
            np.full((4, 4, 3), 7, np.uint16),
            r"^the image is uint16, with values from 7 to 7, and the model was trained on 8-bit "
            r"images; give uint8 from 0 to 255, or load_segmenter\(path, value_range=\(low, high\)\)",
        ),
        (
            np.zeros((3, 64, 64), np.float32),
            r"^\(3, 64, 64\) looks like channels first; load_segmenter takes \(H, W, bands\), such as",
        ),
        (np.zeros((1, 9, 9), np.uint8), r"^\(1, 9, 9\) looks like channels first"),
        (np.zeros((4, 9, 9), np.uint8), r"^\(4, 9, 9\) looks like channels first"),
        (np.zeros((5, 9, 9), np.uint8), "the image has 9 bands; the model reads 3"),
        ("photo.jpg", r"^photo.jpg: a path; expected an image, such as PIL.Image.open\(path\)"),
        (Path("photo.jpg"), "^photo.jpg: a path; expected an image"),
        (np.zeros((4, 4, 3), np.complex64), "pixels of type complex64"),
        (np.zeros((0, 4, 3), np.uint8), r"expected one image .*, got \(0, 4, 3\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), "expected one image"),
    ],
)
def test_what_is_no_image_of_the_model_is_refused(folder, image, said):
    with pytest.raises(InputError, match=said):
        moco.load_segmenter(folder)(image)


def test_a_checkpoint_without_a_decoder_names_the_program_that_makes_one(checkpoint):
    with pytest.raises(
        InputError, match=r"this one is of another program; python -m moco\.segment makes one"
    ):
        moco.load_segmenter(checkpoint)


def test_a_value_range_can_be_given_for_images_of_another_type(folder, generator):
    pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    expected = moco.load_segmenter(folder)(pixels)
    shares = pixels.astype(np.float32) / 255
    classes = moco.load_segmenter(folder, value_range=(0, 1))(shares)
    assert np.mean(classes != expected) < 0.01


def test_a_str_is_a_path_as_a_path_is(folder, generator):
    pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    file = folder / "checkpoints" / "last.ckpt"
    results = []
    for path in (folder, str(folder), file, str(file)):
        results.append(moco.load_segmenter(path)(pixels))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize(
    ("selection", "shape", "said"),
    [
        ([3, 1], (9, 9, 2), "^the image has 2 bands; the model reads band 3, 1 of an image"),
        ([3, 1], (4, 9, 2), "^the image has 2 bands; the model reads band 3, 1 of an image"),
        ([12, 1], (12, 40, 40), ""),  # 40 bands may be meant
        (["nir", "red"], (9, 9, 4), "^the model reads band nir, red of an image, and an array has"),
    ],
)
def test_chosen_bands_are_checked_in_the_image(tmp_path, selection, shape, said):
    segment = moco.load_segmenter(write_run(tmp_path, bands=2, data={"bands": selection}))
    image = np.zeros(shape, np.uint8)
    if not said:
        assert segment(image).shape == shape[:2]
        return
    with pytest.raises(InputError, match=said):
        segment(image)


def test_errors_name_arguments_and_no_settings(folder, tmp_path):
    with pytest.raises(InputError, match=f"^{tmp_path}/no.ckpt: no such file; load_segmenter"):
        moco.load_segmenter(tmp_path / "no.ckpt")
    with pytest.raises(InputError, match=r"^window_size=7: this backbone has no"):
        moco.load_segmenter(folder, window_size=7)
    with pytest.raises(InputError, match=r"^value_range=5: expected \[low, high\]"):
        moco.load_segmenter(folder, value_range=5)(np.zeros((4, 4, 3), np.uint8))
    own = "backbone.target=their.net:build"
    with pytest.raises(InputError) as error, said_in_python():
        raise InputError(f"checkpoint=a.ckpt: {own}, is missing: {own}, or trust_targets=true if")
    python = "target='their.net:build'"
    assert str(error.value) == (f"a.ckpt: {python}, is missing: {python}, or trust_targets=True if")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"inference": "slied"}, "inference: unknown value 'slied'; did you mean 'slide'"),
        ({"tta": True, "tta_scales": [1, 0]}, r"tta_scales=\[1, 0\]: expected numbers above 0"),
    ],
)
def test_wrong_arguments_are_named(folder, arguments, said):
    with pytest.raises(InputError, match=said):
        moco.load_segmenter(folder, **arguments)


@pytest.mark.parametrize(
    "backbone",
    [
        {"name": "resnet_tiny"},
        pytest.param({"name": "swin_v2_tiny_patch2"}, marks=pytest.mark.slow),
        {"name": "vit_tiny_patch4"},
        pytest.param({"name": "timm", "model": "convnext_atto"}, marks=pytest.mark.slow),
    ],
)
def test_images_of_any_size_have_classes(tmp_path, backbone, generator):
    folder = write_run(tmp_path, **backbone)
    plain = moco.load_segmenter(folder)
    averaged = moco.load_segmenter(folder, inference="slide", image_size=24, tta=True)
    for size in ((1, 1), (1, 50), (7, 3), (33, 65)):
        pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        for segment in (plain, averaged):
            assert segment(pixels).shape == size
            assert np.isfinite(segment.probabilities(pixels)).all()


@pytest.mark.slow
def test_hydra_is_not_needed(folder):
    code = (
        "import sys; sys.modules['hydra'] = None; sys.modules['omegaconf'] = None\n"
        "import moco, numpy\n"
        f"print(moco.load_segmenter({str(folder)!r})(numpy.zeros((9, 9, 3), 'uint8')).shape)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.stdout == "(9, 9)\n", ended.stderr
