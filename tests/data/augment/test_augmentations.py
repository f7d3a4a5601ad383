"""Each operation and each published pair against torchvision's and Pillow's own.

They get the same numbers, and their random numbers have the same distribution.
"""

import importlib.util
import math
import random

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms.v2 import functional as official

from moco.config.parsing import CONFIG_DIR
from moco.data.augment import batch_kernels
from moco.data.augment.operations import ColorJitter, GaussianBlur, RandomAffine, RandomResizedCrop
from moco.data.augment.views import View, as_arrays, row_of
from moco.errors import InputError
from tests.conftest import REPOSITORY


def load_script(name):
    path = REPOSITORY / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


COMPARE = load_script("compare_augmentations")
SIZE = torch.tensor([[90, 120]])


@pytest.fixture
def image(generator):
    return COMPARE.photograph(generator, 90, 120)


def pair(name):
    text = (CONFIG_DIR / "augmentation" / f"{name}.yaml").read_text()
    config = yaml.safe_load(text)
    if config["key"] == "${.query}":
        config["key"] = config["query"]
    return config


def as_batch(image, num=1):
    """Return copies of an image as (num, 3, height, width) float32 in 0..1."""
    planes = torch.from_numpy(image.transpose(2, 0, 1).copy())
    return planes.expand(num, -1, -1, -1) / 255


def as_grey_levels(images):
    """Return a batch as arrays (batch, height, width, 3) in 0..255."""
    return (images * 255).permute(0, 2, 3, 1).numpy()


# What the papers' code does, typed from it: (operation, probability) in order, the scale of the
# crop, and the numbers of the jitter.
CROP = ("random_resized_crop", 1)
FLIP = ("horizontal_flip", 0.5)
GRAY = ("grayscale", 0.2)
JITTER = ("color_jitter", 0.8)
SOLARIZE = ("solarize", 0.2)
V2 = (0.4, 0.4, 0.4, 0.1)
BYOL = (0.4, 0.4, 0.2, 0.1)
OFFICIAL = {
    "moco_v1 query": ([CROP, GRAY, ("color_jitter", 1), FLIP], (0.2, 1), (0.4, 0.4, 0.4, 0.4)),
    "moco_v2 query": ([CROP, JITTER, GRAY, ("gaussian_blur", 0.5), FLIP], (0.2, 1), V2),
    "byol query": ([CROP, JITTER, GRAY, ("gaussian_blur", 1), FLIP], (0.2, 1), BYOL),
    "byol key": ([CROP, JITTER, GRAY, ("gaussian_blur", 0.1), SOLARIZE, FLIP], (0.2, 1), BYOL),
    "moby query": ([CROP, FLIP, JITTER, GRAY, ("gaussian_blur", 1)], (0.08, 1), BYOL),
    "moby key": ([CROP, FLIP, JITTER, GRAY, ("gaussian_blur", 0.1), SOLARIZE], (0.08, 1), BYOL),
    "cifar query": ([CROP, FLIP, JITTER, GRAY], (0.08, 1), V2),
}


@pytest.mark.parametrize("recipe", OFFICIAL)
def test_view_has_the_official_operations_in_the_official_order(recipe):
    name, side = recipe.split()
    view = View(pair(name)[side], 64, "augmentation")
    steps, scale, jitter = OFFICIAL[recipe]
    assert [(step.name, step.probability) for step in view.steps] == steps
    operations = {step.name: step.operation for step in view.steps}
    ours = operations["color_jitter"]
    assert (ours.brightness, ours.contrast, ours.saturation, ours.hue) == jitter
    assert tuple(operations["random_resized_crop"].scale) == scale
    if "gaussian_blur" in operations:
        assert list(operations["gaussian_blur"].sigma) == [0.1, 2.0]
    if "solarize" in operations:
        assert operations["solarize"].threshold == 128


@pytest.mark.parametrize("recipe", OFFICIAL)
def test_both_engines_make_the_official_view_within_rounding(recipe, image):
    name, side = recipe.split()
    view = View(pair(name)[side], 64, "augmentation")
    drawn = view.draw(0, 0, torch.arange(40), 0, SIZE.expand(40, 2))
    by_batch = as_grey_levels(view.on_batch(as_batch(image, 40), drawn))
    arrays = [as_arrays(numbers) for numbers in drawn]
    different = set()
    for row in range(40):
        numbers = row_of(drawn, row)
        by_worker = view.on_image(image, row_of(arrays, row))
        theirs = COMPARE.official_view(view, Image.fromarray(image), numbers)
        # In solarisation, a value beside the threshold may be inverted by one engine alone.
        is_solarized = False
        for step, of_step in zip(view.steps, numbers, strict=True):
            is_solarized |= step.name == "solarize" and bool(of_step["applied"])
        for ours in (by_worker, by_batch[row]):
            difference = np.abs(ours - np.asarray(theirs).astype(float))  # grey levels of 256
            assert np.median(difference) <= 3
            assert difference.mean() < (6 if is_solarized else 3)
        different.add(by_worker.tobytes())
    assert len(different) == 40


