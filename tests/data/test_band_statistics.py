"""Statistics of bands beside NumPy, also when the images are added in another order."""

import numpy as np
import pytest

from moco.data.band_statistics import Reading, Statistics
from moco.data.files.images import DecodedImage

RNG = np.random.default_rng(0)


def statistics_of(arrays, no_data=None, selection=None) -> Statistics:
    reading = Reading(selection, no_data)
    statistics = Statistics()
    for array in arrays:
        assert statistics.add(reading(DecodedImage(array))) == ""
    statistics.finish()
    return statistics


def images(dtype: str, number: int = 70) -> list[np.ndarray]:
    values = RNG.gamma(2, 400, (number, 9, 8, 2)) - (300 if dtype != "uint16" else 0)
    return list(values.astype(dtype))


@pytest.mark.parametrize("dtype", ["uint16", "int16", "int32", "float32", "float64"])
def test_all_figures_are_numpys(dtype):
    arrays = images(dtype)
    statistics = statistics_of(arrays)
    exactly = {"rtol": 0} if dtype.endswith("16") else {"rtol": 5e-4}
    for band in (0, 1):
        values = np.stack(arrays)[..., band].ravel().astype(np.float64)
        counts = statistics.bands[band]
        assert (counts.lowest, counts.highest) == (values.min(), values.max())
        assert counts.num_zeros == (values == 0).sum()
        assert counts.total == pytest.approx(values.sum())
        percents = [0.1, 50, 99.9]
        expected = np.percentile(values, percents, method="inverted_cdf")
        np.testing.assert_allclose(statistics.percentiles(band, percents), expected, **exactly)
        mapped = ((values - 100) / 1900).clip(0, 1)
        mean, std = statistics.mean_and_std(band, 100, 2000)
        assert (mean, std) == pytest.approx((mapped.mean(), mapped.std()), rel=2e-3)


def test_values_without_data_do_not_count():
    array = np.array([[[0.0], [1.0], [np.nan]], [[np.inf], [-9999.0], [3.0]]], np.float32)
    counts = statistics_of([array], no_data=-9999.0).bands[0]
    assert (counts.num_nan, counts.num_no_data, counts.num_zeros) == (2, 1, 1)
    assert (counts.lowest, counts.highest, counts.total) == (0, 3, 4)


def test_the_proposed_range_is_rounded_and_never_empty():
    statistics = statistics_of(images("uint16"))
    (low, high), *others = statistics.value_ranges(0.1, 99.9, per_band=False)
    assert low == 0
    assert not others
    assert 1000 < high < 10_000
    assert len(statistics.value_ranges(0.1, 99.9, per_band=True)) == 2
    constant = statistics_of([np.full((4, 4, 1), 7, np.uint16)])
    assert constant.value_ranges(0.1, 99.9, per_band=False) == [[7, 8]]


def test_images_of_another_type_or_number_of_bands_are_told():
    statistics = statistics_of(images("uint16", 1))
    reading = Reading(None, None)
    other = reading(DecodedImage(np.zeros((2, 2, 3), np.uint16)))
    assert statistics.add(other) == "3 bands of uint16; the others have 2 of uint16"
    assert statistics.num_images == 1
