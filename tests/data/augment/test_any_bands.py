"""Images of any number of bands, in float32: both engines, evaluation, and the user's own code."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from moco.data.augment.operation import ImageKind
from moco.data.augment.operations import ColorJitter, GaussianBlur, RandomResizedCrop
from moco.data.augment.trial import try_own_steps
from moco.data.augment.views import EvaluationView, ViewPair
from moco.data.loading.loaders import PairMaker
from moco.errors import InputError
from tests.data.augment.test_other_fields import drawn_for, of_kind, one_by_one
from tests.data.augment.test_views import make_pairs, settings, smooth, view_pair

MODULE = "tests.data.augment.my_augs"
CROP = {"random_resized_crop": {"scale": [0.2, 1.0]}}
PLAIN = {"mean": [0.0], "std": [1.0], "image_size": 32}


@pytest.fixture
def images(generator):
    """Images of several sizes with 13 bands, float32 in 0..1."""
    sizes = [(90, 120), (64, 64), (33, 200), (48, 40), (20, 24)]
    found = []
    for height, width in sizes:
        planes = [smooth(generator, height, width) for _ in range(5)]
        image = np.concatenate(planes, 2)[..., :13].astype(np.float32) / 255
        found.append(np.ascontiguousarray(image))
    return found


def first_bands(images, bands):
    return [np.ascontiguousarray(image[..., :bands]) for image in images]


@pytest.mark.parametrize("bands", [1, 4, 13])
@pytest.mark.parametrize("name", ["satellite", "xray", "microscopy"])
def test_both_engines_make_the_same_pairs_of_any_bands(name, bands, images):
    # One band cannot be dropped.
    query = {key: value for key, value in settings(name)["query"].items() if key != "band_drop"}
    images = first_bands(images, bands) * 4
    pairs = {}
    for engine in ("worker", "batch"):
        augment = ViewPair(query, **PLAIN, engine=engine, bands=bands, is_float=True)
        pairs[engine] = make_pairs(augment, images)
        assert pairs[engine].shape == (2, 20, bands, 32, 32)
        assert pairs[engine].min() >= -1e-6
        assert pairs[engine].max() <= 1 + 1e-6
    difference = (pairs["worker"] - pairs["batch"]).abs()
    # A value beside the edge of two levels or photons may be on either side.
    assert difference.median() < 1e-6
    assert difference.mean() < 1e-4


def test_float_rgb_has_the_views_of_8_bit_rgb_within_rounding(images):
    rgb = [np.round(image * 255).astype(np.uint8) for image in first_bands(images, 3)] * 4
    floats = [(image / 255).astype(np.float32) for image in rgb]
    for name in ("moco_v2", "byol", "aerial", "pathology"):
        of_8_bit = make_pairs(ViewPair(**settings(name) | PLAIN), rgb)
        of_float = make_pairs(ViewPair(**settings(name) | PLAIN, is_float=True), floats)
        difference = (of_8_bit - of_float).abs()
        assert difference.median() < 1.5 / 255, name
        assert difference.mean() < 2.5 / 255, name


@pytest.mark.parametrize("bands", [1, 3, 13, 200])
def test_operations_of_the_published_pairs_are_the_same_in_both_engines(bands, images):
    # OpenCV takes at most 128 bands.
    image = torch.from_numpy(np.tile(images[0], 16)[..., :bands]).permute(2, 0, 1)
    batch = torch.stack([image] * (2 if bands == 200 else 12))
    hue = 0.1 if bands == 3 else 0
    operations = [
        RandomResizedCrop(32, [0.2, 1]),
        RandomResizedCrop(100, [0.2, 1]),
        ColorJitter(0.4, 0.4, 4 * hue, hue),
        GaussianBlur([0.1, 2]),
    ]
    for operation in operations:
        operation = of_kind(operation, ImageKind(bands, True))
        drawn = drawn_for(operation, (90, 120), len(batch))
        by_batch = operation.on_batch(batch, drawn)
        by_worker = one_by_one(operation, batch, drawn)
        assert (by_worker - by_batch).abs().max() < 1e-4, operation


def test_the_evaluation_view_is_pillows_resize_of_each_band(images):
    view = pickle.loads(pickle.dumps(EvaluationView(28, 0.875, [0.5], [0.25], 13, True)))
    for image in images[:3]:
        height, width = image.shape[:2]
        scale = 32 / min(height, width)
        size = (int(width * scale), int(height * scale))
        resized = []
        for band in range(13):
            plane = Image.fromarray(image[..., band])
            resized.append(np.asarray(plane.resize(size, Image.Resampling.BILINEAR)))
        top, left = round((size[1] - 28) / 2), round((size[0] - 28) / 2)
        expected = np.stack(resized)[:, top : top + 28, left : left + 28]
        ours = view(image) * 0.25 + 0.5
        np.testing.assert_allclose(ours.numpy(), expected, atol=2e-4)
    rgb = np.round(images[0][..., :3] * 255).astype(np.uint8)
    of_rgb = EvaluationView(28, 0.875, [0.5], [0.25])
    assert torch.equal(of_rgb(rgb), of_rgb(Image.fromarray(rgb)))


@pytest.mark.parametrize(
    ("operation", "bands", "message"),
    [
        (
            {"color_jitter": {"hue": 0.1}},
            13,
            "augmentation.query.color_jitter: hue and saturation need 3 bands (RGB), the images "
            "have 13; use band_jitter, as augmentation=satellite, xray and microscopy do",
        ),
        (
            {"grayscale": {}},
            1,
            "augmentation.query.grayscale: luma needs 3 bands (RGB), the images have 1; use "
            "band_mean",
        ),
        (
            {"solarize": {}},
            4,
            "augmentation.query.solarize: its threshold of 256 needs 3 bands (RGB), the images "
            "have 4; use histogram_shift",
        ),
        (
            {"stain_jitter": {}},
            4,
            "augmentation.query.stain_jitter: stains need 3 bands (RGB), the images have 4; use "
            "band_jitter",
        ),
        (
            {"band_drop": {}},
            1,
            "augmentation.query.band_drop: it needs at least 2 bands, the images have 1; leave it "
            "out",
        ),
        (
            {"band_jitter": {"shared": 1}},
            3,
            "augmentation.query.band_jitter: shared=1: expected true or false",
        ),
    ],
)
def test_operations_that_need_other_bands_name_the_alternative(operation, bands, message):
    with pytest.raises(InputError) as raised:
        ViewPair(CROP | operation, **PLAIN, bands=bands, is_float=True)
    assert str(raised.value) == message


def test_quarter_turns_come_after_the_crop():
    message = r"augmentation\.query\.quarter_turns: expected after random_resized_crop, which"
    with pytest.raises(InputError, match=message):
        ViewPair({"quarter_turns": {}} | CROP)
    ViewPair(CROP | {"color_jitter": {"brightness": 0.4}}, **PLAIN, bands=13, is_float=True)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 4), np.float32), "expected a float32 array (height, width, 5) in 0..1, g"),
        (np.zeros((8, 8, 5), np.uint8), "expected a float32 array (height, width, 5) in 0..1, got"),
        (np.full((8, 8, 5), 300, np.float32), "expected values in 0..1, got 300 to 300"),
        (np.full((8, 8, 5), np.nan, np.float32), "expected values in 0..1, got nan to nan"),
        (Image.new("RGB", (8, 8)), "expected a float32 array (height, width, 5) in 0..1, got Ima"),
    ],
)
def test_a_pair_of_one_image_takes_its_own_kind(image, message):
    views = ViewPair(CROP, **PLAIN, bands=5, is_float=True)
    with pytest.raises(InputError) as raised:
        views(image)
    assert str(raised.value).startswith(message)
    query, key = views(np.full((8, 9, 5), 0.25, np.float32))
    assert query.shape == key.shape == (5, 32, 32)
    torch.testing.assert_close(query, torch.full_like(query, 0.25))


class Encoded:
    def __init__(self, array):
        self.array = array

    def pixels(self):
        return self.array


def test_images_in_memory_have_the_views_of_loader_processes_with_their_own_mean(images):
    mean, std = [0.1 + 0.05 * band for band in range(13)], [0.2 + 0.01 * band for band in range(13)]
    augment = ViewPair(CROP, mean=mean, std=std, image_size=16, bands=13, is_float=True)
    batch = PairMaker(augment)([(n, Encoded(images[0]), "x") for n in range(6)], 2)
    assert batch.views[0].dtype == torch.float32
    kept = batch.views[0].clone()
    finished = augment.finished(batch.views, 2, batch.indices)
    assert torch.equal(batch.views[0], kept)
    planes = torch.stack([torch.from_numpy(images[0]).permute(2, 0, 1)] * 6).contiguous()
    in_memory = augment.on_batch(planes, 2, batch.indices)
    for place in (0, 1):
        torch.testing.assert_close(finished[place], in_memory[place], atol=1e-4, rtol=0)
    by_hand = (kept - torch.tensor(mean).view(13, 1, 1)) / torch.tensor(std).view(13, 1, 1)
    torch.testing.assert_close(finished[0], by_hand)
    assert augment.black_image().shape == (1, 1, 13)
    assert augment.black_image().dtype == np.float32
    assert view_pair().black_image().dtype == np.uint8


@pytest.mark.parametrize("engine", ["worker", "batch"])
def test_own_operations_get_the_images_of_the_run(engine, images):
    for name in ("Halve", "HalveBatch"):
        query = CROP | {"own": {"target": f"{MODULE}:{name}"}}
        augment = ViewPair(query, **PLAIN, engine=engine, bands=13, is_float=True)
        plain = ViewPair(CROP, **PLAIN, engine=engine, bands=13, is_float=True)
        try_own_steps(augment, images[0], 0)
        expected = make_pairs(plain, images) / 2
        torch.testing.assert_close(make_pairs(augment, images), expected, atol=1e-6, rtol=0)
    query = CROP | {"own": {"target": f"{MODULE}:Fade"}}
    message = r"own: on_image returned ndarray of uint8 \(32, 32, 13\); expected ndarray of float32"
    with pytest.raises(InputError, match=message):
        try_own_steps(ViewPair(query, **PLAIN, bands=13, is_float=True), images[0], 0)


def test_a_pipeline_gets_and_returns_float_tensors(images):
    views = {"transforms": f"{MODULE}:float_crop"}
    augment = ViewPair(views, **PLAIN, bands=13, is_float=True)
    augment = pickle.loads(pickle.dumps(augment))
    try_own_steps(augment, images[0], 0)
    query, key = augment(images[0])
    assert query.shape == (13, 32, 32)
    assert 0 <= query.min() < query.max() <= 1
    assert not torch.equal(query, key)
    for function, message in [
        ("as_array", "returned ndarray; expected a tensor"),
        ("three_bands", "returned a tensor of shape (3, 32, 32); expected (13, 32, 32)"),
        ("bytes_of", "returned a tensor of torch.uint8; expected floating-point values in 0..1"),
    ]:
        views = {"transforms": f"{MODULE}:{function}"}
        with pytest.raises(InputError) as raised:
            ViewPair(views, **PLAIN, bands=13, is_float=True)(images[0])
        assert str(raised.value).endswith(message)
