"""Operations for satellite images, X-rays, microscopy and pathology, against other libraries."""

import cv2
import numpy as np
import pytest
import torch
from scipy import stats
from skimage.color import combine_stains, hed_from_rgb, rgb_from_hed, separate_stains
from torchvision.transforms.v2 import functional as official

from moco.data.augment.bands import BandDrop, BandJitter, BandMean
from moco.data.augment.draws import seeded_normals
from moco.data.augment.noise import Cutout, GaussianNoise, PoissonNoise
from moco.data.augment.operation import ImageKind
from moco.data.augment.operations import QuarterTurns, VerticalFlip
from moco.data.augment.stains import StainJitter
from moco.data.augment.tone import HistogramShift, LocalContrast, Sharpness

NUM = 12
MANY_BANDS = ImageKind(13, True)
RGB = ImageKind()
ALL = [
    VerticalFlip(),
    QuarterTurns(),
    BandJitter(0.4, 0.4, 0.3),
    BandJitter(0.4, 0.4),
    BandMean(),
    BandDrop(0.3),
    GaussianNoise([0.01, 0.1]),
    PoissonNoise([20, 200]),
    Cutout([0.2, 0.6]),
    StainJitter(),
    HistogramShift(),
    LocalContrast(tiles=4),
    Sharpness(),
]


@pytest.fixture
def images(generator):
    """Return smooth images with many bands, (NUM, 13, 24, 24)."""
    small = torch.from_numpy(generator.random((NUM, 13, 6, 6), dtype=np.float32))
    return torch.nn.functional.interpolate(small, size=(24, 24), mode="bicubic").clamp(0, 1)


def of_kind(operation, kind):
    operation.image_kind = kind
    return operation


