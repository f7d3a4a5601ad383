import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def generator():
    return np.random.default_rng(0)


@pytest.fixture
def picture_tree(tmp_path, generator):
    """24 RGB pictures of 20 x 16 px at three depths."""
    root = tmp_path / "pictures"
    for number in range(24):
        folder = root / ("a", "b", "b/deeper")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        array = generator.integers(0, 256, (16, 20, 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / f"{number:02}.png")
    return root


def run_program(module, *arguments, cwd, timeout=120, **environment):
    """A program of ours in its own process, as a user starts it."""
    import os

    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
