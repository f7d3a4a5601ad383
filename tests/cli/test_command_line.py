"""What people type reaches the config as they mean it."""

import os

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from moco.cli.command_line import readable, readable_overrides
from moco.cli.from_python import composed
from moco.config.paths import resolve_paths, with_absolute_paths
from moco.config.pretrained import EvaluateConfig
from moco.config.train import PreviewConfig, TrainConfig
from moco.errors import InputError


def read(override, schema=TrainConfig):
    """The value that Hydra reads from an override."""
    (line,) = readable_overrides([override], schema)
    return OverridesParser.create().parse_override(line).value()


@pytest.mark.parametrize(
    "text",
    [
        "写真", "O'Neil", "a=b", "2024", "2024_05", "1e3", "true", "~/x", "a b", "photos (1)", "exp[v2]",
        "[2024] holidays", "x#y", "x&y;z", 'say "cheese"', "caf\udce9", "shards-{000..012}.tar", "a:b", "-x",
        "pipe:cat x | y",
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["data.root", "checkpoint"])
def test_a_path_is_a_text_whatever_is_in_it(key, text):
    schema = EvaluateConfig if key == "checkpoint" else TrainConfig
    assert read(f"{key}={text}", schema) == text


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("data.root=[~/a,写真, 2024]", ["~/a", "写真", "2024"]),
        ("data.root=[a b,O'Neil]", ["a b", "O'Neil"]),
        ("data.root=\"quoted [v2]\"", "quoted [v2]"),
        ("data.root=a\\,b", "a,b"),
        ("data.root=null", None),
        ("data.root=", ""),
        ("data.root=${oc.env:HOME}", "${oc.env:HOME}"),
        ("data.band_files={id}_B{band}.tif", "{id}_B{band}.tif"),
        ("data.group=(?P<group>[^_,]+)_", "(?P<group>[^_,]+)_"),
        ("data.group=1", 1),
        ("data.batch_size=64", 64),
        ("init_from=2024_05", "2024_05"),
        ("+data.root=2024", "2024"),
    ],
)  # fmt: skip
def test_what_has_a_meaning_for_hydra_keeps_it(typed, value):
    assert read(typed) == value


def test_commas_are_a_sweep_and_a_name_only_if_a_file_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert readable(["-m", "data.root=~/a,写真"], TrainConfig) == ['data.root="~/a","写真"', "-m"]
    assert readable(["-m", "seed=1,2", "data.root=a,b"], TrainConfig)[1] == "data.root=a,b"
    assert readable(["data.root=a,b"], TrainConfig) == ["data.root=a,b"]  # Hydra refuses it
    for name in ("a,b", "[v2]"):
        (tmp_path / name).mkdir()
        assert read(f"data.root={name}") == name


def test_options_and_overrides_come_in_any_order():
    typed = ["seed=1", "-m", "experiment=a,b", "--config-dir", "own", "data.batch_size=8"]
    expected = ["seed=1", "+experiment=a,b", "data.batch_size=8", "-m", "--config-dir", "own"]
    assert readable(typed, PreviewConfig) == expected
    assert readable(["+experiment=a"], TrainConfig) == ["+experiment=a"]
    completion = ["--shell-completion", "install=bash"]
    assert readable(completion, TrainConfig) == completion


@pytest.mark.parametrize(
    "broken", ["data.root='x", "data.root=[1", "word", "=5", "seed=写", "a==b"]
)
def test_what_is_broken_is_left_for_the_error_line(broken):
    assert readable([broken], TrainConfig) == [broken]


def test_hydra_gets_its_folders_without_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert read("hydra.run.dir=~/runs/[a]") == "/home/ada/runs/[a]"
    assert read("hydra.sweep.dir=2024") == "2024"


def test_a_run_folder_stands_for_its_last_checkpoint(tmp_path):
    run = tmp_path / "runs" / "first"
    (run / "checkpoints").mkdir(parents=True)
    last = run / "checkpoints" / "last.ckpt"
    for given in (run, run / "checkpoints"):
        last.write_text("")
        config = TrainConfig(init_from=str(given), resume=f"{given}/")
        resolve_paths(config)
        assert [os.path.normpath(config.init_from), os.path.normpath(config.resume)] == [
            str(last)
        ] * 2
    config = EvaluateConfig(checkpoint=str(tmp_path / "runs"))
    with pytest.raises(
        InputError, match=r"a folder without checkpoints/last.ckpt.*such as .*first"
    ):
        resolve_paths(config)


def test_paths_lose_their_tilde_and_a_run_keeps_absolute_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    config = TrainConfig()
    config.data.root = ["~/images", "images", "nowhere"]
    resolve_paths(config)
    assert config.data.root == [f"{tmp_path}/images", "images", "nowhere"]
    plain = {"data": {"root": config.data.root, "labels": None}, "init_from": "images/*.tar"}
    assert with_absolute_paths(plain) == {
        "data": {"root": [f"{tmp_path}/images"] * 2 + ["nowhere"], "labels": None},
        "init_from": f"{tmp_path}/images/*.tar",
    }


MISTAKES = [
    ("hydra/launcher=slrum", "hydra/launcher=slrum: unknown hydra/launcher 'slrum'; did you mean 'slurm'?"),
    ("hydra/lancher=slurm", "unknown group 'hydra/lancher'; did you mean 'hydra/launcher'?"),
    ("datta/images=x", "unknown group 'datta/images'"),
    ("hydra.run.dri=x", "unknown key 'hydra.run.dri'; did you mean 'hydra.run.dir'?"),
    ("hydra.lancher.partition=x", "unknown key 'hydra.lancher'; did you mean 'hydra.launcher'?"),
    ("hydra.launcher.partion=x", "hydra.launcher: unknown key 'partion'; did you mean 'partition'?"),
    ("hydra/launcher.partition=3", "cannot read the override 'hydra/launcher.partition=3': a group has no settings; did you mean hydra.launcher.partition="),
    ("hydar.run.dir=x", "unknown key 'hydar'; did you mean 'hydra'?"),
    ("+expermient=quickstart", "unknown key 'expermient'; did you mean 'experiment'?"),
    ("data.root='x", "cannot read the override 'data.root='x': a character in it needs quotes; a text is quoted like this: 'data.root="),
    ("data.root=a,b", "data.root=a,b: several values are a sweep, which needs -m; one list is 'data.root=[a,b]'; one text is 'data.root=\"a,b\"'"),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "expected"), MISTAKES)
def test_a_mistake_is_explained_with_the_nearest_name(typed, expected, tmp_path):
    overrides = readable([typed], TrainConfig)
    with pytest.raises(InputError) as error:
        composed(overrides, tmp_path)
    assert str(error.value).startswith(expected)
