"""Golden tests: each pair, operation by operation and in its order, against the official recipe from torchvision's v1 ops."""

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms as v1

from moco.config.parsing import CONFIG_DIR
from moco.data.augmentations import ViewPair, build_evaluation_view, build_view
from moco.data.randomness import derived_seed, draws_from
from moco.errors import InputError


@pytest.fixture
def picture(generator):
    smooth = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(smooth).resize((120, 90), Image.Resampling.BICUBIC)


def pair(name):
    config = yaml.safe_load((CONFIG_DIR / "augmentation" / f"{name}.yaml").read_text())
    if config["key"] == "${.query}":
        config["key"] = config["query"]
    return config


class PillowBlur:
    """The official MoCo v2 blur, its sigma drawn from torch so that both sides can be given the same draws."""

    def __call__(self, picture):
        return picture.filter(ImageFilter.GaussianBlur(radius=float(torch.empty(1).uniform_(0.1, 2.0))))


CROP = v1.RandomResizedCrop(64, scale=(0.2, 1.0))
CROP_MOBY = v1.RandomResizedCrop(64, scale=(0.08, 1.0))
JITTER_V2 = v1.RandomApply([v1.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
JITTER_BYOL = v1.RandomApply([v1.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
GRAY = v1.RandomApply([v1.Grayscale(3)], p=0.2)
FLIP = v1.RandomApply([v1.RandomHorizontalFlip(p=1.0)], p=0.5)
SOLARIZE = v1.RandomApply([v1.Lambda(ImageOps.solarize)], p=0.2)


def blur(probability):
    return PillowBlur() if probability == 1 else v1.RandomApply([PillowBlur()], p=probability)


class Flip:
    """A flip that draws once, as RandomHorizontalFlip(p=0.5) does."""

    def __call__(self, picture):
        return v1.RandomHorizontalFlip(p=0.5)(picture)


OFFICIAL = {
    "moco_v1 query": [CROP, GRAY, v1.ColorJitter(0.4, 0.4, 0.4, 0.4), Flip()],
    "moco_v2 query": [CROP, JITTER_V2, GRAY, blur(0.5), Flip()],
    "byol query": [CROP, JITTER_BYOL, GRAY, blur(1), Flip()],
    "byol key": [CROP, JITTER_BYOL, GRAY, blur(0.1), SOLARIZE, Flip()],
    "moby query": [CROP_MOBY, Flip(), JITTER_BYOL, GRAY, blur(1)],
    "moby key": [CROP_MOBY, Flip(), JITTER_BYOL, GRAY, blur(0.1), SOLARIZE],
    "cifar query": [v1.RandomResizedCrop(64, scale=(0.08, 1.0)), Flip(), JITTER_V2, GRAY],
}


@pytest.mark.parametrize("recipe", OFFICIAL)
def test_view_equals_the_official_recipe_draw_by_draw(recipe, picture):
    name, side = recipe.split()
    ours = build_view(pair(name)[side], 64, "augmentation")
    official = v1.Compose(OFFICIAL[recipe])
    different = set()
    for seed in range(60):
        views = []
        for transform in (ours, official):
            torch.manual_seed(seed)
            views.append(np.asarray(transform(picture)))
        np.testing.assert_array_equal(*views)
        different.add(views[0].tobytes())
    assert len(different) == 60


@pytest.mark.parametrize("name", ["moco_v1", "moco_v2", "cifar", "digits"])
def test_symmetric_pairs_have_the_same_operations_in_both_views(name):
    assert pair(name)["query"] == pair(name)["key"]


def test_normalisation_equals_to_tensor_and_normalize(picture):
    config = pair("cifar")
    view = build_evaluation_view(90, 1.0, config["mean"], config["std"])
    official = v1.Compose([v1.CenterCrop(90), v1.ToTensor(), v1.Normalize(config["mean"], config["std"])])
    torch.testing.assert_close(view(picture), official(picture))


def test_evaluation_view_is_the_official_resize_and_centre_crop(picture):
    ours = build_evaluation_view(56, 0.875, [0.5] * 3, [0.5] * 3)
    official = v1.Compose([v1.Resize(64), v1.CenterCrop(56), v1.ToTensor(), v1.Normalize([0.5] * 3, [0.5] * 3)])
    torch.testing.assert_close(ours(picture), official(picture))


def view_pair(seed=0):
    config = pair("moco_v2")
    return ViewPair(config["query"], config["key"], config["mean"], config["std"], 32, seed)


def test_draws_depend_on_seed_epoch_index_and_view_alone(picture):
    augment = view_pair()
    first = augment(picture, 3, 5)
    torch.rand(17)
    augment(picture, 8, 1)
    again = augment(picture, 3, 5)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    others = [augment(picture, 3, 6), augment(picture, 4, 5), view_pair(seed=1)(picture, 3, 5)]
    views = [first[0], first[1], *(other[0] for other in others)]
    assert all(not torch.equal(a, b) for i, a in enumerate(views) for b in views[:i])


def test_drawing_leaves_the_global_generator_as_it_was(picture):
    state = torch.get_rng_state()
    view_pair()(picture, 0, 0)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(KeyError), draws_from(1):
        raise KeyError
    assert torch.equal(torch.get_rng_state(), state)


def test_derived_seeds_of_neighbouring_numbers_differ():
    seeds = {derived_seed(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)


CROP_ONLY = {"random_resized_crop": {"scale": [0.2, 1.0]}}


@pytest.mark.parametrize(
    ("operations", "message"),
    [
        ({"grayscale": {}}, "augmentation.query: random_resized_crop is missing"),
        (
            CROP_ONLY | {"color_jiter": {}},
            "augmentation.query: unknown operation 'color_jiter'; did you mean 'color_jitter'",
        ),
        (
            CROP_ONLY | {"color_jitter": {"hoe": 0.1}},
            "augmentation.query.color_jitter: unknown setting 'hoe'; did you mean 'hue'",
        ),
        (
            CROP_ONLY | {"grayscale": {"probability": 1.5}},
            "augmentation.query.grayscale: probability=1.5: expected a number",
        ),
        (CROP_ONLY | {"gaussian_blur": {"sigma": [2, 1]}}, "augmentation.query.gaussian_blur: sigma="),
        (CROP_ONLY | {"gaussian_blur": {"sigma": 1}}, "augmentation.query.gaussian_blur: "),
        (CROP_ONLY | {"gaussian_blur": {}}, "augmentation.query.gaussian_blur: "),
        (CROP_ONLY | {"color_jitter": {"hue": 0.7}}, "augmentation.query.color_jitter: hue=0.7"),
        (CROP_ONLY | {"color_jitter": 3}, "augmentation.query.color_jitter: expected settings"),
        (CROP_ONLY | {"gaussian_blur": {"sigma": [0.1, 1, 2]}}, "augmentation.query.gaussian_blur: sigma="),
        (CROP_ONLY | {"solarize": {"threshold": "abc"}}, "augmentation.query.solarize: threshold=abc"),
        (CROP_ONLY | {"grayscale": {"probability": "often"}}, "augmentation.query.grayscale: probability=often"),
        ({"random_resized_crop": {"scale": 5}}, "augmentation.query.random_resized_crop: scale=5"),
        (
            {"random_resized_crop": {"scale": [0.2, 1], "probability": 0.5}},
            "augmentation.query.random_resized_crop: prob",
        ),
        ({"random_resized_crop": {"scale": [0.0, 1.0]}}, "augmentation.query.random_resized_crop: scale="),
    ],
)
def test_mistakes_in_a_pair_name_the_key(operations, message):
    with pytest.raises(InputError) as error:
        build_view(operations, 32, "augmentation.query")
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(("mean", "std"), [([0.5], [0.5] * 3), ([0.5] * 3, [0.5, 0, 0.5])])
def test_normalisation_needs_three_numbers_and_a_spread(mean, std):
    with pytest.raises(InputError, match=r"augmentation\.mean=.*augmentation\.std=.*expected three numbers each"):
        build_evaluation_view(32, 1.0, mean, std)


@pytest.mark.parametrize(
    ("operation", "changed"),
    [
        ({"horizontal_flip": {}}, True),
        ({"solarize": {"threshold": 0}}, True),
        ({"solarize": {"threshold": 256}}, False),
        ({"random_affine": {"degrees": 10, "translate": 0.1, "shear": 5}}, True),
        ({"grayscale": {"probability": 0.0}}, False),
    ],
)
def test_operations_do_what_their_names_say(operation, changed, picture):
    view = build_view({"random_resized_crop": {"scale": [1.0, 1.0], "ratio": [4 / 3, 4 / 3]}} | operation, 60, "x")
    plain = np.asarray(picture.resize((60, 60), Image.Resampling.BILINEAR))
    assert (not np.array_equal(np.asarray(view(picture)), plain)) == changed
