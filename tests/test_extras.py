"""What the messages about missing packages say to install."""

import re

import pytest

from moco import extras
from tests.conftest import REPOSITORY


def test_a_checkout_installs_itself(monkeypatch, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    assert extras.install_command("hf") == "pip install -e '.[hf]'"
    monkeypatch.chdir(tmp_path)
    assert extras.install_command("hf") == f"pip install -e '{REPOSITORY}[hf]'"


def test_a_folder_with_another_project_is_not_taken_for_the_checkout(monkeypatch, tmp_path):
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    monkeypatch.chdir(tmp_path)
    assert extras.install_command("hf") == f"pip install -e '{REPOSITORY}[hf]'"


def test_an_installed_package_has_its_published_name(monkeypatch):
    monkeypatch.setattr(extras, "CONFIG_DIR", extras.PACKAGE / "conf")
    assert extras.install_command("hf") == "pip install 'moco-ssl[hf]'"


def test_every_extra_that_a_message_names_exists():
    toml = pytest.importorskip("tomllib")
    project = toml.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    named = set()
    for path in (REPOSITORY / "moco").rglob("*.py"):
        named |= set(re.findall(r"""install_command\(["'](\w+)""", path.read_text()))
    assert len(named) >= 9
    assert named <= set(project["optional-dependencies"])
