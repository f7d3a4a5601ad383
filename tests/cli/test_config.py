"""Every file under conf/ composes and parses; every mistake is one line that names the key and the way out."""

import dataclasses
import itertools

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, ValidationError

from moco.config.parsing import (
    CONFIG_DIR,
    SCHEMAS,
    check_limits,
    keys,
    parse,
    register_schemas,
    unknown_key,
    wrong_value,
)
from moco.config.predict import PredictConfig
from moco.config.segment import SegmentConfig
from moco.config.train import TrainConfig
from moco.errors import InputError
from tests.configs import composed
from tests.conftest import run_program, thinned

EXPERIMENTS = sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml"))
OPTIONS = sorted(
    (str(path.parent.relative_to(CONFIG_DIR)), path.stem)
    for path in CONFIG_DIR.rglob("*.yaml")
    if path.parent != CONFIG_DIR and path.parent.name not in ("experiment", "launcher")
)


def together(groups):
    """Lists of options, such as ``backbone=swin_t``, which hold every option of the groups.

    To compose takes a third of a second, whatever the number of options. So the first options of
    all groups are composed together, then the second ones, and so on.
    """
    columns = [
        [f"{group}={option}" for of_group, option in OPTIONS if of_group == group]
        for group in groups
    ]
    rows = itertools.zip_longest(*columns)
    return [[option for option in row if option is not None] for row in rows]


@pytest.mark.parametrize(
    ("program", "overrides"),
    [
        ("train", ["+experiment=quickstart", "optimizer=adamw", "trainer.max_steps=3", "seed=4"]),
        (
            "segment",
            ["data.root=/x y", "checkpoint=null", "backbone=resnet18", "class_weights=[1,2]"],
        ),
    ],
)
def test_the_configs_of_the_tests_are_hydras(program, overrides):
    register_schemas()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        expected = parse(compose(program, overrides), SCHEMAS[program])
    for _ in range(2):
        assert composed(program, *overrides) == expected


PRETRAINING = ("augmentation", "backbone", "data", "method", "optimizer", "trainer")


@pytest.mark.parametrize("options", thinned(together(PRETRAINING), every=8), ids=" ".join)
def test_every_option_of_pretraining_composes_and_parses(options):
    from moco.data.augment.views import ViewPair

    masked = [f"data={name}" for name in ("segmentation_folder", "voc2012")]
    options = [option for option in options if option not in masked]
    pair = composed("train", *options, "evaluation=knn", "data.root=y").augmentation
    if "augmentation=custom" not in options:
        ViewPair(pair.query, pair.key, pair.mean, pair.std, 32, seed=0)


@pytest.mark.parametrize(
    "options", thinned(together(("data", "evaluation")), every=3), ids=" ".join
)
def test_every_option_of_an_evaluation_composes_and_parses(options):
    composed("evaluate", "checkpoint=x", *options, "data.root=y")


@pytest.mark.parametrize(
    "options", thinned(together(("decoder", "trainer")), every=2), ids=" ".join
)
def test_every_option_of_segmentation_composes_and_parses(options):
    data = "data=voc2012" if "decoder=fpn" in options else "data=segmentation_folder"
    composed("segment", "checkpoint=null", *options, data, "data.root=y")


def test_no_group_of_options_is_forgotten():
    swept = {*PRETRAINING, "evaluation", "decoder"}
    assert {group for group, _ in OPTIONS} == swept


def test_the_sweep_leaves_no_file_out():
    others = [
        *CONFIG_DIR.glob("*.yaml"),
        *(CONFIG_DIR / "hydra" / "launcher").glob("*.yaml"),
    ]  # of Hydra: test_slurm.py
    assert len(OPTIONS) + len(EXPERIMENTS) + len(others) == len(list(CONFIG_DIR.rglob("*.yaml")))


def test_densecl_is_moco_v2_with_a_dense_term():
    densecl, v2 = (
        composed("train", f"method={name}", "data.root=x").method for name in ("densecl", "moco_v2")
    )
    assert (densecl.dense_weight, densecl.dense_grid, v2.dense_weight) == (0.5, 7, 0)
    assert dataclasses.replace(densecl, dense_weight=0) == v2