def worker(operation, image, drawn):
    """Return the image after an operation by the worker engine."""
    return operation.on_image(image, row_of([as_arrays(drawn)], 0)[0])


def batch(operation, image, drawn):
    """Return the image after an operation by the batch engine."""
    return as_grey_levels(operation.on_batch(as_batch(image), drawn))[0]


@pytest.mark.parametrize(
    "box", [(0, 0, 90, 120), (10, 30, 71, 53), (5, 2, 20, 30), (40, 50, 1, 1), (3, 0, 64, 64)]
)
def test_crop_equals_pillows_bilinear_resize(box, image):
    theirs = np.asarray(official.resized_crop(Image.fromarray(image), *box, [64, 64])).astype(float)
    drawn = {"box": torch.tensor([box]), "size": SIZE}
    operation = RandomResizedCrop(64, [0.2, 1.0])
    assert np.abs(worker(operation, image, drawn) - theirs).max() <= 1
    assert np.abs(batch(operation, image, drawn) - theirs).max() <= 1


def test_boxes_follow_torchvisions_rule():
    """The same draws through torchvision's loop, in plain Python."""
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    draws = torch.rand(400, 22, dtype=torch.float64)
    sizes = torch.randint(1, 300, (400, 2))
    sizes[:100, 1] = 5 * sizes[:100, 0]  # wide enough that often none of ten candidates fits
    ours = RandomResizedCrop(32, scale, ratio).draw(draws, sizes)["box"].tolist()
    fallbacks = 0
    for (height, width), numbers, box in zip(sizes.tolist(), draws.tolist(), ours, strict=True):
        expected = None
        for attempt in range(10):
            area = height * width * (scale[0] + (scale[1] - scale[0]) * numbers[attempt])
            low, high = math.log(ratio[0]), math.log(ratio[1])
            aspect = math.exp(low + (high - low) * numbers[10 + attempt])
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                expected = [
                    int(numbers[20] * (height - h + 1)),
                    int(numbers[21] * (width - w + 1)),
                    h,
                    w,
                ]
                break
        if expected is None:
            fallbacks += 1
            w, h = width, height
            if width / height < min(ratio):
                h = max(1, round(w / min(ratio)))
            elif width / height > max(ratio):
                w = max(1, round(h * max(ratio)))
            expected = [(height - h) // 2, (width - w) // 2, h, w]
        assert box == expected
    assert fallbacks > 10


@pytest.mark.parametrize(
    ("step", "factor", "tolerance"),
    [
        (0, 0.6, 0),
        (0, 1.4, 0),
        (1, 0.6, 1),
        (1, 1.4, 1),
        (2, 0.6, 2),
        (2, 1.4, 2),
        (3, 0.1, 13),
        (3, -0.1, 13),
        (3, 0.0, 13),
    ],
)
def test_color_steps_equal_pillows_within_rounding(step, factor, tolerance, image):
    strengths = [0, 0, 0, 0]
    strengths[step] = 0.4
    jitter = ColorJitter(*strengths)
    factors = [1.0, 1.0, 1.0, 0.0]
    factors[step] = factor
    order = [step, *(number for number in range(4) if number != step)]
    drawn = {
        "factors": torch.tensor([factors], dtype=torch.float64),
        "order": torch.tensor([order]),
    }
    theirs = np.asarray(COMPARE.COLOR_STEPS[step](Image.fromarray(image), factor)).astype(float)
    difference = np.abs(worker(jitter, image, drawn) - theirs)
    assert difference.max() <= tolerance
    assert difference.mean() <= 1
    # Pillow and torchvision cut off the fraction, and the batch engine keeps it. Pillow's hue has
    # 256 steps a turn.
    difference = np.abs(batch(jitter, image, drawn) - theirs)
    assert difference.max() <= max(tolerance, 1.5)
    assert difference.mean() <= (1.7 if step == 3 else 1)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]])
def test_batch_jitter_equals_torchvisions_tensor_operations_in_any_order(order):
    images = torch.rand(5, 3, 16, 20)
    factors = torch.tensor(
        [
            [1.3, 0.7, 1.4, 0.1],
            [0.6, 1.2, 0.6, -0.1],
            [1.0, 1.0, 1.0, 0.5],
            [0, 2, 3, 0.3],
            [2, 0, 0, 0],
        ]
    )
    mixed = torch.tensor([order, order[::-1], order, order[1:] + order[:1], order])
    ours = batch_kernels.color_jitter(images, factors.double(), mixed, has_hue=True)
    for row in range(5):
        theirs = images[row]
        for number in mixed[row].tolist():
            theirs = COMPARE.COLOR_STEPS[number](theirs, float(factors[row, number]))
        torch.testing.assert_close(
            ours[row], theirs, atol=5e-4, rtol=0
        )  # its luma has 0.2989 for 0.299


