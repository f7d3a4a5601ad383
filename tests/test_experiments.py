"""Every experiment builds, says what it costs and should reach, and has the numbers that were published."""

import dataclasses
import re
from functools import cache
from typing import NamedTuple

import pytest
import yaml

from moco.cli.checks import warn_of_negatives
from moco.config.parsing import CONFIG_DIR
from tests.configs import composed
from tests.conftest import REPOSITORY, thinned

EXPERIMENTS = sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml"))
OF_THIS_PROJECT = {
    "cifar10_cpu", "cifar10_moby_swin_v2", "cifar10_speedrun", "cifar10_speedrun_90", "eurosat_cpu", "own_images_large", "own_images_medium",
    "own_images_small", "quickstart",
}  # fmt: skip


@cache
def experiment(name):
    return composed("train", f"+experiment={name}", "data.root=somewhere")


def header(name):
    return (CONFIG_DIR / "experiment" / f"{name}.yaml").read_text().split("defaults:")[0]


class Recipe(NamedTuple):
    """What a paper's table of settings says."""

    backbone: str
    optimizer: str
    lr: float
    lr_for_batch_size: int
    weight_decay: float
    batch_size: int
    epochs: int
    warmup_epochs: int
    schedule: str
    temperature: float
    queues: str
    embedding_dim: int
    key_momentum: str
    smallest_crop: float