@pytest.mark.parametrize(
    "method",
    thinned(sorted(path.stem for path in (CONFIG_DIR / "method").glob("*.yaml")), every=3),
)
def test_every_method_takes_the_dense_term(method):
    import torch

    from moco.cli.build_pretraining import build_method

    queue = ["method.negatives=queue", "method.queue_size=64"] if method == "moco_v3" else []
    config = composed(
        "train",
        f"method={method}",
        "method.dense_weight=0.5",
        "backbone=resnet18",
        "data.root=x",
        *queue,
    )
    with torch.device("meta"):
        built = build_method(dataclasses.asdict(config))
    queues = ["queue", "reverse_queue"][: config.method.num_queues]
    assert [name for name, _ in built.named_children() if name.endswith("queue")] == [
        *queues, *(f"{name.removesuffix('queue')}dense_queue" for name in queues)
    ]  # fmt: skip


def test_a_scaled_learning_rate_is_said_in_one_line(caplog):
    from moco.cli.build_pretraining import build_method

    caplog.set_level("INFO")
    small = ["backbone=resnet_tiny", "method=moby", "method.queue_size=8", "data.root=x"]
    method = build_method(
        dataclasses.asdict(composed("train", *small, "optimizer=adamw", "data.batch_size=128"))
    )
    assert caplog.messages == [
        "learning rate 0.001 for batch 512, 0.00025 at this run's 128; warm-up from 1.25e-07, end at 1.25e-06"
    ]
    assert method.hparams["optimizer"]["lr"] == 2.5e-4
    caplog.clear()
    method = build_method(
        dataclasses.asdict(composed("train", *small, "optimizer.lr_for_batch_size=null"))
    )
    assert not caplog.messages
    assert method.hparams["optimizer"]["lr"] == 0.03


def test_sgds_learning_rate_is_for_batch_256_as_the_official_readme_gives_it():
    from moco.training.schedules import scaled_to_batch

    optimizer = dataclasses.asdict(composed("train", "data.root=x").optimizer)
    assert scaled_to_batch(optimizer, 128)["lr"] == 0.015


def test_a_key_overridden_in_the_query_view_reaches_a_key_view_that_refers_to_it():
    config = composed(
        "train", "augmentation=moco_v2", "augmentation.query.color_jitter.hue=0.3", "data.root=x"
    )
    assert config.augmentation.key["color_jitter"]["hue"] == 0.3


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("method.temperature", 0.0, "method.temperature=0.0: expected a number above 0"),
        (
            "method.key_momentum",
            1.5,
            "method.key_momentum=1.5: expected a number at least 0 and at most 1",
        ),
        ("data.batch_size", 0, "data.batch_size=0: expected a number at least 1"),
        (
            "method.batch_norm",
            "splt",
            "method.batch_norm: unknown value 'splt'; did you mean 'split'?",
        ),
        ("optimizer.lr", float("nan"), "optimizer.lr=nan: expected a finite number"),
        ("optimizer.beta1", 1.0, "optimizer.beta1=1.0: expected a number at least 0 and below 1"),
    ],
)
def test_values_out_of_range_are_named(key, value, expected):
    config = composed("train", "+experiment=quickstart")
    group, name = key.split(".")
    setattr(getattr(config, group), name, value)
    with pytest.raises(InputError) as error:
        check_limits(config)
    assert str(error.value).startswith(expected)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("label_fraction=5%", "expected a number above 0 and at most 1; did you mean 0.05?"),
        ("label_fraction=1/20", "expected a number above 0 and at most 1; did you mean 0.05?"),
        ("label_fraction=500%", "expected a number above 0 and at most 1"),
        ("label_fraction=1/0", "expected a number above 0 and at most 1"),
        ("label_fraction=few", "expected a number above 0 and at most 1"),
        ("image_size=224px", "expected a whole number at least 4; did you mean 224?"),
        ("image_size=2px", "expected a whole number at least 4"),
        ("image_size=224.5", "expected a whole number at least 4"),
        ("num_images=20%", "expected a whole number at least 1"),
        ("optimizer.lr=1e-3x", "expected a number above 0; did you mean 0.001?"),
        ("augmentation.scale[1]=2x", "expected a number; did you mean 2?"),
    ],
)
def test_a_value_that_is_no_number_is_told_with_the_nearest_one(override, expected):
    key, _, value = override.partition("=")
    kind = "Integer" if key in ("image_size", "num_images") else "Float"
    reason = f"Value '{value}' of type 'str' could not be converted to {kind}"
    assert wrong_value(key, reason, SegmentConfig) == f"{key}={value}: {expected}"
    # These are OmegaConf's words.
    typed = OmegaConf.structured(SegmentConfig)
    with pytest.raises(ValidationError) as error:
        OmegaConf.update(typed, key, value)
    assert str(error.value).splitlines()[0] == reason


