"""Bands, no-data and value range: what becomes of the values in files, beside plain NumPy."""

import logging

import numpy as np
import pytest
import tifffile
import torch

from moco.data.files.images import DecodedImage, UnreadableImage
from moco.data.sources.pixel_values import PixelValues, settle_values
from moco.data.sources.registry import build_source
from moco.data.sources.sample import prepare_source
from moco.errors import InputError

RNG = np.random.default_rng(0)
LIMITS = {"uint8": (0, 255), "uint16": (0, 10_000), "int16": (-2_000, 10_000),
          "int32": (-(2**31), 2**31 - 1), "uint32": (0, 2**32 - 1)}  # fmt: skip


def image(dtype: str, bands: int, side: int = 7, **traits) -> DecodedImage:
    low, high = LIMITS.get(dtype, (-3, 5))
    pixels = RNG.uniform(low, high, (side, side, bands)).astype(dtype)
    return DecodedImage(pixels, **traits)


def settled(*images: DecodedImage, **settings) -> PixelValues:
    return settle_values([(f"{n}.tif", each) for n, each in enumerate(images)], **settings)


@pytest.mark.parametrize("dtype", [*LIMITS, "float16", "float32", "float64"])
@pytest.mark.parametrize("bands", [1, 3, 13])
def test_the_value_range_becomes_0_to_1(dtype, bands):
    low, high = LIMITS.get(dtype, (-1.5, 2.5))
    given = image(dtype, bands)
    if dtype == "uint8" and bands == 3:
        low, high = 10, 100  # the full range would leave them as they are
    values = settled(given, value_range=[low, high])
    result = values.of(given, "x").pixels()
    exact = (given.array.astype(np.float64) - low) / (high - low)
    assert result.dtype == np.float32
    assert result.shape == (7, 7, bands)
    np.testing.assert_allclose(result, exact.clip(0, 1), atol=2e-7)


def test_8_bit_rgb_stays_as_it_is():
    given = image("uint8", 3)
    for settings in ({}, {"value_range": [0, 255]}, {"bands": [1, 2, 3]}):
        values = settled(given, **settings)
        assert not values.is_float
        np.testing.assert_array_equal(values.of(given, "x").pixels(), given.array)
    reversed_bands = settled(given, bands=[3, 2, 1]).of(given, "x").pixels()
    np.testing.assert_array_equal(reversed_bands, given.array[..., ::-1])
    assert reversed_bands.flags.c_contiguous


def test_bands_by_number_and_name_in_any_order_and_twice():
    given = image("uint16", 4, band_names=("B02", "B03", "B04", "B08"))
    values = settled(given, bands=["B08", 1, 1], value_range=[0, 10_000])
    result = values.of(given, "x").pixels()
    np.testing.assert_allclose(result, given.array[..., [3, 0, 0]] / np.float32(10_000), atol=1e-7)


def test_each_band_can_have_its_range():
    given = image("uint16", 2)
    values = settled(given, value_range=[[0, 1_000], [500, 10_000]])
    expected = (given.array - [0.0, 500.0]) / [1_000, 9_500]
    np.testing.assert_allclose(values.of(given, "x").pixels(), expected.clip(0, 1), atol=1e-6)


@pytest.mark.parametrize("named_by", ["file", "setting"])
def test_pixels_without_data_become_the_mean(named_by, caplog):
    pixels = image("int16", 2).array
    pixels[0, 0] = -9999
    pixels[1, 1, 1] = -9999
    given = DecodedImage(pixels, no_data=-9999.0 if named_by == "file" else None)
    setting = None if named_by == "file" else -9999.0
    with caplog.at_level(logging.INFO):
        values = settled(given, value_range=[-2000, 10_000], nodata=setting, mean=[0.25, 0.75])
    result = values.of(given, "x").pixels()
    np.testing.assert_array_equal(result[0, 0], np.float32([0.25, 0.75]))
    assert result[1, 1, 1] == 0.75
    assert result[1, 1, 0] != 0.25
    assert "no data in 3.06 % of the values of one image" in caplog.text


def test_nan_and_infinity_are_no_data():
    pixels = image("float32", 1).array
    pixels[0, 0], pixels[0, 1], pixels[0, 2] = np.nan, np.inf, -np.inf
    given = DecodedImage(pixels)
    result = settled(given, value_range=[-3, 5], mean=[0.5]).of(given, "x").pixels()
    np.testing.assert_array_equal(result[0, :3], 0.5)
    assert np.isfinite(result).all()


def test_a_batch_gets_the_values_of_its_images():
    given = [image("uint16", 5) for _ in range(3)]
    values = settled(*given, value_range=[0, 10_000])
    batch = values.unit(torch.from_numpy(np.stack([each.array for each in given])))
    for row, each in zip(batch, given, strict=True):
        np.testing.assert_array_equal(row.numpy(), values.of(each, "x").pixels())