def test_batch_hue_of_grey_black_and_white_stays():
    images = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    turned = images.clone()
    batch_kernels.hue_(turned, torch.tensor([0.3, -0.2, 0.5]))
    torch.testing.assert_close(turned, images)


@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.5, 1.0, 2.0])
def test_both_blurs_equal_a_gaussian_summed_up_pixel_by_pixel(sigma, image):
    radius = max(1, math.ceil(3 * sigma))
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-(offsets**2) / (2 * max(sigma, 1e-3) ** 2))
    kernel /= kernel.sum()
    expected = image.astype(float)
    for axis in (0, 1):
        width = [(0, 0)] * 3
        width[axis] = (radius, radius)
        padded = np.pad(expected, width, mode="edge")
        expected = sum(
            weight * np.take(padded, range(place, place + expected.shape[axis]), axis)
            for place, weight in enumerate(kernel)
        )
    operation = GaussianBlur(sigma=[0, 2])
    drawn = {"sigma": torch.tensor([sigma], dtype=torch.float64)}
    assert np.abs(worker(operation, image, drawn) - expected).max() <= 1
    assert np.abs(batch(operation, image, drawn) - expected).max() < 0.01


@pytest.mark.parametrize(
    ("angle", "shift", "shear"),
    [(10, (0, 0), 0), (-25, (5, -8), 0), (0, (3, 4), 12), (7, (-6, 2), -9)],
)
def test_affine_equals_torchvisions(angle, shift, shear):
    images = torch.rand(1, 3, 24, 32)
    bilinear = v1.InterpolationMode.BILINEAR
    theirs = official.affine(
        images, float(angle), list(shift), 1.0, [float(shear), 0.0], interpolation=bilinear
    )
    ours = batch_kernels.affine(
        images,
        torch.tensor([angle], dtype=torch.float64),
        torch.tensor([shift], dtype=torch.float64),
        torch.tensor([shear], dtype=torch.float64),
    )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    turned = RandomAffine(30).on_image(
        (images[0] * 255).byte().permute(1, 2, 0).numpy(),
        {
            "angle": np.float64(angle),
            "shift": np.array(shift, dtype=float),
            "shear": np.float64(shear),
        },
    )
    assert np.abs(turned - (theirs[0] * 255).permute(1, 2, 0).numpy()).mean() < 1


@pytest.mark.parametrize("name", ["horizontal_flip", "grayscale", "solarize"])
def test_operations_without_numbers_equal_torchvisions(name, image):
    view = View({"random_resized_crop": {"scale": [1, 1]}, name: {}}, 8, "x")
    step = view.steps[1]
    theirs = np.asarray(COMPARE.official_step(step, Image.fromarray(image), {})).astype(float)
    assert np.abs(step.operation.on_image(image, {}) - theirs).max() <= 1
    assert np.abs(batch(step.operation, image, {}) - theirs).max() <= 1


MANY = 20_000


@pytest.mark.slow
def test_draws_are_distributed_as_torchvisions():
    """Mean and spread of every number, against as many draws by torchvision's own transforms."""
    torch.manual_seed(1)
    random.seed(1)
    view = View(pair("moco_v2")["query"], 64, "x")
    crop, jitter, gray, blur, flip = view.draw(0, 0, torch.arange(MANY), 0, SIZE.expand(MANY, 2))
    image = torch.zeros(3, *SIZE[0].tolist())
    boxes = []
    for _ in range(MANY):
        boxes.append(v1.RandomResizedCrop.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3)))
    theirs = torch.tensor(boxes)
    expect_same_moments(crop["box"], theirs)
    our_areas = crop["box"][:, 2] * crop["box"][:, 3]
    expect_same_moments(our_areas[:, None], (theirs[:, 2] * theirs[:, 3])[:, None])
    their_factors = []
    their_orders = []
    for _ in range(MANY):
        numbers = v1.ColorJitter.get_params((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1))
        their_orders.append(numbers[0])
        their_factors.append(numbers[1:])
    expect_same_moments(jitter["factors"], torch.tensor(their_factors))
    orders = [frequencies(jitter["order"]), frequencies(torch.stack(their_orders))]
    assert (orders[0] > 0).sum() == 24
    torch.testing.assert_close(*orders, atol=0.008, rtol=0)
    expect_same_moments(blur["sigma"][:, None], torch.empty(MANY, 1).uniform_(0.1, 2.0))
    for step, probability in ((jitter, 0.8), (gray, 0.2), (blur, 0.5), (flip, 0.5)):
        assert abs(step["applied"].double().mean() - probability) < 4 * math.sqrt(0.25 / MANY)
    applied = torch.stack([step["applied"] for step in (jitter, gray, blur, flip)]).double()
    assert (torch.corrcoef(applied) - torch.eye(4)).abs().max() < 0.03