def test_other_reasons_and_keys_are_left_as_they_are():
    reason = "Value 'maybe' is not a valid bool (type str)"
    assert wrong_value("tta", reason, PredictConfig) == f"tta: {reason}"
    reason = "Value 'x' of type 'str' could not be converted to Integer"
    assert wrong_value("hydra.verbose", reason, PredictConfig) == f"hydra.verbose: {reason}"


def test_keys_are_listed_with_their_groups():
    assert {"seed", "method", "method.temperature", "data.root"} <= set(keys(TrainConfig))


# Through the real command line: exit code 2, one line on stderr, word for word (its beginning), and no run folder.
MISTAKES = [
    (["method.temprature=0.1"], "error: unknown key 'method.temprature'; did you mean 'method.temperature'? (keys here: method.projector,"),
    (["+method.typo=1"], "error: unknown key 'method.typo' (keys here: method.projector,"),
    (["+temperature=0.1"], "error: unknown key 'temperature'; did you mean 'method.temperature'? (keys here: backbone,"),
    (["bacbone=resnet18"], "error: unknown key 'bacbone'; did you mean 'backbone'? (keys here: backbone, method,"),
    (["backbone=resnet19"], "error: backbone=resnet19: unknown backbone 'resnet19'; did you mean 'resnet18'? (choices: custom, resnet101,"),
    (["+experiment=quikstart"], "error: experiment=quikstart: unknown experiment 'quikstart'; did you mean 'quickstart'? (choices:"),
    (["data.batch_size=many"], "error: data.batch_size=many: expected a whole number at least 1\n"),
    (["method.temperature=-1"], "error: method.temperature=-1.0: expected a number above 0"),
    (["method.queue_start=emty"], "error: method.queue_start: unknown value 'emty'; did you mean 'empty'? (choices: empty, random)"),
    (["method.projector.num_layer=2"], "error: unknown key 'method.projector.num_layer'; did you mean 'method.projector.num_layers'?"),
    (["data=images"], "error: data.root: missing; data=images needs data.root=PATH"),
    (["data=images", "data.root=nowhere"], "error: data.root=nowhere: no such folder"),
    (["data=images", "data.root=."], "error: data.root=.: no images in there (left out 4 files: .yaml 4)"),
    (["method.temperature"], "error: cannot read the override 'method.temperature': expected key=value"),
    (["trainer.accelerator=gppu"], "error: trainer.accelerator: unknown value 'gppu'; did you mean 'gpu'?"),
    (["method=null"], "error: Config group override must be a string or a list."),
    (["resume=nowhere.ckpt", "+experiment=quickstart"], "error: resume=nowhere.ckpt: no such file"),
    (["--config-dir=own", "+experiment=bad_key"], "error: in experiment/bad_key.yaml: unknown key 'method.temprature'; did you mean"),
    (["--config-dir=own", "+experiment=bad_type"], "error: in experiment/bad_type.yaml: data.batch_size=many: expected a whole number at least 1\n"),
    (["--config-dir=own", "+experiment=bad_yaml"], "error: while parsing a flow mapping"),
    (["--config-dir=own", "+experiment=bad_choice"], "error: backbone=resnet19: unknown backbone 'resnet19'; did you mean"),
]  # fmt: skip


