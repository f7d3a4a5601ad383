"""The wheel runs on its own, outside the checkout."""

import subprocess
import sys
import zipfile

import pytest

from tests.conftest import REPOSITORY, run_program

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "uv", "build", "--wheel", "--out-dir", folder, REPOSITORY],
        check=True,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_wheel_holds_the_package_and_every_config(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (REPOSITORY / "conf").rglob("*.yaml"):
        assert f"moco/conf/{path.relative_to(REPOSITORY / 'conf')}" in names
    assert {"moco/train.py", "moco/evaluate.py", "hydra_plugins/moco_slurm.py"} <= names
    assert {f"moco/cli/completion.{shell}" for shell in ("bash", "fish", "zsh")} <= names
    assert not [name for name in names if name.startswith(("tests/", "conf/", "scripts/"))]


def test_wheel_trains_from_an_empty_folder(wheel, tmp_path):
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "uv", "pip", "install", "--no-deps", "--target", site, wheel],
        check=True,
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    done = run_program(
        "moco.train",
        "+experiment=quickstart",
        "trainer.max_epochs=2",
        cwd=empty,
        timeout=300,
        PYTHONPATH=str(site),
    )
    assert done.returncode == 0, done.stderr
    assert list(empty.glob("runs/quickstart/*/metrics.json"))