def frequencies(orders):
    """Return how often each order of four steps comes, among 256 numbers for it."""
    numbers = (orders * torch.tensor([64, 16, 4, 1])).sum(1)
    return torch.bincount(numbers, minlength=256) / len(orders)


def expect_same_moments(ours, theirs):
    """Means within four standard errors, standard deviations within 3 %."""
    ours, theirs = ours.double(), theirs.double()
    error = (ours.var(0) / len(ours) + theirs.var(0) / len(theirs)).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 4 * error).all()
    torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0.03, atol=0)


def test_a_changed_step_leaves_the_draws_of_those_before_it():
    settings = pair("moco_v2")["query"]
    changed = settings | {"gaussian_blur": {"sigma": [0.5, 0.6], "probability": 1.0}}
    one = View(settings, 64, "x").draw(3, 1, torch.arange(9), 0, SIZE.expand(9, 2))
    other = View(changed, 64, "x").draw(3, 1, torch.arange(9), 0, SIZE.expand(9, 2))
    for before, after in zip(one[:3], other[:3], strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(one[4]["applied"], other[4]["applied"])


@pytest.mark.parametrize("name", ["moco_v1", "moco_v2", "cifar", "digits"])
def test_symmetric_pairs_have_the_same_operations_in_both_views(name):
    assert pair(name)["query"] == pair(name)["key"]


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
        (
            CROP_ONLY | {"gaussian_blur": {"sigma": [2, 1]}},
            "augmentation.query.gaussian_blur: sigma=",
        ),
        (CROP_ONLY | {"gaussian_blur": {"sigma": 1}}, "augmentation.query.gaussian_blur: "),
        (CROP_ONLY | {"gaussian_blur": {}}, "augmentation.query.gaussian_blur: "),
        (
            CROP_ONLY | {"gaussian_blur": {"sigma": [0.1, float("inf")]}},
            "augmentation.query.gaussian_blur: sigma=",
        ),
        (
            CROP_ONLY | {"color_jitter": {"brightness": float("inf")}},
            "augmentation.query.color_jitter: brightness=",
        ),
        (
            CROP_ONLY | {"color_jitter": {"contrast": "much"}},
            "augmentation.query.color_jitter: contrast=much",
        ),
        (
            CROP_ONLY | {"random_affine": {"degrees": float("nan")}},
            "augmentation.query.random_affine: degrees=",
        ),
        (CROP_ONLY | {"color_jitter": {"hue": 0.7}}, "augmentation.query.color_jitter: hue=0.7"),
        (CROP_ONLY | {"color_jitter": 3}, "augmentation.query.color_jitter: expected settings"),
        (
            CROP_ONLY | {"gaussian_blur": {"sigma": [0.1, 1, 2]}},
            "augmentation.query.gaussian_blur: sigma=",
        ),
        (
            CROP_ONLY | {"solarize": {"threshold": "abc"}},
            "augmentation.query.solarize: threshold=abc",
        ),
        (
            CROP_ONLY | {"grayscale": {"probability": "often"}},
            "augmentation.query.grayscale: probability=often",
        ),
        ({"random_resized_crop": {"scale": 5}}, "augmentation.query.random_resized_crop: scale=5"),
        (
            {"random_resized_crop": {"scale": [0.2, 1], "probability": 0.5}},
            "augmentation.query.random_resized_crop: prob",
        ),
        (
            {"random_resized_crop": {"scale": [0.0, 1.0]}},
            "augmentation.query.random_resized_crop: scale=",
        ),
    ],
)
def test_mistakes_in_a_pair_name_the_key(operations, message):
    with pytest.raises(InputError) as error:
        View(operations, 32, "augmentation.query")
    assert str(error.value).startswith(message)


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
def test_operations_do_what_their_names_say(operation, changed, image):
    plain = {"random_resized_crop": {"scale": [1.0, 1.0], "ratio": [4 / 3, 4 / 3]}}
    results = []
    for operations in (plain, plain | operation):
        view = View(operations, 60, "x")
        drawn = view.draw(0, 0, torch.tensor([0]), 0, SIZE)
        numbers = row_of([as_arrays(of_step) for of_step in drawn], 0)
        results.append(view.on_image(image, numbers))
    assert (not np.array_equal(*results)) == changed
