"""Images of one file a band against the arrays that were written."""

import logging
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moco.data.files.images import UnreadableImage
from moco.data.sources.band_files import BandFiles, resampled
from moco.data.sources.registry import build_source
from moco.errors import InputError

tifffile = pytest.importorskip("tifffile")


@pytest.fixture
def scenes(tmp_path, generator):
    """Three scenes of four bands; band 8A has a quarter of the pixels. The arrays by name and band."""
    arrays = {}
    for scene in ("north/a_B1", "north/b", "south/c"):
        for band in ("10", "02", "8A", "04"):
            side = 10 if band == "8A" else 20
            array = generator.integers(0, 10_000, (side, side), dtype=np.uint16)
            path = tmp_path / "root" / f"{scene}_B{band}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(path, array)
            arrays[scene, band] = array
    return arrays


TEMPLATE = "{id}_B{band}.tif"


@pytest.mark.parametrize(
    ("template", "name", "expected"),
    [
        (TEMPLATE, "x/a_B1_B02.tif", ("x/a_B1", "02")),
        ("{id}/{band}.jp2", "x/y/B8A.jp2", ("x/y", "B8A")),
        ("{band}/{id}.tif", "red/x/1.tif", ("red", "x/1")[::-1]),
        (TEMPLATE, "a_B02.tiff", None),
        (TEMPLATE, "a_Bx/2.tif", None),
        ("{id}(+){band}.tif", "a(+)2.tif", ("a", "2")),
    ],
)
def test_a_template_tells_image_and_band(template, name, expected):
    assert BandFiles(template).parsed(name) == expected


@pytest.mark.parametrize("template", ["{id}.tif", "B{band}.tif", "{id}{id}_{band}.tif", "", "{ID}"])
def test_a_template_without_its_two_parts_is_named(template, scenes, tmp_path):
    with pytest.raises(InputError, match=r"expected \{id\} and \{band\} once each"):
        build_source("images", str(tmp_path / "root"), band_files=template)


def test_bands_are_joined_in_natural_order_or_as_chosen(scenes, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="moco")
    root = str(tmp_path / "root")
    images = build_source("images", root, band_files=TEMPLATE).train
    assert images.bands == ("02", "04", "8A", "10")
    assert images.name(0) == f"{root}/north/a_B1_B{{band}}.tif"
    chosen = build_source("images", root, band_files=TEMPLATE, bands=["04", 10, 2]).train
    assert chosen.bands == ("04", "10", "02")
    chosen = pickle.loads(pickle.dumps(chosen))
    for index, scene in enumerate(["north/a_B1", "north/b", "south/c"]):
        image = chosen.opened(index)
        assert (image.size, image.bands, image.dtype) == ((20, 20), 3, np.uint16)
        expected = np.stack([scenes[scene, band] for band in chosen.bands], axis=2)
        np.testing.assert_array_equal(image.pixels(), expected)
    assert "3 images of the bands 04, 10, 02" in caplog.text
    assert "resampled to band 02, 20 x 20 px: 8A 10 x 10" in caplog.text


@pytest.mark.parametrize(
    "dtype", ["uint8", "int16", "uint16", "int32", "uint32", "float32", "float64"]
)
@pytest.mark.parametrize("size", [(20, 20), (7, 13), (3, 40)])
def test_a_band_of_another_size_is_resampled_as_torch_does(dtype, size, generator):
    band = (generator.random((10, 11)) * 200).astype(dtype)
    if dtype == "uint32":
        band += 4_000_000_000
    planes = torch.from_numpy(band.astype(np.float64))[None, None]
    expected = F.interpolate(planes, size, mode="bilinear", align_corners=False)[0, 0].numpy()
    result = resampled(band, size)
    assert result.dtype == dtype
    half = 0.5 if np.issubdtype(band.dtype, np.integer) else 0
    np.testing.assert_allclose(result.astype(float), expected, rtol=1e-6, atol=half + 1e-4)