@pytest.fixture(scope="module")
def own_configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    experiments = folder / "own" / "experiment"
    experiments.mkdir(parents=True)
    for name, text in {
        "bad_key": "method: {temprature: 0.1}",
        "bad_type": "data: {batch_size: many}",
        "bad_yaml": "method: {temperature: 0.1",
        "bad_choice": "defaults: [override /backbone: resnet19]",
    }.items():
        (experiments / f"{name}.yaml").write_text(f"# @package _global_\n{text}\n")
    return folder


@pytest.mark.parametrize(
    ("arguments", "expected"), thinned(MISTAKES, every=3), ids=lambda value: " ".join(value)[:40]
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, expected, own_configs):
    needs_data = not any(word.startswith(("data=", "+experiment")) for word in arguments)
    if needs_data:
        arguments = ["data=digits", *arguments]
    done = run_program("moco.train", *arguments, "hydra.run.dir=run", cwd=own_configs)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(expected)
    assert not (own_configs / "run").exists()


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (
            "augmentation.query.my_noise",
            "a new one needs a plus: +augmentation.query.my_noise=VALUE",
        ),
        (
            "augmentation.query.blur.sigma",
            "a new one needs a plus: +augmentation.query.blur.sigma=",
        ),
        ("backbone.optoins.width", "(keys here: )"),
        ("data.batch_size.x", "(keys here: )"),
    ],
)
def test_a_new_key_needs_a_plus_where_the_names_are_the_users(key, expected):
    assert expected in unknown_key(key, TrainConfig)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    thinned(
        [
            (
                ["+augmentation.query.blur.sigma=1"],
                "augmentation.query: unknown operation 'blur'; did you mean 'gaussian_blur'?",
            ),
            (
                ["augmentation=custom"],
                "augmentation.query: missing; expected operations, {name: settings, ...}, or",
            ),
            (
                ["+augmentation.query.transforms=os:getcwd"],
                "augmentation.query.transforms: a whole pipeline has no operations beside it, and",
            ),
            (
                ["data.batch_size=2000"],
                "data.batch_size=2000: there are only 1437 images to train on",
            ),
            (
                ["data.batch_size=100"],
                "data.batch_size=100: a device gets 100 images at once, which is no multiple of",
            ),
            (
                ["trainer.max_steps=0"],
                "trainer.max_steps=0: expected -1 for no limit, or at least 1",
            ),
            (["trainer.accelerator=gpu"], "accelerator=gpu: no CUDA device can be used here"),
            (["augmentation.std=[0,0,0]"], "augmentation.std="),
            (
                ["method.num_queues=2"],
                "method.num_queues=2: the second queue is for the second direction; add method.symmetric",
            ),
            (
                ["trainer.num_nodes=2"],
                "trainer.num_nodes=2: start one process per device with srun or torchrun",
            ),
            (["trainer.accumulate_grad_batches=3"], "data.batch_size=64: expected a multiple of 3"),
        ],
        every=2,
    ),
)
def test_what_only_the_data_show_is_found_before_the_run_folder_is_touched(
    overrides, expected, tmp_path, monkeypatch
):
    import torch

    from moco.train import run

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError) as error:
        run(composed("train", "+experiment=quickstart", *overrides), tmp_path)
    assert str(error.value).startswith(expected)
    assert not list(tmp_path.iterdir())


def test_full_error_shows_the_traceback(own_configs):
    done = run_program("moco.train", "backbone=resnet19", cwd=own_configs, HYDRA_FULL_ERROR="1")
    assert done.returncode != 0
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    "program",
    [
        "moco.train",
        pytest.param("moco.evaluate", marks=pytest.mark.slow),
        pytest.param("moco.segment", marks=pytest.mark.slow),
    ],
)
def test_help_and_cfg_work(program, own_configs):
    overrides = ["+experiment=quickstart"] if program == "moco.train" else ["checkpoint=x"]
    shown = run_program(program, *overrides, "--cfg", "job", "--resolve", cwd=own_configs)
    assert shown.returncode == 0, shown.stderr
    config = yaml.safe_load(shown.stdout)
    assert (
        (config["data"]["batch_size"] == 64)
        if program == "moco.train"
        else (config["checkpoint"] == "x")
    )
    helped = run_program(program, "--help", cwd=own_configs)
    assert helped.returncode == 0
    assert helped.stdout.startswith(f"{program}: ")
