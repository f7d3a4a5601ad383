"""A whole pipeline of torchvision as a view: seeded for each image, checked, resumed exactly."""

import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image

from moco.cli.build_pretraining import build_data
from moco.data.augment.draws import draws_from, uniforms
from moco.data.augment.resolution_ramp import ResolutionRamp
from moco.data.augment.trial import try_own_steps
from moco.data.augment.views import ViewPair
from moco.errors import InputError
from moco.preview import draw_pairs
from tests.data.augment import my_augs

MODULE = "tests.data.augment.my_augs"
CROP = {"random_resized_crop": {"scale": [0.2, 1.0]}}


@pytest.fixture
def image(generator):
    return generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)


def pair(function, options=None, key=CROP, **settings):
    query = {"transforms": f"{MODULE}:{function}", "options": options}
    return ViewPair(query, key, image_size=16, **settings)


def test_a_view_is_what_the_pipeline_gives_from_its_seed(image):
    query, key = pair("build", {"smallest": 0.5}, seed=3)(image, epoch=2, index=7)
    number = uniforms(3, 2, torch.tensor([7]), 0, 2)[0, 1]
    with draws_from(int(number * 2**53)):
        expected = my_augs.build(16, 0.5)(Image.fromarray(image))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    assert ((query * std + mean) - expected).abs().max() <= 0.51 / 255
    assert torch.equal(key, ViewPair(CROP, image_size=16, seed=3)(image, 2, 7)[1])


def states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


def test_the_global_generators_are_seeded_and_left_as_they_were(image):
    before = states()
    views = pair("build", key={"transforms": f"{MODULE}:build"})
    first = views(image)
    assert states() == before
    torch.rand(3), random.random(), np.random.rand()
    for ours, theirs in zip(views(image), first, strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(*first)


def small(runner, *overrides):
    return runner.config(
        "augmentation=custom",
        f"augmentation.query={{transforms: {MODULE}:build, options: {{smallest: 0.5}}}}",
        "augmentation.key={random_resized_crop: {scale: [0.2, 1]}, grayscale: {}}",
        *overrides,
    )


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.slow
def test_bits_do_not_depend_on_loader_processes_and_a_resumed_epoch_goes_on(runner, num_workers):
    config = small(runner)
    expected = list(itertools.islice(build_data(config).train_dataloader(), 3))
    config.data.num_workers = num_workers
    loader = build_data(config).train_dataloader()
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    resumed = build_data(config).train_dataloader()
    resumed.load_state_dict(state)
    for theirs, ours in zip(expected[1:], resumed, strict=False):
        assert torch.equal(ours.indices, theirs.indices)
        for view in (0, 1):
            assert torch.equal(ours.views[view], theirs.views[view])


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (
            {"transforms": f"{MODULE}:biuld"},
            f".transforms={MODULE}:biuld: {MODULE} has no 'biuld'; did you mean 'build'?",
        ),
        (
            {"transforms": f"{MODULE}:build", "options": {"smalest": 1}},
            f".options.smalest: {MODULE}:build has no such option; did you mean 'smallest'?",
        ),
        (
            {"transforms": f"{MODULE}:build", "options": {"image_size": 8}},
            ".options.image_size: leave it out; it is data.image_size",
        ),
        ({"transforms": f"{MODULE}:build", "options": 3}, ".options=3: expected {name: value"),
        (
            {"transforms": f"{MODULE}:build", **CROP, "grayscale": {}},
            ".transforms: a whole pipeline has no operations beside it, and there is "
            "random_resized_crop, grayscale; augmentation=custom starts without operations",
        ),
        (
            {"transforms": f"{MODULE}:no_callable"},
            f".transforms={MODULE}:no_callable: returned str; expected a callable",
        ),
        (
            {"transforms": f"{MODULE}:broken"},
            f".transforms={MODULE}:broken: ZeroDivisionError: division by zero",
        ),
    ],
)
def test_a_pipeline_that_cannot_be_built_is_one_line(query, message):
    with pytest.raises(InputError) as raised:
        ViewPair(query, image_size=16)
    assert str(raised.value).startswith(f"augmentation.query{message}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("normalized", "leave out Normalize, since augmentation.mean and augmentation.std do it"),
        ("unresized", "returned a PIL image of mode RGB and 20 x 24 px; expected RGB of 16 x 16"),
        ("build_8px", "returned a tensor of shape (3, 8, 8); expected (3, 16, 16)"),
        ("grey", "returned a PIL image of mode L and 16 x 16 px; expected RGB of 16 x 16 px"),
        ("as_array", "returned ndarray; expected a PIL image or a tensor"),
        ("half", "returned a tensor of torch.int16; expected torch.uint8, or floating-point"),
    ],
)
def test_a_pipeline_that_returns_something_else_is_one_line(function, message, image):
    with pytest.raises(InputError) as raised:
        try_own_steps(pair(function), image, 0)
    assert message in str(raised.value)
    assert str(raised.value).startswith(f"augmentation.query.transforms={MODULE}:{function}: ret")
    assert "\n" not in str(raised.value)


def test_a_pipeline_is_built_for_every_size_of_growing_views(image):
    ramp = ResolutionRamp(16, 8, 8, 2)
    sides = [pair("build", ramp=ramp)(image, epoch)[0].shape[1] for epoch in (0, 2)]
    assert sides == [8, 16]
    message = (
        rf"start_image_size=8: the views grow, and the function of .*{MODULE}:build_8px has no"
    )
    with pytest.raises(InputError, match=message):
        pair("build_8px", ramp=ramp)


def test_a_run_with_a_pipeline_uses_loader_processes_and_is_drawn(runner):
    data = build_data(small(runner))
    assert data.augment.engine == "worker"
    sheet = draw_pairs(data, data.first_images(2))
    assert sheet.width > 1000
    lines = data.augment.describe(0, 0, (20, 24))[0]
    assert lines == ["transforms build.<locals>.augment"]
    message = rf"data\.engine=batch: augmentation.query.transforms={MODULE}:build takes one image"
    with pytest.raises(InputError, match=message):
        build_data(small(runner, "data.engine=batch"))


def test_an_object_of_torchvision_is_a_view_in_python(image):
    views = ViewPair(my_augs.build_8px(), image_size=8)
    query, key = views(Image.fromarray(image))
    assert query.shape == key.shape == (3, 8, 8)
    assert not torch.equal(query, key)
    assert views.describe(0, 0, (20, 24))[0][0].startswith("transforms Compose( RandomResizedCrop(")