def drawn_for(operation, size=(24, 24), num=NUM, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(num, operation.num_draws, dtype=torch.float64, generator=generator)
    return operation.draw(draws, torch.tensor([size] * num))


def one_by_one(operation, images, drawn):
    """Return what loader processes make of a batch, as (batch, bands, height, width) in 0..1."""
    kind = operation.image_kind
    results = []
    for row, image in enumerate(images):
        array = image.permute(1, 2, 0).numpy()
        if not kind.is_float:
            array = np.round(array * 255).astype(np.uint8)
        own = {name: values[row].numpy() for name, values in drawn.items()}
        kept = array.copy()
        result = operation.on_image(array, own)
        assert np.array_equal(array, kept)
        assert result.dtype == array.dtype
        assert result.shape[2] == array.shape[2]
        results.append(torch.from_numpy(result).permute(2, 0, 1) / kind.largest)
    return torch.stack(results)


@pytest.mark.parametrize("operation", ALL, ids=lambda operation: type(operation).__name__)
def test_both_engines_do_the_same_to_both_kinds_of_image(operation, images):
    for kind in (MANY_BANDS, RGB):
        if kind == MANY_BANDS and isinstance(operation, StainJitter):
            continue
        given = images[:, : kind.bands]
        tolerance = 2e-6
        if kind == RGB:
            given = (given * 255).round() / 255
            tolerance = 0.51 / 255
        operation = of_kind(operation, kind)
        drawn = drawn_for(operation)
        kept = given.clone()
        by_batch = operation.on_batch(given, drawn)
        assert torch.equal(given, kept)
        assert by_batch.min() >= 0
        assert by_batch.max() <= 1
        by_worker = one_by_one(operation, given, drawn)
        assert (by_batch - by_worker).abs().max() <= tolerance
        assert not torch.equal(by_batch, given)
        assert isinstance(operation.describe({name: v[0] for name, v in drawn.items()}), str)


def test_flips_and_turns_are_numpys(images):
    drawn = drawn_for(QuarterTurns())
    turned = QuarterTurns().on_batch(images, drawn)
    assert set(drawn["turns"].tolist()) == {0, 1, 2, 3}
    for row, turns in enumerate(drawn["turns"].tolist()):
        expected = np.rot90(images[row].numpy(), turns, axes=(1, 2))
        assert np.array_equal(turned[row].numpy(), expected)
    assert torch.equal(VerticalFlip().on_batch(images, {}), official.vertical_flip(images))


@pytest.mark.parametrize("shared", [True, False])
def test_band_jitter_equals_the_formula_in_numpy(shared, images):
    operation = of_kind(BandJitter(0.4, 0.3, 0.5, shared), MANY_BANDS)
    drawn = drawn_for(operation)
    ours = operation.on_batch(images, drawn).numpy()
    limits = {"brightness": (0.6, 1.4), "contrast": (0.7, 1.3), "gamma": (1 / 1.5, 1.5)}
    for name, (low, high) in limits.items():
        factors = drawn[name].numpy()
        assert factors.shape == (NUM, 13)
        assert low <= factors.min()
        assert factors.max() <= high
        assert (np.ptp(factors, axis=1) > 0).all() != shared
    for row in range(NUM):
        for band in range(13):
            brightness, contrast, gamma = (float(drawn[name][row, band]) for name in limits)
            values = images[row, band].numpy().astype(float) ** gamma
            values = ((values - values.mean()) * contrast + values.mean()) * brightness
            np.testing.assert_allclose(ours[row, band], values.clip(0, 1), atol=1e-5)


def test_one_factor_of_band_jitter_equals_torchvisions(images):
    for name, theirs in (
        ("gamma", official.adjust_gamma),
        ("brightness", official.adjust_brightness),
    ):
        operation = of_kind(BandJitter(**{name: 0.5}, shared=True), RGB)
        drawn = drawn_for(operation)
        ours = operation.on_batch(images[:, :3], drawn)
        for row in range(NUM):
            expected = theirs(images[row, :3], float(drawn[name][row, 0]))
            torch.testing.assert_close(ours[row], expected)


def test_dropped_bands_are_as_frequent_as_asked_and_one_stays(images):
    operation = of_kind(BandDrop(0.3), MANY_BANDS)
    kept = drawn_for(operation, num=4000)["kept"]
    # One band of 13 always stays.
    assert abs((~kept).double().mean() - 0.3 * 12 / 13) < 0.01
    drawn = drawn_for(operation)
    dropped = operation.on_batch(images, drawn)
    expected = np.where(drawn["kept"].numpy()[:, :, None, None], images.numpy(), 0)
    assert np.array_equal(dropped.numpy(), expected)
    assert (
        of_kind(BandDrop(1.0), MANY_BANDS)
        .draw(torch.rand(50, 1), torch.ones(50, 2))["kept"]
        .sum(1)
        .eq(1)
        .all()
    )
    grey = BandMean().on_batch(images, {}).numpy()
    expected = np.repeat(images.numpy().mean(1, keepdims=True), 13, 1)
    np.testing.assert_allclose(grey, expected, atol=1e-6)


def test_gaussian_noise_is_normal_and_its_own_for_every_value():
    normals = seeded_normals(torch.arange(40), 3001).numpy()
    assert stats.kstest(normals.ravel(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(normals[:-1].ravel(), normals[1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(normals[:, :-1].ravel(), normals[:, 1:].ravel())[0, 1]) < 0.01
    assert np.array_equal(normals[7, :9], seeded_normals(torch.tensor([7]), 9)[0].numpy())
    middle = torch.full((1, 3, 64, 64), 0.5)
    drawn = {"sigma": torch.tensor([0.05]), "seed": torch.tensor([3])}
    noise = (GaussianNoise().on_batch(middle, drawn) - 0.5).numpy()
    assert abs(noise.std() - 0.05) < 0.001
    assert abs(noise.mean()) < 0.001


@pytest.mark.parametrize("mean", [0.0, 0.5, 2.0, 20.0, 150.0])
def test_photons_have_the_mean_and_spread_of_numpys_poisson(mean, generator):
    photons = 200.0
    images = torch.full((1, 3, 128, 128), mean / photons)
    drawn = {"photons": torch.tensor([photons]), "seed": torch.tensor([1])}
    ours = PoissonNoise().on_batch(images, drawn).numpy() * photons
    theirs = generator.poisson(mean, ours.shape)
    np.testing.assert_allclose(ours, ours.round(), atol=1e-4)
    error = 6 * np.sqrt(mean / ours.size)  # of a difference, four standard errors
    assert abs(ours.mean() - theirs.mean()) <= error + 0.05
    assert ours.var() == pytest.approx(theirs.var(), abs=0.15, rel=0.05)


def test_cutout_puts_the_mean_of_each_band_into_a_square(images):
    operation = Cutout([0.2, 0.6])
    drawn = drawn_for(operation)
    ours = operation.on_batch(images, drawn).numpy()
    for row in range(NUM):
        (top, left), (bottom, right) = drawn["start"][row].tolist(), drawn["end"][row].tolist()
        assert bottom - top == right - left
        assert round(0.2 * 24) <= bottom - top <= round(0.6 * 24)
        expected = images[row].numpy().copy()
        rows, columns = slice(max(0, top), bottom), slice(max(0, left), right)
        expected[:, rows, columns] = expected.mean((1, 2))[:, None, None]
        np.testing.assert_allclose(ours[row], expected, atol=1e-6)


def test_stain_jitter_equals_scikit_images_stains(generator):
    stains = generator.uniform(0.01, 0.08, (1, 20, 20, 3))
    pixels = combine_stains(stains, rgb_from_hed).astype(np.float32)
    drawn = {
        "factors": torch.tensor([[0.9, 1.2, 1.1]], dtype=torch.float64),
        "shifts": torch.tensor([[0.04, -0.03, 0.02]], dtype=torch.float64),
    }
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    ours = StainJitter().on_batch(images, drawn).permute(0, 2, 3, 1).numpy()
    # Scikit-image's unit of optical density is that of 1e-6.
    separated = separate_stains(pixels, hed_from_rgb)
    changed = separated * drawn["factors"].numpy() + drawn["shifts"].numpy() / -np.log(1e-6)
    np.testing.assert_allclose(ours, combine_stains(changed, rgb_from_hed), atol=1e-5)


def test_histogram_shift_is_numpys_interpolation_along_a_curve_that_never_falls(images):
    operation = HistogramShift(num_points=6)
    drawn = drawn_for(operation)
    ours = operation.on_batch(images, drawn).numpy()
    at = np.linspace(0, 1, 6)
    for row in range(NUM):
        heights = drawn["heights"][row].numpy()
        assert (np.diff(heights) >= 0).all()
        assert heights[[0, -1]].tolist() == [0, 1]
        expected = np.interp(images[row].numpy(), at, heights)
        np.testing.assert_allclose(ours[row], expected, atol=1e-5)
    spread = drawn_for(operation, num=2000)["heights"][:, 1]
    assert stats.kstest(spread.numpy(), stats.uniform(0, 2 / 5).cdf).pvalue > 1e-3


@pytest.mark.parametrize("limit", [1.5, 4.0, 40.0])
def test_local_contrast_is_opencvs_clahe_within_its_rounding(limit, generator):
    small = generator.integers(0, 256, (9, 9), dtype=np.uint8)
    # In large tiles. In small ones, OpenCV shares out whole pixels unevenly.
    image = cv2.resize(small, (512, 512), interpolation=cv2.INTER_CUBIC)
    theirs = cv2.createCLAHE(limit, (4, 4)).apply(image)
    images = torch.from_numpy(image)[None, None] / 255
    drawn = {"clip_limit": torch.tensor([limit])}
    ours = LocalContrast(tiles=4).on_batch(images, drawn)[0, 0].numpy() * 255
    difference = np.abs(ours - theirs)  # grey levels of 256
    assert difference.mean() < 1
    assert difference.max() < 6
    assert np.abs(image.astype(float) - theirs).mean() > 5


def test_local_contrast_keeps_more_than_eight_bits(generator):
    images = torch.from_numpy(generator.random((2, 1, 64, 64), dtype=np.float32)) / 16
    changed = LocalContrast().on_batch(images, {"clip_limit": torch.tensor([2.0, 4.0])})
    assert len(changed[0].unique()) > 3000


def test_sharpness_is_torchvisions(images):
    drawn = drawn_for(Sharpness(0.8))
    ours = Sharpness(0.8).on_batch(images, drawn)
    for row in range(NUM):
        theirs = official.adjust_sharpness(images[row, :3], float(drawn["factor"][row]))
        torch.testing.assert_close(ours[row, :3], theirs, atol=1e-5, rtol=0)