# Typed from the papers and the official code, not from conf/.
V1_SGD = ("sgd", 0.03, 256, 1e-4, 256)
NOTEBOOK_SGD = ("sgd", 0.06, 512, 5e-4, 512)
SOLO_LARS = ("lars", 0.3, 256, 1e-6, 256)
PUBLISHED = {
    "imagenet_moco_v1_resnet50": Recipe(
        "resnet50", *V1_SGD, 200, 0, "step by epoch", 0.07, "65536", 128, "0.999", 0.2
    ),
    "imagenet_moco_v2_resnet50": Recipe(
        "resnet50", *V1_SGD, 200, 0, "cosine by epoch", 0.2, "65536", 128, "0.999", 0.2
    ),
    "imagenet_moco_v2_resnet50_800ep": Recipe(
        "resnet50", *V1_SGD, 800, 0, "cosine by epoch", 0.2, "65536", 128, "0.999", 0.2
    ),
    "imagenet_moco_v2_plus_resnet50": Recipe(
        "resnet50", "sgd", 0.3, 256, 3e-5, 128, 100, 10, "cosine by step", 0.2, "65536", 256, "0.99 to 0.999", 0.08
    ),
    "imagenet_moco_v3_resnet50": Recipe(
        "resnet50", "lars", 0.6, 256, 1e-6, 4096, 100, 10, "cosine by step", 1.0, "batch", 256, "0.99 to 1", 0.2
    ),
    "imagenet_moco_v3_resnet50_300ep": Recipe(
        "resnet50", "lars", 0.3, 256, 1e-6, 4096, 300, 10, "cosine by step", 1.0, "batch", 256, "0.99 to 1", 0.2
    ),
    "imagenet_moco_v3_resnet50_1000ep": Recipe(
        "resnet50", "lars", 0.3, 256, 1.5e-6, 4096, 1000, 10, "cosine by step", 1.0, "batch", 256, "0.996 to 1", 0.2
    ),
    "imagenet_moco_v3_vit_s": Recipe(
        "vit_small", "adamw", 1.5e-4, 256, 0.1, 4096, 300, 40, "cosine by step", 0.2, "batch", 256, "0.99 to 1", 0.08
    ),
    "imagenet_moco_v3_vit_b": Recipe(
        "vit_b_16", "adamw", 1.5e-4, 256, 0.1, 4096, 300, 40, "cosine by step", 0.2, "batch", 256, "0.99 to 1", 0.08
    ),
    "imagenet_moby_swin_t": Recipe(
        "swin_t", "adamw", 1e-3, 512, 0.05, 512, 300, 5, "cosine by step", 0.2, "2 x 4096", 256, "0.99 to 1", 0.08
    ),
    "imagenet_moby_swin_v2_t": Recipe(
        "swin_v2_t", "adamw", 1e-3, 512, 0.05, 512, 300, 5, "cosine by step", 0.2, "2 x 4096", 256, "0.99 to 1", 0.08
    ),
    "imagenet_densecl_resnet50": Recipe(
        "resnet50", *V1_SGD, 200, 0, "cosine by epoch", 0.2, "65536", 128, "0.999", 0.2
    ),
    "imagenet100_moco_v2_resnet18": Recipe(
        "resnet18", *V1_SGD, 200, 0, "cosine by epoch", 0.07, "65536", 128, "0.999", 0.08
    ),
    "imagenet100_moco_v2_plus_resnet18": Recipe(
        "resnet18", "sgd", 0.3, 256, 1e-4, 256, 400, 10, "cosine by step", 0.2, "65536", 256, "0.99 to 0.999", 0.08
    ),
    "imagenet100_moco_v3_resnet18": Recipe(
        "resnet18", *SOLO_LARS, 400, 10, "cosine by step", 0.2, "batch", 256, "0.99 to 1", 0.08
    ),
    "imagenet100_moco_v3_resnet50": Recipe(
        "resnet50", *SOLO_LARS, 400, 10, "cosine by step", 0.2, "batch", 256, "0.99 to 1", 0.08
    ),
    "cifar10_resnet18": Recipe(
        "resnet18", *NOTEBOOK_SGD, 200, 0, "cosine by epoch", 0.1, "4096", 128, "0.99", 0.08
    ),
    "cifar10_resnet18_symmetric": Recipe(
        "resnet18", *NOTEBOOK_SGD, 200, 0, "cosine by epoch", 0.1, "4096", 128, "0.99", 0.08
    ),
    "cifar10_moco_v1": Recipe(
        "resnet18", *NOTEBOOK_SGD, 200, 0, "cosine by epoch", 0.1, "4096", 128, "0.99", 0.08
    ),
    "cifar10_moco_v2": Recipe(
        "resnet18", *NOTEBOOK_SGD, 200, 0, "cosine by epoch", 0.1, "4096", 128, "0.99", 0.08
    ),
    "cifar10_moco_v2_symmetric": Recipe(
        "resnet18", "sgd", 0.06, 128, 5e-4, 512, 200, 0, "cosine by epoch", 0.1, "8192", 128, "0.99", 0.08
    ),
    "cifar10_moco_v2_plus": Recipe(
        "resnet18", "sgd", 0.3, 256, 1e-4, 256, 1000, 10, "cosine by step", 0.2, "32768", 256, "0.99 to 0.999", 0.08
    ),
    "cifar10_moco_v3": Recipe(
        "resnet18", *SOLO_LARS, 1000, 10, "cosine by step", 0.2, "batch", 256, "0.99 to 1", 0.08
    ),
    "cifar10_moby": Recipe(
        "resnet18", *NOTEBOOK_SGD, 200, 0, "cosine by epoch", 0.2, "2 x 4096", 256, "0.99 to 1", 0.08
    ),
    "cifar10_densecl": Recipe(
        "resnet18", *NOTEBOOK_SGD, 200, 0, "cosine by epoch", 0.1, "4096", 128, "0.99", 0.08
    ),
    "cifar100_moco_v2_plus": Recipe(
        "resnet18", "sgd", 0.3, 256, 1e-4, 256, 1000, 10, "cosine by step", 0.2, "32768", 256, "0.99 to 0.999", 0.08
    ),
    "cifar100_moco_v3": Recipe(
        "resnet18", *SOLO_LARS, 1000, 10, "cosine by step", 0.2, "batch", 256, "0.99 to 1", 0.08
    ),
}  # fmt: skip


def recipe_of(config):
    method, optimizer = config.method, config.optimizer
    queues = "batch" if method.negatives == "batch" else str(method.queue_size)
    crops = {
        view["random_resized_crop"]["scale"][0]
        for view in (config.augmentation.query, config.augmentation.key)
    }
    (smallest_crop,) = crops
    rises = method.key_momentum_schedule == "cosine"
    return Recipe(
        config.backbone.name,
        optimizer.name,
        optimizer.lr,
        optimizer.lr_for_batch_size,
        optimizer.weight_decay,
        config.data.batch_size,
        config.trainer.max_epochs,
        optimizer.warmup_epochs,
        f"{optimizer.schedule} by {optimizer.schedule_interval}",
        method.temperature,
        f"2 x {queues}" if method.num_queues == 2 else queues,
        method.embedding_dim,
        f"{method.key_momentum:g} to {method.key_momentum_end:g}"
        if rises
        else f"{method.key_momentum:g}",
        smallest_crop,
    )


