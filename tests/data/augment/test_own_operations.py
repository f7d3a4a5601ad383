"""The user's own operations: registered, or by a target; one method is derived from the other."""

import dataclasses
import logging
import shlex
import sys

import numpy as np
import pytest
import torch
import yaml

import moco
from moco.cli.build_pretraining import build_data
from moco.data.augment.operations import REGISTERED
from moco.data.augment.trial import try_own_steps
from moco.data.augment.views import ViewPair
from moco.errors import InputError
from tests.conftest import REPOSITORY
from tests.data.augment import my_augs

MODULE = "tests.data.augment.my_augs"
CROP = {"random_resized_crop": {"scale": [0.2, 1.0]}}


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr("moco.data.augment.operations.REGISTERED", REGISTERED.copy())


@pytest.fixture
def image(generator):
    return generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)


def pair(settings, engine="worker", **options):
    query = CROP | {"own": settings}
    return ViewPair(query, mean=[0] * 3, std=[1] * 3, image_size=16, engine=engine, **options)


@pytest.mark.parametrize("engine", ["worker", "batch"])
def test_the_method_that_is_left_out_is_derived(engine, image):
    """By hand: what the crop alone gives, times the factor."""
    indices = torch.arange(6)
    pixels = torch.from_numpy(image).permute(2, 0, 1).expand(6, -1, -1, -1).contiguous()
    for name in ("Fade", "FadeBatch"):
        settings = {"target": f"{MODULE}:{name}", "lowest": 0.2, "probability": 0.5}
        augment = pair(settings, engine)
        views = augment.empty_views(6, 0)
        augment.on_images([image] * 6, 0, indices, views)
        from_loader = augment.finished((views[0], views[1]), 0, indices)
        cropped = ViewPair(CROP, mean=[0] * 3, std=[1] * 3, image_size=16)
        by_hand = cropped.on_batch(pixels, 0, indices)
        drawn = augment.draw(0, indices, torch.tensor([[20, 24]] * 6))
        num_faded = 0
        for place in (0, 1):
            _, of_fade = drawn[place]
            factor = of_fade["factor"].where(of_fade["applied"], 1.0).float()[:, None, None, None]
            num_faded += int(of_fade["applied"].sum())
            expected = by_hand[place] * factor
            in_memory = augment.on_batch(pixels, 0, indices)[place]
            for ours in (from_loader[place], in_memory):
                assert (ours - expected).abs().max() <= 2.1 / 255
        assert 0 < num_faded < 12


def test_a_registered_operation_is_known_by_its_name(image):
    assert moco.register_operation("fade")(my_augs.Fade) is my_augs.Fade
    moco.register_operation("fade", my_augs.Fade)  # a cell of a notebook runs twice
    by_name = ViewPair(CROP | {"fade": {"lowest": 0.1}}, image_size=16)
    by_target = ViewPair(CROP | {"x": {"target": f"{MODULE}:Fade", "lowest": 0.1}}, image_size=16)
    for ours, theirs in zip(by_name(image), by_target(image), strict=True):
        assert torch.equal(ours, theirs)
    assert by_name.describe(0, 0, (20, 24))[0][1].startswith("fade by 0.")


def register(name):
    return lambda: moco.register_operation(name, my_augs.Fade)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            register("grayscale"),
            "register_operation('grayscale'): there is an operation of that name, "
            "moco.data.augment.operations:Grayscale",
        ),
        (
            register("my-noise"),
            "register_operation('my-noise'): expected a name of letters, digits and underscores",
        ),
        (
            register("options"),
            "register_operation('options'): 'transforms' and 'options' stand for a whole pipeline",
        ),
        (
            lambda: moco.register_operation("x", my_augs.Nothing),
            "register_operation('x'): Nothing defines neither on_image nor on_batch",
        ),
        (
            lambda: pair({"target": f"{MODULE}:Fader"}),
            f"augmentation.query.own.target={MODULE}:Fader: {MODULE} has no 'Fader'; "
            "did you mean 'Fade'?",
        ),
        (
            lambda: pair({"target": f"{MODULE}:Fade", "lowst": 1}),
            "augmentation.query.own: unknown setting 'lowst'; did you mean 'lowest'? "
            "(choices: lowest, probability)",
        ),
        (
            lambda: pair({"target": f"{MODULE}:Fade", "lowest": 2}),
            "augmentation.query.own: lowest=2: expected a number from 0 to 1",
        ),
        (
            lambda: pair({"target": f"{MODULE}:Annotated", "lowest": 0.5}),
            "augmentation.query.own.lowest: Annotated lacks @dataclass above the class",
        ),
        (
            lambda: pair({"target": "os:getcwd"}),
            "augmentation.query.own.target=os:getcwd: expected a class derived from "
            "moco.Operation, got <built-in function getcwd>",
        ),
        (
            lambda: ViewPair(CROP | {"grayscale": {"target": f"{MODULE}:Fade"}}),
            f"augmentation.query.grayscale.target={MODULE}:Fade: there is an operation "
            "'grayscale'; rename the step",
        ),
        (
            lambda: ViewPair(None),
            "augmentation.query: missing; expected operations, {name: settings, ...}, or {transf",
        ),
        (lambda: ViewPair(3), "augmentation.query=3: expected operations, {name: settings, ...}"),
        (
            lambda: ViewPair.named("moco_v5"),
            "unknown augmentation 'moco_v5'; did you mean 'moco_v2'?",
        ),
        (
            lambda: ViewPair.named("moco_v2")(np.zeros((3, 8, 8), np.uint8)),
            "expected a PIL image or a uint8 array (height, width, 3), got ndarray of uint8 (3, 8",
        ),
    ],
)
def test_what_is_wrong_is_one_line(build, message):
    with pytest.raises(InputError) as raised:
        build()
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Floats", "on_image returned ndarray of float64 (16, 16, 3); expected ndarray of uint8"),
        ("InPlace", "on_image writes to the image it gets; return a new one"),
        ("TooBright", "on_batch returned values from 1.14 to 1.89; expected 0..1: clamp them"),
        ("OneNumber", "draw returned factor=0.5; expected a tensor with a row for each image"),
        ("Fails", "on_image failed: KeyError: 'sigma'"),
    ],
)
def test_an_operation_is_tried_before_the_run(name, message):
    image = np.arange(3 * 400, dtype=np.uint8).reshape(20, 20, 3)
    image[0] = 255
    image[1] = 0
    crop = {"random_resized_crop": {"scale": [1, 1], "ratio": [1, 1]}}
    own = {"target": f"{MODULE}:{name}", "probability": 0.01}
    with pytest.raises(InputError) as raised:
        try_own_steps(ViewPair(crop | {"own": own}, image_size=16), image, 0)
    assert str(raised.value).startswith(f"augmentation.query.own: {message}")


