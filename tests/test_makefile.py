"""What `make` says, and that `make setup` does nothing else."""

import re
import shutil
import subprocess

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def made(*arguments):
    done = subprocess.run(
        ["make", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_make_lists_every_target():
    targets = re.search(r"^\.PHONY: (.*) moved$", (REPOSITORY / "Makefile").read_text(), re.M)
    listed = re.findall(r"^  (\S+) +\w", made(), re.M)
    assert sorted(listed) == sorted(targets[1].split())


def test_setup_runs_none_of_the_programs():
    commands = made("-n", "--always-make", "setup")
    assert "uv pip sync" in commands
    assert not re.search(r"-m (moco|pytest|ruff|scripts)", commands)