def test_the_bands_of_the_first_size_decide(scenes, tmp_path):
    root = str(tmp_path / "root")
    image = build_source("images", root, band_files=TEMPLATE, bands=["8A", "02"]).train.opened(2)
    assert image.size == (10, 10)
    pixels = image.pixels()
    np.testing.assert_array_equal(pixels[..., 0], scenes["south/c", "8A"])
    np.testing.assert_array_equal(pixels[..., 1], resampled(scenes["south/c", "02"], (10, 10)))


def test_the_type_holds_the_values_of_all_bands(tmp_path):
    tifffile.imwrite(tmp_path / "x_B1.tif", np.full((4, 4), 65_000, np.uint16))
    tifffile.imwrite(tmp_path / "x_B2.tif", np.full((4, 4), -3, np.int16))
    tifffile.imwrite(tmp_path / "x_B3.tif", np.full((4, 4), 7, np.uint8))
    pixels = build_source("images", str(tmp_path), band_files=TEMPLATE).train.opened(0).pixels()
    assert pixels.dtype == np.int32
    assert pixels[1, 2].tolist() == [65_000, -3, 7]


def test_what_lacks_a_band_is_unreadable_and_counted(scenes, tmp_path, caplog):
    root = tmp_path / "root"
    (root / "north" / "b_B04.tif").unlink()
    tifffile.imwrite(root / "south" / "c_B02.tif", np.zeros((4, 4, 3), np.uint16))
    (root / "south" / "readme.png").write_bytes(b"")
    images = build_source("images", str(root), band_files=TEMPLATE).train
    with pytest.raises(UnreadableImage, match=r"b_B\{band\}\.tif: no file of band 04"):
        images.opened(1)
    with pytest.raises(UnreadableImage, match=r"c_B02\.tif: 3 bands; expected one"):
        images.opened(2)
    assert images.opened(0).bands == 4
    assert r"1 images lack a band and are unreadable (04 1)" in caplog.text


def test_an_image_larger_than_the_limit_is_unreadable(scenes, tmp_path):
    root = str(tmp_path / "root")
    images = build_source("images", root, band_files=TEMPLATE, max_image_pixels=800).train
    with pytest.raises(UnreadableImage, match=r"4 bands of 20 x 20 px and uint16 exceed"):
        images.opened(0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"band_files": "{id}-{band}.tif"}, r"fits no file; the first are north/a_B1_B02\.tif, "),
        ({"band_files": TEMPLATE, "bands": ["04", "07"]}, "band 07; there are 02, 04, 8A, 10"),
        ({"band_files": TEMPLATE, "bands": []}, r"data\.bands=\[\]: expected the names"),
        ({"tile": 8, "band_files": TEMPLATE}, r"data\.tile=8: does not go with data\.band_files"),
        ({"tile": 8, "pages": "each"}, r"data\.tile=8: does not go with data\.pages=each"),
    ],
)
def test_settings_that_fit_nothing_are_named(options, expected, scenes, tmp_path):
    with pytest.raises(InputError, match=expected):
        build_source("images", str(tmp_path / "root"), **options)


def test_other_datasets_do_not_take_the_settings():
    with pytest.raises(InputError, match=r"data\.band_files=x: data=images and data=image_folder"):
        build_source("digits", band_files="x")
    with pytest.raises(InputError, match=r"data\.tile=8: data=images and .*; data=npz does not"):
        build_source("npz", "a.npz", tile=8)


def test_class_folders_hold_bands_too(scenes, tmp_path):
    root = str(tmp_path / "root")
    source = build_source("image_folder", root, band_files=TEMPLATE, held_out=0)
    assert source.bank.labels.tolist() == [0, 0, 1]
    np.testing.assert_array_equal(
        source.bank.images.opened(2).pixels()[..., 0], scenes["south/c", "02"]
    )