def test_a_missing_range_says_what_is_there():
    given = DecodedImage(np.arange(4096, dtype=np.uint16).reshape(64, 64, 1))
    message = (
        r"data.value_range: missing; the images have 1 band of uint16 \(one image: from 0 to 4095, "
        r"99.9 % of them up to 4090.9\d*\).*python -m moco.stats data=images data.root=x"
    )
    with pytest.raises(InputError, match=message):
        settled(given, command="data=images data.root=x")


def test_a_range_that_clips_or_is_hardly_used_is_a_warning(caplog):
    twelve_bits = DecodedImage(RNG.integers(0, 4096, (50, 50, 1)).astype(np.uint16))
    settled(twelve_bits, value_range=[0, 65535])
    assert "the values of one image use 6.2 % of it" in caplog.text
    caplog.clear()
    settled(twelve_bits, value_range=[100, 2000])
    assert "clips" in caplog.text
    assert "% below" in caplog.text
    caplog.clear()
    settled(twelve_bits, value_range=[0, 4095])
    assert not caplog.text


def test_a_file_with_several_channels_is_told(tmp_path, caplog):
    stack = RNG.integers(0, 4000, (3, 8, 9)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "x.ome.tif", stack, ome=True, metadata={"axes": "CYX"})
    for pages, bands in (("first", 1), ("channels", 3)):
        caplog.clear()
        source = build_source("images", str(tmp_path))
        settings = {"bands": None, "value_range": [0, 4000], "nodata": None, "dicom_window": False}
        data = {"name": "images", "root": str(tmp_path), "pages": pages, **settings}
        assert prepare_source(source, data, None).bands == bands
        assert source.train[0].shape == (8, 9, bands)
        assert ("has 3 pages or channels, and only the first" in caplog.text) == (bands == 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bands": [0]}, r"data.bands=\[0\]: expected numbers from 1, or names"),
        ({"bands": []}, r"data.bands=\[\]: expected"),
        ({"bands": [5]}, r"data.bands=\[5\]: 0.tif has no band 5, only 1 to 4"),
        ({"bands": ["red"]}, r"0.tif has no band 'red'; its bands have no names"),
        ({"value_range": [5, 5]}, r"data.value_range=\[5, 5\]: expected \[low, high\]"),
        ({"value_range": [[0, 1]] * 3}, r"data.value_range: 3 pairs, and the images have 4 bands"),
        ({"value_range": "per_band"}, r"data.value_range=per_band: expected"),
        ({"value_range": [0, 1], "display": [5]}, r"preview.bands=\[5\]: expected one or three"),
    ],
)
def test_wrong_settings_are_one_line(settings, message):
    with pytest.raises(InputError, match=message):
        settled(image("uint16", 4), **settings)


def test_plots_show_bands_by_the_names_of_those_that_the_model_gets():
    given = image("uint16", 4, band_names=("B02", "B03", "B04", "B08"))
    for bands, display, expected in (
        (None, ["B04", "B03", "B02"], (3, 2, 1)),
        (None, ["B04", 1, "B08"], (3, 1, 4)),
        (["B08", 1], "B02", (2,)),
        (["B08", "B04"], ["B04"], (2,)),
    ):
        values = settled(given, bands=bands, display=display, value_range=[0, 10_000])
        assert values.display == expected
    message = r"preview.bands=\['B04'\]: expected .* from 1 to 2 or names \(B08, B02\)"
    with pytest.raises(InputError, match=message):
        settled(given, bands=["B08", "B02"], display=["B04"], value_range=[0, 10_000])


def test_an_image_unlike_the_others_is_unreadable():
    alike = [image("uint16", 4) for _ in range(3)]
    values = settled(*alike, image("uint8", 3), value_range=[0, 10_000])
    for odd, message in [
        (image("uint8", 4), "a.tif: 4 bands of uint8; the dataset has uint16"),
        (image("uint16", 1), "a.tif: 1 band of uint16; the dataset has 4"),
    ]:
        with pytest.raises(UnreadableImage, match=message):
            values.of(odd, "a.tif").pixels()
    rgb = settled(image("uint8", 3))
    with pytest.raises(UnreadableImage, match="1 band of uint16; the dataset has uint8"):
        rgb.of(image("uint16", 1), "a.tif").pixels()


def test_pictures_show_chosen_bands_stretched():
    given = image("uint16", 4, side=50)
    values = settled(given, value_range=[0, 10_000], display=[4, 2, 1])
    pixels = values.of(given, "x").pixels()
    shown = values.shown(pixels)
    assert shown.dtype == np.uint8
    assert shown.shape == (50, 50, 3)
    for plane, band in enumerate([3, 1, 0]):
        low, high = np.percentile(pixels[..., band], [2, 98])
        expected = np.rint(255 * ((pixels[..., band] - low) / (high - low)).clip(0, 1))
        np.testing.assert_array_equal(shown[..., plane], expected)
    one = settled(image("uint16", 1), value_range=[0, 10_000])
    grey = one.shown(np.full((4, 4, 1), 0.5, np.float32))
    assert (grey == 128).all()
    assert grey.shape == (4, 4, 3)