def test_every_experiment_is_published_or_said_to_be_ours():
    assert set(EXPERIMENTS) == set(PUBLISHED) | OF_THIS_PROJECT


@pytest.mark.parametrize("name", thinned(PUBLISHED, every=5))
def test_numbers_are_the_published_ones(name):
    assert recipe_of(experiment(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", thinned(EXPERIMENTS, every=5))
def test_every_experiment_is_plain_data_and_builds(name):
    import torch

    from moco.cli.build_pretraining import build_method

    config = experiment(name)
    plain = dataclasses.asdict(config)
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain
    with torch.device("meta"):
        method = build_method(plain)
    size = config.method.queue_size
    assert (
        (method.queue is None)
        if size is None
        else method.queue.keys.shape == (size, config.method.embedding_dim)
    )


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_says_its_command_cost_expectation_and_source(name):
    fields = re.findall(r"^#   (\w+) +\S", header(name), flags=re.MULTILINE)
    assert fields == ["command", "cost", "expected", "source"]
    assert re.search(rf"\+experiment={name}\b(?!_)", header(name))


def test_the_documentation_lists_every_experiment():
    listed = re.findall(
        r"^\| `(\w+)`", (REPOSITORY / "docs" / "recipes.md").read_text(), flags=re.MULTILINE
    )
    assert sorted(listed) == EXPERIMENTS


def test_the_official_cifar_notebook_beyond_its_table():
    config = experiment("cifar10_resnet18")
    method, optimizer, knn = config.method, config.optimizer, config.evaluation
    assert (method.projector.num_layers, method.predictor.num_layers, method.num_queues) == (
        1,
        0,
        1,
    )
    assert (method.batch_norm, method.batch_norm_splits, method.symmetric) == ("split", 8, False)
    assert (optimizer.sgd_momentum, optimizer.schedule_offset_epochs, optimizer.decay_all) == (
        0.9,
        1,
        True,
    )
    assert (config.data.image_size, config.backbone.stem) == (32, "cifar")
    assert (knn.num_neighbors, knn.temperature, knn.feature) == (200, 0.1, "embedding")
    assert list(config.augmentation.query) == [
        "random_resized_crop",
        "horizontal_flip",
        "color_jitter",
        "grayscale",
    ]
    symmetric = experiment("cifar10_resnet18_symmetric")
    assert (symmetric.method.symmetric, symmetric.method.symmetric_reduction) == (True, "sum")
    assert symmetric.optimizer == optimizer


@pytest.mark.parametrize("name", ["imagenet_moby_swin_t", "imagenet_moby_swin_v2_t"])
def test_moby_beyond_its_table(name):
    config = experiment(name)
    method, optimizer = config.method, config.optimizer
    for head in (method.projector, method.predictor):
        assert (head.num_layers, head.hidden_dim) == (2, 4096)
        assert (head.hidden_batch_norm, head.last_batch_norm) == (True, False)
    assert (method.symmetric, method.symmetric_reduction, method.batch_norm) == (
        True,
        "sum",
        "sync",
    )
    assert (optimizer.warmup_start_lr, optimizer.final_lr, optimizer.decay_all) == (
        5e-7,
        5e-6,
        False,
    )
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps) == (0.9, 0.999, 1e-8)
    assert (config.data.image_size, config.trainer.gradient_clip_val) == (224, 5.0)
    assert (config.backbone.window_size, config.backbone.stochastic_depth) == (7, 0.2)


@pytest.mark.parametrize(
    "name", thinned([name for name in PUBLISHED if "moco_v3" in name], every=4)
)
def test_moco_v3_beyond_its_table(name):
    config = experiment(name)
    method, optimizer, is_vit = config.method, config.optimizer, "vit" in name
    assert (method.projector.num_layers, method.predictor.num_layers) == (3 if is_vit else 2, 2)
    assert (method.projector.last_batch_norm, method.predictor.last_batch_norm) == (True, is_vit)
    assert method.projector.hidden_dim == method.predictor.hidden_dim == 4096
    assert (method.symmetric, method.loss_times_2t, method.batch_norm) == (True, True, "sync")
    assert optimizer.decay_all is is_vit
    assert (optimizer.sgd_momentum, optimizer.beta1, optimizer.beta2, optimizer.final_lr) == (
        0.9,
        0.9,
        0.999,
        0,
    )
    is_official = name.startswith("imagenet_")
    assert (config.backbone.zero_init_residual is True) == (is_official and not is_vit)
    assert (config.backbone.freeze_patch_embed is True) == is_vit
    if not is_vit:
        assert (optimizer.trust_coefficient, optimizer.trust_clip) == (
            (1e-3, False) if is_official else (0.02, True)
        )


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "moco_v2_plus" in name])
def test_moco_v2_plus_beyond_its_table(name):
    config = experiment(name)
    method, optimizer, blur = (
        config.method,
        config.optimizer,
        config.augmentation.key["gaussian_blur"],
    )
    assert (method.projector.num_layers, method.projector.hidden_dim) == (2, 2048)
    assert (method.symmetric, method.symmetric_reduction) == (True, "mean")
    assert (optimizer.warmup_start_lr, optimizer.decay_all) == (3e-5, True)
    assert (blur["sigma"], blur["probability"]) == ([0.1, 2.0], 0.5)


