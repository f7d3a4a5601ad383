import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision import transforms as v1

from moco.config.parsing import CONFIG_DIR
from moco.data.augment.views import ViewPair, build_evaluation_view, rgb_batch
from moco.errors import InputError


def settings(name="moco_v2"):
    config = yaml.safe_load((CONFIG_DIR / "augmentation" / f"{name}.yaml").read_text())
    return config | ({"key": config["query"]} if config["key"] == "${.query}" else {})


def view_pair(name="moco_v2", image_size=32, seed=0, engine="worker"):
    config = settings(name)
    return ViewPair(
        config["query"], config["key"], config["mean"], config["std"], image_size, seed, engine
    )


@pytest.fixture
def images(generator):
    """Of several sizes, smooth enough that an error of half a pixel does not count."""
    sizes = [(90, 120), (64, 64), (33, 200), (48, 40), (70, 71)]
    small = [generator.integers(0, 256, (6, 8, 3), dtype=np.uint8) for _ in sizes]
    return [
        np.array(Image.fromarray(array).resize(size[::-1], Image.Resampling.BICUBIC))
        for array, size in zip(small, sizes, strict=True)
    ]


def made(augment, images, epoch=0, indices=None):
    indices = torch.arange(len(images)) if indices is None else torch.tensor(indices)
    views = augment.empty_views(len(images))
    augment.on_images(images, epoch, indices, views)
    return torch.stack(augment.finished(views, epoch, indices))


@pytest.mark.parametrize("name", ["moco_v1", "moco_v2", "byol", "moby", "cifar", "digits"])
def test_both_engines_make_the_same_pairs_within_rounding(name, images):
    many = images * 20
    pairs = [made(view_pair(name, engine=engine), many) for engine in ("worker", "batch")]
    std = torch.tensor(settings(name)["std"]).view(1, 1, 3, 1, 1)
    difference = ((pairs[0] - pairs[1]) * std * 255).abs()  # grey levels of 256
    assert difference.median() < 2
    assert difference.mean() < 2.5


def test_in_memory_the_device_takes_every_step_as_workers_would(generator):
    smooth = generator.integers(0, 256, (40, 6, 6, 3), dtype=np.uint8)
    array = np.stack(
        [
            np.asarray(Image.fromarray(one).resize((40, 40), Image.Resampling.BICUBIC))
            for one in smooth
        ]
    )
    augment, indices = view_pair(), torch.arange(40)
    in_memory = torch.stack(augment.on_batch(rgb_batch(torch.from_numpy(array)), 5, indices))
    one_by_one = made(augment, list(array), epoch=5)
    difference = (
        (in_memory - one_by_one) * torch.tensor(augment.std).view(1, 1, 3, 1, 1) * 255
    ).abs()
    assert difference.median() < 2
    assert difference.mean() < 2.5


@pytest.mark.parametrize("engine", ["worker", "batch"])
def test_draws_depend_on_seed_epoch_index_and_view_alone(engine, images):
    image = images[0]
    first = made(view_pair(engine=engine), [image], 3, [5])
    among_others = made(view_pair(engine=engine), [*images, image], 3, [0, 1, 2, 3, 4, 5])
    torch.testing.assert_close(first[:, 0], among_others[:, 5], atol=1e-6, rtol=0)
    others = [
        made(view_pair(engine=engine), [image], 3, [6]),
        made(view_pair(engine=engine), [image], 4, [5]),
        made(view_pair(engine=engine, seed=1), [image], 3, [5]),
    ]
    views = [first[0], first[1], *(other[0] for other in others)]
    assert all(not torch.equal(a, b) for i, a in enumerate(views) for b in views[:i])


def test_pieces_of_a_batch_are_put_together_in_order(monkeypatch, generator):
    images = torch.from_numpy(generator.integers(0, 256, (7, 3, 8, 8), dtype=np.uint8))
    augment, indices = view_pair(image_size=8), torch.arange(7)
    whole = augment.on_batch(images, 0, indices)
    monkeypatch.setattr("moco.data.augment.views.VALUES_AT_ONCE", 400)  # two images
    for one, other in zip(whole, augment.on_batch(images, 0, indices), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_pixels_in_memory_become_rgb(generator):
    grey = generator.integers(0, 256, (3, 4, 5), dtype=np.uint8)
    assert torch.equal(rgb_batch(torch.from_numpy(grey)), torch.from_numpy(np.stack([grey] * 3, 1)))
    rgba = generator.integers(0, 256, (2, 4, 5, 4), dtype=np.uint8)
    rgba[0, ..., 3], rgba[1, ..., 3] = 255, 0
    opaque, transparent = rgb_batch(torch.from_numpy(rgba))
    assert np.array_equal(opaque.permute(1, 2, 0), rgba[0, ..., :3])
    assert (transparent == 255).all()


def test_normalisation_equals_to_tensor_and_normalize(images):
    config, image = settings("cifar"), Image.fromarray(images[0])
    official = v1.Compose(
        [v1.CenterCrop(90), v1.ToTensor(), v1.Normalize(config["mean"], config["std"])]
    )
    view = build_evaluation_view(90, 1.0, config["mean"], config["std"])
    torch.testing.assert_close(view(image), official(image))
    augment = view_pair("cifar")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    uncropped = v1.Compose([v1.ToTensor(), v1.Normalize(config["mean"], config["std"])])
    torch.testing.assert_close(augment.normalized(pixels)[0], uncropped(image))


def test_evaluation_view_is_the_official_resize_and_centre_crop(images):
    ours = build_evaluation_view(56, 0.875, [0.5] * 3, [0.5] * 3)
    official = v1.Compose(
        [v1.Resize(64), v1.CenterCrop(56), v1.ToTensor(), v1.Normalize([0.5] * 3, [0.5] * 3)]
    )
    torch.testing.assert_close(
        ours(Image.fromarray(images[0])), official(Image.fromarray(images[0]))
    )


@pytest.mark.parametrize(("mean", "std"), [([0.5], [0.5] * 3), ([0.5] * 3, [0.5, 0, 0.5])])
def test_normalisation_needs_three_numbers_and_a_spread(mean, std):
    with pytest.raises(
        InputError, match=r"augmentation\.mean=.*augmentation\.std=.*expected three numbers each"
    ):
        build_evaluation_view(32, 1.0, mean, std)
