"""Command lines that a generator gets wrong on purpose: each ends with exit 2 and one line, before anything is trained.

Run as a program with a file of command lines, this file tries them all in one process and writes what came of them.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import subprocess
import sys
import time
import traceback
import typing

import numpy as np
import pytest

from moco.config.pack import PackConfig
from moco.config.parsing import CONFIG_DIR, keys
from moco.config.predict import PredictConfig
from moco.config.pretrained import EmbedConfig, EvaluateConfig, ExportConfig
from moco.config.segment import SegmentConfig
from moco.config.stats import StatsConfig
from moco.config.train import PreviewConfig, TrainConfig
from tests.conftest import REPOSITORY, run_program

SCHEMAS = {
    "train": TrainConfig, "evaluate": EvaluateConfig, "embed": EmbedConfig, "segment": SegmentConfig, "export": ExportConfig,
    "pack": PackConfig, "preview": PreviewConfig, "stats": StatsConfig, "predict": PredictConfig,
}  # fmt: skip
# Right command lines that a wrong setting is added to; {folder} is the test's.
RIGHT = {
    "train": ["+experiment=quickstart", "trainer.max_steps=1", "evaluation.baselines=false", "trainer.accelerator=cpu"],
    "evaluate": ["checkpoint={folder}/sound.ckpt", "data=digits", "accelerator=cpu"],
    "embed": ["checkpoint={folder}/sound.ckpt", "data=digits", "output={folder}/x.npz", "accelerator=cpu"],
    "segment": [
        "checkpoint={folder}/sound.ckpt", "data.root={folder}/shapes", "decoder=linear", "data.num_workers=0",
        "data.batch_size=2", "trainer.max_steps=1", "trainer.accelerator=cpu",
    ],
    "export": ["checkpoint={folder}/sound.ckpt", "format=safetensors", "output={folder}/x.safetensors"],
    "pack": ["data=digits", "output={folder}/packed", "num_workers=0"],
    "preview": ["+experiment=quickstart", "output={folder}/pairs.png", "num_pairs=2"],
    "stats": ["data=digits", "num_workers=0", "output={folder}/stats.json"],
    "predict": [
        "checkpoint={folder}/tuned", "data.root={folder}/shapes/images", "output={folder}/masks", "accelerator=cpu",
        "data.num_workers=0",
    ],
}  # fmt: skip
# Settings that are right alone and wrong together, or wrong for these data and this checkpoint.
CONTRADICTIONS = {
    "preview": [
        ["output={folder}/pairs.gif"], ["output={folder}/sound.ckpt/pairs.png"], ["data.batch_size=5000"], ["data=images"],
        ["data.name=cifar11"], ["augmentation.query.random_resized_crop.scale=[2,1]"], ["augmentation.std=[1,1]"],
    ],
    "train": [
        ["data.batch_size=5000"], ["trainer.accumulate_grad_batches=7"], ["method.num_queues=2"],
        ["data=images"], ["data=images", "data.root={folder}/nowhere"], ["data=images", "data.root={folder}/empty"],
        ["data=image_folder", "data.root=[a,b]"], ["data=npz", "data.root={folder}/sound.ckpt"],
        ["data=npz", "data.root={folder}/empty"], ["data=segmentation_folder", "data.root={folder}/shapes"],
        ["data.name=cifar11"], ["data=cifar10", "data.root={folder}/empty"], ["data=images", "data.root=[]"],
        ["backbone.window_size=7"], ["backbone=swin_t", "backbone.stem=cifar"], ["backbone.name=resnet17"],
        ["backbone=swin_v2_tiny_patch2", "backbone.window_size=[4,4]"],
        ["backbone=swin_v2_tiny_patch2", "backbone.window_size=wide"],
        ["resume={folder}/nowhere.ckpt"], ["resume={folder}/empty"], ["resume={folder}/text.ckpt"],
        ["init_from={folder}/nowhere.ckpt"], ["init_from={folder}/empty"], ["init_from={folder}/text.ckpt"],
        ["init_from={folder}/sound.ckpt", "backbone=resnet18"],
        ["trainer.max_steps=0"], ["trainer.accelerator=cuda"], ["trainer.accelerator=gpu"],
        ["method.batch_norm=split", "method.batch_norm_splits=7"], ["data.batch_size=12", "method.batch_norm=split"],
        ["augmentation.query.random_resized_crop.scale=[2,1]"],
        ["+augmentation.query.swirl={{}}"], ["augmentation.mean=[0.5,0.5]"], ["augmentation.std=[0,0,0]"],
        ["+augmentation.key.solarize.threshold=300"], ["+augmentation.query.color_jitter.hue=2"],
        ["hydra.run.dir={folder}/text.ckpt"], ["hydra.run.dir={folder}/text.ckpt/below"],
        ["data=packed", "data.root={folder}/empty"], ["data=hf", "data.root={folder}/shapes"],
        ["data=webdataset", "data.root=nowhere-*.tar"], ["data=webdataset", "data.root=pipe:true"],
    ],
    "evaluate": [
        ["checkpoint={folder}/nowhere.ckpt"], ["checkpoint={folder}/empty"], ["checkpoint={folder}/text.ckpt"],
        ["data=images", "data.root={folder}/shapes"], ["data=image_folder"], ["data=voc2012"],
        ["backbone.window_size=7"], ["output={folder}/empty"], ["accelerator=cuda"], ["data.root=[1]", "data=npz"],
        ["checkpoint=null"], ["backbone=resnet18"], ["augmentation.mean=[0.5,0.5]"], ["augmentation.std=[0,0,0]"],
    ],
    "embed": [
        ["output={folder}/x.txt"], ["output={folder}/empty"], ["output={folder}/text.ckpt/x.npz"],
        ["split=test", "data=images", "data.root={folder}/shapes"], ["backbone.window_size=[4,4,4,4]"],
        ["accelerator=cuda"], ["checkpoint={folder}/text.ckpt"], ["data=npz", "data.root={folder}/text.ckpt"],
    ],
    "segment": [
        ["checkpoint=null"], ["checkpoint=null", "backbone=resnet_tiny"], ["backbone=resnet18"], ["image_size=4"],
        ["checkpoint=null", "image_size=32"], ["data=digits"], ["data=images"], ["data.root={folder}/empty"],
        ["data.root={folder}/nowhere"], ["data.root=null"], ["data.num_classes=2"], ["data.class_names=[a,a,b]"],
        ["data.class_names=[a,b]"], ["data.ignore_index=1", "data.class_names=[a,b]"], ["decoder.channels=64"],
        ["data.batch_size=500"], ["trainer.accumulate_grad_batches=2"], ["trainer.devices=2"], ["trainer.max_steps=0"],
        ["resume={folder}/nowhere.ckpt"], ["resume={folder}/text.ckpt"], ["augmentation.scale=[2,1]"],
        ["augmentation.scale=[0,1]"], ["augmentation.mean=[1,1]"], ["augmentation.std=[0,0,0]"], ["data.max_image_pixels=9"],
        ["backbone.window_size=7"], ["augmentation.color_jitter={{hue: 3}}"], ["augmentation.color_jitter={{shine: 1}}"],
    ],
    "predict": [
        ["output={folder}/shapes"], ["output={folder}/text.ckpt"], ["output={folder}/text.ckpt/below"], ["split=test"],
        ["checkpoint={folder}/nowhere.ckpt"], ["checkpoint={folder}/sound.ckpt"], ["checkpoint={folder}/text.ckpt"],
        ["data.root={folder}/nowhere"], ["data.root={folder}/empty"], ["data.root=null"], ["data=hf", "data.root={folder}/empty"],
        ["accelerator=cuda"], ["tta=true", "tta_scales=[]"], ["tta=true", "tta_scales=[-1]"], ["backbone.window_size=7"],
        ["data.bands=[9]"], ["data=segmentation_folder", "data.root={folder}/empty"], ["data.pages=channels", "data.tile=64"],
    ],
    "export": [
        ["output={folder}/x.pth"], ["format=torchvision"], ["format=timm"], ["output={folder}/empty"],
        ["output={folder}/text.ckpt/x.safetensors"], ["checkpoint={folder}/text.ckpt"], ["backbone.window_size=7"],
        ["format=torchvision", "output={folder}/x.txt"],
    ],
    "pack": [
        ["output={folder}/text.ckpt"], ["output={folder}/text.ckpt/below"], ["output={folder}/shapes"], ["check=true"],
        ["data=images"], ["data=images", "data.root={folder}/empty"], ["data=voc2012"], ["data.name=digit"], ["--checks"],
        ["data=packed", "data.root={folder}/empty"], ["data=hf", "data.root={folder}/empty"], ["format=tar"],
        ["data=webdataset", "data.root={folder}/empty"], ["data=webdataset", "data.root=pipe:true", "data.num_images=9"],
        ["data.value_range=[0,1]"], ["data.nodata=0"],
    ],
    "stats": [
        ["data=images"], ["data=images", "data.root={folder}/empty"], ["data.name=digit"], ["data.bands=[9]"], ["data.bands=[]"],
        ["data.bands=[red]"], ["output={folder}"], ["output={folder}/text.ckpt/x.json"], ["data=npz", "data.root={folder}/empty"],
    ],
}  # fmt: skip
# What is wrong with whatever program it is given to.
BROKEN_SYNTAX = [
    "data.root=[1", "seed={{a", "=5", "word", "seed=", "a==b", "+", "~", "data.root='x", "seed=1,2", "data@=3", "seed:1",
    "+seed=1", "~nothing", "++nothing=1", "data=nothing", "+experiment=nothing", "nothing=digits", "data=", "hydra.nothing=1",
    "hydra/launcher=nothing", "--nothing", "--config-name=nothing", "--config-dir=nowhere", "-x", "--cfg=nothing", "--multirun=3",
    "seed=${{nothing}}", "seed=${{oc.env:NOTHING}}", "checkpoint=${{nothing:1}}", "data.root=${{data.root}}", "data=[1,2]",
    "/data=digits", "seed=1\nseed=2", "\udcff=1", "data.root.deeper=1", "+data.name.deeper=1",
]  # fmt: skip


def leaves(schema, prefix=""):
    """(dotted key, type without Optional, limits) of every setting that has a plain type."""
    hints = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        kind = hints[item.name]
        if dataclasses.is_dataclass(kind):
            yield from leaves(kind, f"{prefix}{item.name}.")
            continue
        is_optional = type(None) in typing.get_args(kind)
        kind = (
            next((one for one in typing.get_args(kind) if one is not type(None)), kind)
            if is_optional
            else kind
        )
        if kind in (int, float, bool, str):
            yield f"{prefix}{item.name}", kind, is_optional, item.metadata


def misspelt(generator, name):
    place = int(generator.integers(len(name)))
    wrong = (
        name[:place] + name[place + 1 :],
        name[:place] + "q" + name[place:],
        name + "s",
        name.upper() + "_",
    )
    return wrong[generator.integers(4)] or "q"


def unknown_key(generator, program):
    every = keys(SCHEMAS[program])
    parent, dot, name = every[generator.integers(len(every))].rpartition(".")
    key = parent + dot + misspelt(generator, name)
    if key in every:
        return unknown_key(generator, program)
    return [("", "+", "++")[generator.integers(3)] + key + "=1"]


def wrong_type(generator, program):
    choices = list(leaves(SCHEMAS[program]))
    key, kind, is_optional, limits = choices[generator.integers(len(choices))]
    values = ["[1,2]", "{{a: 1}}", "[]"]
    if kind is not str:
        values += ["many", "1e", "0x1F;", "'1 2'", "1.2.3"]
    if kind is int:
        values += ["1.5", "1e3", "inf"]
    if kind is float:
        values += ["nan", "inf", "-inf"]
    if "choices" in limits:
        values += ["nothing", "Auto ", "''", "5"]
    if not is_optional and "." in key:
        values.append("null")
    return [f"{key}={values[generator.integers(len(values))]}"]


def out_of_range(generator, program):
    choices = [
        (key, limits)
        for key, kind, _, limits in leaves(SCHEMAS[program])
        if kind in (int, float) and limits
    ]
    key, limits = choices[generator.integers(len(choices))]
    values = [
        limits[name] - distance
        for name in ("at_least",)
        if name in limits
        for distance in (1, 10**6)
    ]
    values += [limits["above"] - distance for distance in (0, 1) if "above" in limits]
    values += [limits["at_most"] + distance for distance in (1, 10**9) if "at_most" in limits]
    values += [limits["below"] + distance for distance in (0, 1) if "below" in limits]
    return [f"{key}={values[generator.integers(len(values))]}"]


def contradiction(generator, program):
    return CONTRADICTIONS[program][generator.integers(len(CONTRADICTIONS[program]))]


def broken_syntax(generator, program):
    return [BROKEN_SYNTAX[generator.integers(len(BROKEN_SYNTAX))]]


def command_lines(count, seed):
    """(program, arguments): right ones with one thing wrong, every kind and program in turn."""
    generator = np.random.default_rng(seed)
    kinds = (unknown_key, wrong_type, out_of_range, contradiction, broken_syntax)
    for number in range(count):
        program = list(RIGHT)[number // len(kinds) % len(RIGHT)]
        yield program, [*RIGHT[program], *kinds[number % len(kinds)](generator, program)]


def drive(path):
    """Try the command lines in a file and write exit code, stderr and seconds of each beside it."""
    from hydra.core.global_hydra import GlobalHydra

    outcomes = []
    with open(path) as file:
        lines = json.load(file)
    for program, arguments in lines:
        GlobalHydra.instance().clear()
        os.environ.pop("HYDRA_FULL_ERROR", None)  # set by the program before
        sys.argv = [f"moco.{program}", *arguments]
        started, code = time.monotonic(), None
        with (
            contextlib.redirect_stderr(io.StringIO()) as stderr,
            contextlib.redirect_stdout(io.StringIO()),
        ):
            try:
                importlib.import_module(f"moco.{program}").main()
            except SystemExit as exit:
                code = exit.code
            except BaseException:
                traceback.print_exc()
        outcomes.append((code, stderr.getvalue(), time.monotonic() - started))
    with open(f"{path}.outcomes", "w") as file:
        json.dump(outcomes, file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the command lines name."""
    from tests.segmentation.fine_tuned import write_run
    from tests.segmentation.shapes import draw_shapes
    from tests.segmentation.test_segment import pretraining_checkpoint

    folder = tmp_path_factory.mktemp("files")
    pretraining_checkpoint(folder / "sound.ckpt", "backbone=resnet_tiny")
    write_run(folder / "tuned")
    draw_shapes(folder / "shapes", num_train=4, num_val=2)
    (folder / "empty").mkdir()
    (folder / "text.ckpt").write_text("text")
    return folder