def test_an_operation_with_other_random_numbers_is_warned_of(image, caplog):
    augment = pair({"target": f"{MODULE}:Irreproducible"})
    with caplog.at_level(logging.WARNING):
        try_own_steps(augment, image, 0)
    assert "augmentation.query.own gives other results for the same draws" in caplog.text


def test_a_run_with_an_operation_for_single_images_uses_loader_processes(runner):
    config = runner.config(f"+augmentation.query.fade={{target: '{MODULE}:Fade', lowest: 0.2}}")
    data = build_data(config)
    assert data.augment.engine == "worker"
    assert not data.in_memory
    assert [step.name for step in data.augment.views_at(0)[1].steps][-1] == "fade"
    for view in (config.augmentation.query, config.augmentation.key):
        view["fade"]["target"] = f"{MODULE}:FadeBatch"
    assert build_data(config).in_memory


def test_one_image_has_the_views_that_it_has_in_a_run(runner):
    data = build_data(runner.config("data.engine=worker"))
    loader = data.train_dataloader()
    loader.sampler.set_epoch(3)
    batch = data.on_after_batch_transfer(next(iter(loader)), 0)
    pair = data.augment
    by_hand = ViewPair(
        pair_settings(runner)["query"], mean=pair.mean, std=pair.std, image_size=pair.image_size
    )
    for row in range(4):
        index = int(batch.indices[row])
        image = data.source.train[index]
        for given in (image, np.asarray(image)):
            views = by_hand(given, epoch=3, index=index)
            for ours, theirs in zip(views, batch.views, strict=True):
                assert torch.equal(ours, theirs[row])


def pair_settings(runner):
    return dataclasses.asdict(runner.config().augmentation)


def test_a_named_pair_is_that_of_the_configs(image):
    from tests.data.augment.test_views import view_pair

    for ours, theirs in zip(
        ViewPair.named("byol", image_size=32)(image, 1, 2),
        view_pair("byol", image_size=32)(image, 1, 2),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_the_documented_operations_config_and_commands_work(runner, tmp_path, monkeypatch):
    text = (REPOSITORY / "docs" / "augmentation.md").read_text()

    def blocks(language):
        return [block.split("```")[0] for block in text.split(f"```{language}\n")[1:]]

    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    own, in_python = blocks("python")[:-2], "\n".join(blocks("python")[-2:])
    (package / "augs.py").write_text("\n".join(own))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    (config,) = blocks("yaml")
    settings = yaml.safe_load(config)
    settings["key"] = settings["query"]
    operations = [step.name for step in ViewPair(**settings, image_size=16).views_at(0)[0].steps]
    assert operations == ["random_resized_crop", "my_noise", "my_tint", "horizontal_flip"]

    used = set()
    for block in blocks("sh"):
        words = shlex.split(block.replace("\\\n", " "))
        overrides = [word for word in words if word.lstrip("+").startswith("augmentation")]
        data = build_data(runner.config(*overrides))
        used |= {step.name for view in data.augment.views_at(0) for step in view.own_steps}
    assert used == {"my_noise", "transforms"}
    names = {}
    exec(in_python, names)
    assert names["query"].shape == (3, 64, 64)
    batch = names["batch"]
    assert batch.placements.shape == (2, 2, 2, 3)
    assert [crops.shape for crops in batch.local_crops] == [(2, 3, 24, 24)] * 2
    for name in ("my_package", "my_package.augs"):
        sys.modules.pop(name, None)
