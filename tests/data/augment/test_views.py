import logging

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision import transforms as v1

from moco.config.parsing import CONFIG_DIR
from moco.data.augment.views import EvaluationView, ViewPair
from moco.data.sources.source import ArrayImages
from moco.errors import InputError

HALF = [0.5] * 3


def settings(name="moco_v2"):
    text = (CONFIG_DIR / "augmentation" / f"{name}.yaml").read_text()
    config = yaml.safe_load(text)
    if config["key"] == "${.query}":
        config["key"] = config["query"]
    return config


def view_pair(name="moco_v2", image_size=32, seed=0, engine="worker"):
    return ViewPair(**settings(name), image_size=image_size, seed=seed, engine=engine)


def smooth(generator, height, width):
    """Return an image on which an error of half a pixel has little effect."""
    small = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return np.array(small.resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def images(generator):
    """Images of several sizes."""
    sizes = [(90, 120), (64, 64), (33, 200), (48, 40), (70, 71)]
    return [smooth(generator, height, width) for height, width in sizes]


def make_pairs(augment, images, epoch=0, indices=None):
    """Return the finished views, (2, images, 3, side, side)."""
    indices = torch.arange(len(images)) if indices is None else torch.tensor(indices)
    views = augment.empty_views(len(images))
    augment.on_images(images, epoch, indices, views)
    return torch.stack(augment.finished(views, epoch, indices))


def assert_equal_within_rounding(one, other, std):
    """Compare normalised views in grey levels of 256."""
    scale = 255 * torch.tensor(std).view(1, 1, -1, 1, 1)
    difference = ((one - other) * scale).abs()
    assert difference.median() < 2
    assert difference.mean() < 2.5


PAIRS = ["moco_v1", "moco_v2", "byol", "moby", "cifar", "digits"]
OTHER_FIELDS = ["aerial", "microscopy", "pathology", "satellite", "xray"]


@pytest.mark.parametrize("name", PAIRS + OTHER_FIELDS)
def test_both_engines_make_the_same_pairs_within_rounding(name, images):
    many = images * (8 if name in OTHER_FIELDS else 20)
    by_worker = make_pairs(view_pair(name, engine="worker"), many)
    by_batch = make_pairs(view_pair(name, engine="batch"), many)
    assert_equal_within_rounding(by_worker, by_batch, settings(name)["std"])


def test_the_device_makes_the_pairs_of_images_in_memory_as_processes_would(generator):
    arrays = [smooth(generator, 40, 40) for _ in range(40)]
    augment = view_pair()
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    in_memory = torch.stack(augment.on_batch(pixels, 5, torch.arange(40)))
    one_by_one = make_pairs(augment, arrays, epoch=5)
    assert_equal_within_rounding(in_memory, one_by_one, augment.std)


@pytest.mark.parametrize("engine", ["worker", "batch"])
def test_draws_depend_on_seed_epoch_index_and_view_alone(engine, images):
    image = images[0]
    alone = make_pairs(view_pair(engine=engine), [image], 3, [5])
    among_others = make_pairs(view_pair(engine=engine), [*images, image], 3, [0, 1, 2, 3, 4, 5])
    torch.testing.assert_close(alone[:, 0], among_others[:, 5], atol=1e-6, rtol=0)
    other_index = make_pairs(view_pair(engine=engine), [image], 3, [6])
    other_epoch = make_pairs(view_pair(engine=engine), [image], 4, [5])
    other_seed = make_pairs(view_pair(engine=engine, seed=1), [image], 3, [5])
    views = [alone[0], alone[1], other_index[0], other_epoch[0], other_seed[0]]
    for number, view in enumerate(views):
        for earlier in views[:number]:
            assert not torch.equal(view, earlier)


def test_the_pieces_of_a_batch_are_put_together_in_order(monkeypatch, generator):
    images = torch.from_numpy(generator.integers(0, 256, (7, 3, 8, 8), dtype=np.uint8))
    augment = view_pair(image_size=8)
    whole = augment.on_batch(images, 0, torch.arange(7))
    two_images = 400
    monkeypatch.setattr("moco.data.augment.views.VALUES_AT_ONCE", two_images)
    in_pieces = augment.on_batch(images, 0, torch.arange(7))
    torch.testing.assert_close(in_pieces, whole, atol=1e-6, rtol=0)


def test_grey_pixels_in_memory_become_rgb(generator):
    grey = generator.integers(0, 256, (3, 4, 5), dtype=np.uint8)
    assert torch.equal(ArrayImages(grey, "grey").tensor, torch.from_numpy(np.stack([grey] * 3, -1)))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "float16", "float64"])
def test_other_pixels_in_memory_keep_their_bands_and_type(dtype, generator, caplog):
    caplog.set_level(logging.INFO, logger="moco")
    array = generator.integers(0, 256, (2, 6, 5, 4)).astype(dtype)
    images = ArrayImages(array, "four")
    assert np.array_equal(images.tensor.numpy(), array)
    assert images.opened(1).pixels().dtype == dtype
    assert ("counts as a band and not as transparency" in caplog.text) == (dtype == "uint8")
    swapped = array.astype(array.dtype.newbyteorder())
    assert np.array_equal(ArrayImages(swapped, "swapped").tensor.numpy(), array)


def test_normalisation_equals_to_tensor_and_normalize(images):
    config = settings("cifar")
    mean, std = config["mean"], config["std"]
    image = Image.fromarray(images[0])
    official = v1.Compose([v1.CenterCrop(90), v1.ToTensor(), v1.Normalize(mean, std)])
    view = EvaluationView(90, 1.0, mean, std)
    torch.testing.assert_close(view(image), official(image))
    pixels = torch.from_numpy(images[0]).permute(2, 0, 1)[None]
    uncropped = v1.Compose([v1.ToTensor(), v1.Normalize(mean, std)])
    torch.testing.assert_close(view_pair("cifar").normalized(pixels)[0], uncropped(image))


def test_the_evaluation_view_is_the_official_resize_and_centre_crop(images):
    view = EvaluationView(56, 0.875, HALF, HALF)
    resize_and_crop = [v1.Resize(64), v1.CenterCrop(56)]
    official = v1.Compose([*resize_and_crop, v1.ToTensor(), v1.Normalize(HALF, HALF)])
    image = Image.fromarray(images[0])
    torch.testing.assert_close(view(image), official(image))


@pytest.mark.parametrize(
    ("mean", "std", "bands", "message"),
    [
        ([0.5], [0.5, 0, 0.5], 3, "augmentation.std=[0.5, 0, 0.5]: expected numbers above 0"),
        (HALF, [0.5], 13, "augmentation.mean has 3 numbers, the images have 13 bands; python -m"),
        ([0.5], HALF, 1, "augmentation.std has 3 numbers, the images have 1 band; python -m moco"),
    ],
)
def test_normalisation_needs_a_number_for_each_band_and_a_spread(mean, std, bands, message):
    with pytest.raises(InputError) as raised:
        EvaluationView(32, 1.0, mean, std, bands, is_float=bands != 3)
    assert str(raised.value).startswith(message)
