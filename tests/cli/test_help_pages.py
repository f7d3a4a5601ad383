"""The help pages: what is on them, and that it is true."""

import re
import sys

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf

from moco import __version__, sweep, train
from moco.cli.help_pages import (
    answer_question,
    choices_of_group,
    composed_defaults,
    default_of,
    long_page,
    short_page,
    topic_page,
    typed_group,
)
from moco.cli.program_texts import IMAGES, IMAGES_WITH_MASKS, PROGRAMS
from moco.config.parsing import CONFIG_DIR, SCHEMAS, register_schemas
from moco.config.setting_texts import NO_DEFAULT, setting_texts
from moco.data.sources.registry import MASKED, SOURCES
from moco.errors import InputError
from tests.conftest import thinned


@pytest.fixture(autouse=True)
def usual_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


def as_text(lines):
    return "\n".join("".join(part for part, _ in line) for line in lines)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_page_has_what_a_newcomer_needs_and_fits_80_columns(program):
    page = as_text(short_page(program))
    assert max(map(len, page.splitlines())) <= 80
    assert page.startswith(f"moco.{program}: {PROGRAMS[program].purpose[:40]}")
    assert page.count(f"  python -m moco.{program} ") == 4  # usage and three examples
    assert len(PROGRAMS[program].settings) <= 15
    for key in PROGRAMS[program].settings:
        assert f"\n  {key}" in page
    for group in PROGRAMS[program].groups:
        assert f"\n  {typed_group(group)}=" in page


@pytest.mark.parametrize("program", SCHEMAS)
def test_the_long_page_has_every_setting_with_its_meaning(program):
    page = as_text(long_page(program))
    for text in setting_texts(SCHEMAS[program]):
        assert f"\n  {text.key}" in page
        assert text.meaning, f"{text.key} of moco.{program} has no text in the schema"
        assert not text.meaning.startswith("As in")
    # Longer lines hold one word or one value alone.
    for line in page.splitlines():
        assert len(line) <= 80 or len(line.split()) == 1


@pytest.mark.parametrize("program", thinned(SCHEMAS, every=3))
def test_the_defaults_are_those_that_hydra_composes(program):
    register_schemas()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        composed = compose(program)
    plain = OmegaConf.to_container(composed)
    settings, _ = composed_defaults(program)
    for text in setting_texts(SCHEMAS[program]):
        if not text.is_group:
            expected = plain
            for part in text.key.split("."):
                expected = expected[part]
            assert default_of(text, settings) == expected, text.key


def test_the_choices_of_a_program_are_its_own():
    assert set(IMAGES) == set(SOURCES)
    assert set(IMAGES_WITH_MASKS) == set(MASKED)
    assert list(choices_of_group("segment", "data", [CONFIG_DIR])) == list(IMAGES_WITH_MASKS)
    assert "voc2012" not in choices_of_group("train", "data", [CONFIG_DIR])
    assert not choices_of_group("train", "decoder", [CONFIG_DIR])
    for text in PROGRAMS.values():
        for group, names in text.groups.items():
            assert (CONFIG_DIR / group).is_dir()
            for name in names or ():
                assert (CONFIG_DIR / group / f"{name}.yaml").is_file()


def test_the_examples_name_keys_and_choices_that_there_are():
    for program, schema in SCHEMAS.items():
        keys = {text.key for text in setting_texts(schema) if not text.is_group}
        for example in PROGRAMS[program].examples:
            for key, value in re.findall(r"(\S+)=(\S+)", example):
                choices = choices_of_group(program, key.lstrip("+"), [CONFIG_DIR])
                assert key in keys or value in choices, f"moco.{program} {example}"


def test_a_word_after_help_asks_for_a_setting_a_group_or_a_name():
    page = as_text(topic_page("train", ["method.temperature"]))
    assert "  method.temperature=0.2    number, above 0\n" in page
    page = as_text(topic_page("train", ["method"]))
    assert "the choices of method=NAME" in page
    assert "      MoCo v2 (arXiv 2003.04297, section 3): v1 with a two-layer head" in page
    assert "  method.projector.num_layers=2" in page
    page = as_text(topic_page("train", ["temperature"]))
    assert "method.temperature=0.2" in page
    assert "evaluation.temperature=0.1" in page
    page = as_text(topic_page("train", ["+experiment"]))
    assert "  quickstart\n" in page
    with pytest.raises(InputError, match=r"unknown key 'method.tempersture'; did you mean"):
        topic_page("train", ["method.tempersture"])


def test_help_beside_an_experiment_shows_its_values(capsys, tmp_path):
    assert answer_question("train", ["experiment=quickstart", "data.batch_size=32", "--help"])
    page = capsys.readouterr().out
    assert max(map(len, page.splitlines())) <= 80
    assert "  The values are those of experiment=quickstart data.batch_size=32.\n" in page
    assert "\n  data.batch_size=32 " in page
    assert "\n  trainer.max_epochs=60 " in page
    assert "\n  +experiment=quickstart\n" in page
    assert "\n  backbone=resnet_tiny\n" in page
    assert answer_question("train", ["--help"])
    page = capsys.readouterr().out
    assert "those of a run without an experiment. +experiment=NAME --help shows those" in " ".join(
        page.split()
    )
    # A user's own file of an experiment.
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\n# Mine.\nmethod: {temperature: 0.3}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    arguments = ["experiment=mine", f"--config-dir={tmp_path}", "--help", "method.temperature"]
    assert answer_question("train", arguments)
    assert "method.temperature=0.3" in capsys.readouterr().out
    with pytest.raises(HydraException, match="nowhere"):
        answer_question("train", ["experiment=nowhere", "--help"])


def test_what_has_to_be_given_and_what_a_file_holds_is_said():
    page = as_text(short_page("evaluate"))
    assert "  checkpoint    has to be given; text; or null\n" in page
    page = as_text(short_page("preview"))
    assert "  augmentation.query    as in augmentation=moco_v2\n" in page
    assert NO_DEFAULT not in page


def test_choices_of_the_users_own_folder_are_listed(tmp_path, capsys):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\n# My lake. Of 2026.\n")
    assert answer_question("train", [f"--config-dir={tmp_path}", "--help", "experiment"])
    shown = capsys.readouterr().out
    assert "  mine\n      My lake.\n" in shown
    assert answer_question("train", ["-h", "--config-dir", str(tmp_path)])
    assert " mine" in capsys.readouterr().out


def test_a_narrow_terminal_gets_narrow_lines(monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    lines = as_text(short_page("stats")).splitlines()
    assert max(map(len, lines)) <= 50


def test_version_is_the_projects(capsys):
    assert answer_question("train", ["experiment=quickstart", "--version"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"moco-ssl {__version__}"
    assert lines[2].startswith("torch 2.")


def test_a_program_that_is_asked_nothing_runs():
    assert not answer_question("train", ["data.root=--help", "experiment=quickstart"])


def test_a_program_answers_with_its_page_or_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # a program sets it for itself
    monkeypatch.setattr(sys, "argv", ["moco-sweep", "runs/sweep/x", "--help"])
    sweep.main()
    assert "  moco-sweep FOLDER [--csv FILE]\n" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["moco-train", "--help", "dat"])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: unknown key 'dat'; did you mean 'data'?")
    monkeypatch.setattr(sys, "argv", ["moco-train", "--help", "data.root"])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert not ended.value.code
    assert capsys.readouterr().out.startswith("data.root, with defaults\n")
    assert not list(tmp_path.iterdir())