def tried(lines, folder, cwd):
    """What came of every command line: ((program, arguments), exit code, stderr, seconds)."""
    filled = [
        (program, [argument.format(folder=folder) for argument in arguments])
        for program, arguments in lines
    ]
    (cwd / "lines.json").write_text(json.dumps(filled))
    subprocess.run(
        [sys.executable, __file__, str(cwd / "lines.json")],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=1200,
    )
    outcomes = json.loads((cwd / "lines.json.outcomes").read_text())
    return [(line, *outcome) for line, outcome in zip(filled, outcomes, strict=True)]


def check(outcomes, cwd):
    """Exit 2 and one line each; nothing left behind."""
    wrong = [
        f"{' '.join(line[1])!r} of {line[0]}: exit {code}, {stderr[:600]!r}"
        for line, code, stderr, _ in outcomes
        if code != 2
        or stderr.count("\n") != 1
        or not stderr.startswith("error: ")
        or "Traceback" in stderr
    ]
    assert not wrong, "\n".join(wrong)
    left = [name for _, _, names in os.walk(cwd) for name in names]
    assert not {"last.ckpt", "metrics.json"} & set(left)  # nothing was trained or measured


@pytest.mark.slow
def test_wrong_command_lines_are_one_line_and_exit_with_2(folder, tmp_path):
    check(tried(list(command_lines(15, seed=1)), folder, tmp_path), tmp_path)


@pytest.mark.slow
def test_two_hundred_wrong_command_lines(folder, tmp_path):
    check(tried(list(command_lines(200, seed=0)), folder, tmp_path), tmp_path)


def test_the_generator_knows_every_program_and_setting():
    assert set(SCHEMAS) == {path.stem for path in CONFIG_DIR.glob("*.yaml")}
    settings = [key for key, *_ in leaves(TrainConfig)]
    assert (
        {"data.batch_size", "method.temperature", "trainer.devices"}
        <= set(settings)
        <= set(keys(TrainConfig))
    )


@pytest.mark.slow
def test_real_processes_do_the_same(folder, tmp_path):
    for module, argument in (
        ("moco.train", "trainer.max_stepz=1"),
        ("moco.export", "format=onnx"),
        ("moco.embed", "--nothing"),
    ):
        done = run_program(module, argument, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, ""), done.stderr
        assert done.stderr.startswith("error: ")


if __name__ == "__main__":
    drive(sys.argv[1])
