"""What a program imports, and does, before it has something to compute."""

import re
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY, run_program

PROGRAMS = (
    "train", "evaluate", "embed", "segment", "predict", "export", "pack", "preview", "stats",
)  # fmt: skip
# Seconds to import, or what a run alone has a use for.
HEAVY = {
    "cv2", "faiss", "matplotlib", "numpy", "pandas", "PIL", "pytorch_lightning", "rich", "scipy", "sklearn", "tensorboard",
    "timm", "torch", "torchmetrics", "torchvision",
}  # fmt: skip


def imported(*command, cwd, code=0):
    """The packages that a command has imported when it ends with `code`."""
    ended = run_program(*command, cwd=cwd, PYTHONPROFILEIMPORTTIME="1")
    assert ended.returncode == code, ended.stderr
    return set(re.findall(r"^import time: +\d+ \| +\d+ \| +(\w+)$", ended.stderr, re.MULTILINE))


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(name, marks=[] if name in ("train", "evaluate") else [pytest.mark.slow])
        for name in PROGRAMS
    ],
)
def test_help_imports_nothing_that_computes(program, tmp_path):
    packages = imported(f"moco.{program}", "--help", cwd=tmp_path)
    assert "hydra" in packages
    assert not packages & HEAVY


def test_showing_a_config_imports_nothing_that_computes(tmp_path):
    assert (
        not imported("moco.train", "+experiment=quickstart", "--cfg", "job", cwd=tmp_path) & HEAVY
    )


@pytest.mark.parametrize("mistake", ["method.tempersture=1", "trainer.max_steps=0"])
def test_a_mistake_in_the_config_imports_nothing_that_computes(mistake, tmp_path):
    assert not imported("moco.train", mistake, cwd=tmp_path, code=2) & HEAVY


def test_hydras_help_does_not_copy_the_schemas_for_every_group_that_it_looks_for(tmp_path):
    # Hydra alone copies every schema for each of its questions: thousands of copies of sections, of two seconds.
    count_copies = """
import sys
from omegaconf import DictConfig
copy, copies = DictConfig.__deepcopy__, []
DictConfig.__deepcopy__ = lambda self, memo: copies.append(0) or copy(self, memo)
from moco.train import main
try:
    main()
finally:
    print(len(copies), file=sys.stderr)
"""
    ended = subprocess.run(
        [sys.executable, "-c", count_copies, "--hydra-help"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "--config-dir" in ended.stdout
    assert int(ended.stderr) < 1500