def test_the_six_variants_on_cifar_differ_in_the_method():
    names = [
        "cifar10_moco_v1",
        "cifar10_moco_v2",
        "cifar10_moco_v2_plus",
        "cifar10_moco_v3",
        "cifar10_moby",
    ]
    configs = [experiment(name) for name in (*names, "cifar10_densecl")]
    assert {
        (config.backbone.name, config.backbone.stem, config.data.name) for config in configs
    } == {("resnet18", "cifar", "cifar10")}
    assert len({yaml.safe_dump(dataclasses.asdict(config.method)) for config in configs}) == 6
    assert [config.method.dense_weight for config in configs] == [0, 0, 0, 0, 0, 0.5]


@pytest.mark.parametrize(
    ("name", "fewest", "most"),
    [
        ("own_images_small", 5_120, 10_000),
        ("own_images_medium", 40_960, 200_000),
        ("own_images_large", 200_000, 10**8),
    ],
)
def test_the_presets_for_own_images_fit_data_sets_of_their_size(name, fewest, most, caplog):
    config = experiment(name)
    assert (config.data.name, config.evaluation.feature) == ("images", "backbone")
    warn_of_negatives(config, fewest)
    warn_of_negatives(config, most)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("num_images", "max_steps", "said"),
    [
        (32, -1, "with only 32 images, older keys of a query's own image are often"),
        (50_000, 0, "so short that it produces only 0 keys"),
    ],
)
def test_no_queue_of_one_key_is_advised(num_images, max_steps, said, caplog):
    config = experiment("cifar10_resnet18")
    # A run of one step has 512 keys. None is a run of one batch.
    changes = {"max_steps": max_steps, "max_epochs": 0 if max_steps == 0 else 200}
    warn_of_negatives(
        dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, **changes)),
        num_images,
    )
    (message,) = caplog.messages
    assert message.startswith("method.queue_size=4096: ")
    assert said in message
    assert "would fit" not in message


@pytest.mark.parametrize(
    ("name", "num_images", "changes", "said"),
    [
        ("cifar10_resnet18", 50_000, {}, None),
        ("imagenet_moco_v2_resnet50", 1_281_167, {}, None),
        ("cifar10_resnet18", 20_000, {}, (4096, 1024)),
        ("own_images_small", 4_000, {}, (512, 256)),
        ("cifar10_moco_v3", 512, {}, None),  # no queue
        ("quickstart", 1_437, {}, None),
        ("cifar10_resnet18", 50_000, {"max_steps": 8}, None),  # 8 x 512 keys
        ("cifar10_resnet18", 50_000, {"max_steps": 7}, (4096, 2048)),
        ("cifar10_resnet18_symmetric", 50_000, {"max_steps": 4}, None),  # 2 x 512 keys a step
        ("cifar10_moby", 50_000, {"max_steps": 4}, (4096, 2048)),  # 512 to each of the two queues
        ("cifar10_resnet18", 1_000, {"max_epochs": 2}, (4096, 64)),
        ("cifar10_resnet18", 600, {"max_epochs": 1000}, (4096, 32)),
    ],
)
def test_a_queue_too_long_for_the_data_or_the_run_is_said_in_one_line(
    name, num_images, changes, said, caplog
):
    config = experiment(name)
    warn_of_negatives(
        dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, **changes)),
        num_images,
    )
    if said is None:
        assert not caplog.messages
        return
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    given, fitting = said
    assert record.message.startswith(
        f"method.queue_size={given} is more than a tenth of the {num_images} images"
    )
    assert record.message.endswith(f" keys that this run produces; {fitting} would fit")
